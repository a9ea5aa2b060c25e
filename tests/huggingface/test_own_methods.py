"""A user's own method in a model of transformers: what it may read, and decide by row."""

from dataclasses import dataclass

import pytest
import torch

from claa_ops.methods import Pruning
from claa_ops.prefill import ClaaCache, attach, decode, generate, prefill
from support.own_methods import Mass
from support.tiny_models import build, prompt

FAMILIES = ["llama", "gemma2", "gpt_oss"]


@dataclass(frozen=True)
class Reads(Pruning):
    """Ranks by the hidden states, and notes what it has seen."""

    reads_hidden = True

    def informs(self, state, layer):
        return layer <= max(self.stages(state.num_layers))

    def rank(self, layer, before):
        noted = layer.state.notes.setdefault("seen", {})
        noted[layer.index] = layer.hidden, layer.key, layer.value
        return layer.hidden[:, : layer.context].float().norm(dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_sees_what_comes_into_each_layer(family):
    model, given = attach(build(family)), {}
    ids, mask = prompt(60, 41)
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: given.update({index: args[0]}),
            with_kwargs=True,
        )
    cache = ClaaCache(model.config, Reads(keep=(40, 20), layer=(0, 2), keep_kv=1.0))
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    seen = cache.state.notes["seen"]
    assert sorted(seen) == [0, 1, 2]
    for index, (hidden, key, value) in seen.items():
        assert torch.equal(hidden, given[index])
        assert key.shape[2] == value.shape[2] == hidden.shape[1] == (60 if index == 0 else 40)
    assert cache.hidden is None  # and nothing is held on to


def test_nothing_of_a_layer_is_held_after_the_prefill():
    model = attach(build("llama"))
    with torch.no_grad():
        state = prefill(model, prompt(60)[0], Pruning(keep=20, layer=1)).state
    with pytest.raises(RuntimeError, match="observed: must be read between .*, got layer 3 after"):
        _ = state.observed


@pytest.mark.parametrize("family", FAMILIES)
def test_each_prompt_of_a_padded_batch_has_the_budget_that_it_has_alone(family):
    model, method = attach(build(family)), Mass(layer=1, keep_kv=1.0)
    ids, mask = prompt(60, 41, 33)
    together = prefill(model, ids, method, mask)
    tokens = decode(model, together, max_new_tokens=5, eos_token_id=[])
    kept = []
    for row, length in enumerate((60, 41, 33)):
        alone = prefill(model, ids[row : row + 1, 60 - length :], method)
        positions = together.positions[row]
        positions = positions[positions >= 60 - length] - (60 - length)
        assert positions.tolist() == alone.positions[0].tolist()
        torch.testing.assert_close(together.logits[row], alone.logits[0], rtol=1e-4, atol=1e-5)
        answer = decode(model, alone, max_new_tokens=5, eos_token_id=[])
        assert torch.equal(tokens[row], answer[0])
        kept.append(len(positions))
    assert len(set(kept)) > 1


def test_prompts_of_one_length_that_would_differ_are_refused():
    model = attach(build("llama"))
    message = "Mass keeps more of one prompt than of another, so a batch must be padded or one pro"
    with pytest.raises(ValueError, match=message):
        prefill(model, prompt(60, 60)[0], Mass(layer=1))
    assert generate(model, prompt(60)[0], Mass(layer=1), max_new_tokens=3).shape == (1, 3)
