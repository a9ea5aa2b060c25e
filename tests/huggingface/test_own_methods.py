"""A user's own method in a model of transformers: what it may read, and decide by row."""

from dataclasses import dataclass, replace

import pytest
import torch

from claa_ops import select_topk
from claa_ops.methods import Peak, Pruning
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


@dataclass(frozen=True)
class Doubts(Peak):
    """Takes up at a later layer if little of its attention falls on what was kept but the sinks."""

    at: int = 2
    least: float = 0.2  # of the window's attention
    more: int = 10
    looks_again = differs_by_row = True

    def parks(self, state, layer):
        return True

    def observe(self, state, layer):
        super().observe(state, layer)
        if layer.index == self.at:
            kept = layer.window_scores.sum(dim=1)
            place = torch.arange(kept.shape[1])
            first = self.num_sinks + (0 if layer.start is None else layer.start[:, None])
            found = (kept * (place >= first)).sum(dim=1)
            state.notes["found"] = found / (layer.query.shape[1] * self.window)

    def take_up(self, state, layer):
        if layer != self.at:
            return None
        missing = state.missing()[:, : -self.window]
        counts = torch.where(state.notes["found"] < self.least, self.more, 0)
        counts = counts.minimum(missing.sum(dim=1))
        if not counts.any():
            return None
        ranking = state.importance.masked_fill(~missing, -torch.inf)
        return select_topk(ranking, int(counts.max()), counts=counts)


def test_a_later_layer_that_misses_its_answer_takes_tokens_up():
    model = attach(build("llama", num_hidden_layers=6))
    ids, mask = prompt(90, 67, 52)
    method = Doubts(keep=20, layer=1, window=6, keep_kv=1.0)
    found = prefill(model, ids, method, mask).state.notes["found"].sort().values
    method = replace(method, least=float(found[:2].mean()))  # one of the three doubts
    together = prefill(model, ids, method, mask)
    kept = (together.positions >= 0).sum(dim=1)
    assert sorted(kept.tolist()) == [20, 20, 30]
    tokens = decode(model, together, max_new_tokens=5, eos_token_id=[])
    for row, length in enumerate((90, 67, 52)):
        alone = prefill(model, ids[row : row + 1, 90 - length :], method)
        positions = together.positions[row]
        assert (positions[positions >= 0] - 90 + length).tolist() == alone.positions[0].tolist()
        torch.testing.assert_close(together.logits[row], alone.logits[0], rtol=1e-4, atol=1e-4)
        answer = decode(model, alone, max_new_tokens=5, eos_token_id=[])
        assert torch.equal(tokens[row], answer[0])
        assert alone.cache.lengths == [length + 4] * 2 + [int(kept[row]) + 4] * 4
    sure = prefill(model, ids, replace(method, least=0.0), mask)
    plain = prefill(model, ids, Peak(keep=20, layer=1, window=6, keep_kv=1.0), mask)
    assert torch.equal(sure.logits, plain.logits)


def test_prompts_of_one_length_that_would_differ_are_refused():
    model = attach(build("llama"))
    message = "Mass keeps more of one prompt than of another, so a batch must be padded or one pro"
    with pytest.raises(ValueError, match=message):
        prefill(model, prompt(60, 60)[0], Mass(layer=1))
    assert generate(model, prompt(60)[0], Mass(layer=1), max_new_tokens=3).shape == (1, 3)
