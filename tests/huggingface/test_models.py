"""Families of models: those served keep every promise, the others are refused unharmed."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers

from claa_ops.methods import CLAA
from claa_ops.prefill import ClaaCache, attach
from support.families import HYBRID, MULTIMODAL, REFUSED, SERVED, build_family, missing, page
from support.tiny_models import EXTRA, SLIDING_WINDOW, build, generate, prompt

METHOD = CLAA(keep=24, keep_kv=16, layer=1, last_n=2, first_full=0)
RELEASE = transformers.__version__


@pytest.fixture
def made(family):
    """A model of the family, if this release of transformers has it."""
    reason = missing(family, RELEASE)
    if reason is not None:
        pytest.skip(reason)
    return build_family(family)


def size(logits):
    return logits.abs().max().item()


@pytest.mark.parametrize("family", [*SERVED, *HYBRID, *MULTIMODAL])
def test_a_served_family_keeps_the_promises(family, made):
    model = made
    ids, mask = prompt(60, 41, 18)
    tokens, plain = generate(model, ids, mask=mask, steps=4)
    attach(model)

    everything = CLAA(keep=1.0, layer=1)
    kept_tokens, logits = generate(model, ids, ClaaCache(model.config, everything), mask, steps=4)
    assert torch.equal(kept_tokens, tokens)
    assert size(logits - plain) <= 1e-5 * size(plain)

    cache = ClaaCache(model.config, METHOD)
    _, logits = generate(model, ids, cache, mask, steps=4)
    assert logits.isfinite().all() and max(cache.lengths) <= 27
    assert size(logits - plain) > 1e-3 * size(plain)


@pytest.mark.parametrize(
    ("family", "lengths"),
    [
        *((family, (60, 41, 18)) for family in (*SERVED, *HYBRID, *MULTIMODAL)),
        *((family, (26, 9)) for family in ("llama", *EXTRA)),  # 9 < 16: padding within windows
    ],
)
def test_a_padded_row_is_the_row_alone(family, lengths, made):
    model = attach(made)
    ids, mask = prompt(*lengths)

    def padding_error(make_cache):
        batch = generate(model, ids, make_cache(), mask, steps=4)[1]
        error = 0.0
        for row, length in enumerate(lengths):
            alone = generate(model, ids[row : row + 1, -length:], make_cache(), steps=4)[1]
            error = max(error, size(batch[row] - alone[0]))
        return error, size(batch)

    error, _ = padding_error(lambda: ClaaCache(model.config, METHOD))
    plain_error, largest = padding_error(lambda: None)
    # As alike as the plain model's rows, which differ by rounding.
    assert error <= max(10 * plain_error, 1e-4 * largest)
    assert plain_error <= 1e-3 * largest


@dataclass(frozen=True)
class Recording(CLAA):
    """Keeps what each layer's attention says of itself."""

    seen: list = field(default_factory=list, compare=False)

    def rank(self, layer, before):
        self.seen.append(layer.attention)
        return super().rank(layer, before)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_scores_are_made_as_the_layer_attends(family):
    settings = {"query_pre_attn_scalar": 25} if family == "gemma2" else {}
    model = attach(build(family, **settings))
    method = Recording(keep=0.5, layer=2, last_n=3, first_full=9)
    with torch.no_grad():
        model(prompt(40)[0], past_key_values=ClaaCache(model.config, method))
    assert len(method.seen) == 3
    for layer, seen in enumerate(method.seen):
        sliding = family != "llama" and layer % 2 == 0
        assert seen["sliding_window"] == (SLIDING_WINDOW if sliding else 0)
        assert seen["softcap"] == (50.0 if family == "gemma2" else 0.0)
        assert seen["scale"] == (25**-0.5 if family == "gemma2" else 8**-0.5)
        if family == "gpt_oss":
            assert torch.equal(seen["sink_logits"], model.model.layers[layer].self_attn.sinks)
        else:
            assert seen["sink_logits"] is None


@pytest.mark.parametrize("family", REFUSED)
def test_a_refused_family_is_told_why_and_is_unharmed(family, made):
    model, ids = made, prompt(20)[0]
    attention = model.config._attn_implementation
    with torch.no_grad():
        before = model(ids).logits
    with pytest.raises((TypeError, ValueError)) as refusal:
        attach(model)
    assert REFUSED[family][1] in str(refusal.value)
    assert type(model).__name__ in str(refusal.value)
    assert model.config._attn_implementation == attention
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_the_page_of_architectures_has_what_is_tested():
    """What ``page`` returns renews it."""
    written = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    assert written == page("5.17.0, 5.23.0 and 5.24.0")


def test_layers_of_a_kind_that_is_not_known_are_refused():
    config = build("llama").config
    config.layer_types = ["full_attention", "chunked_attention"] * 2
    config.attention_chunk_size = 16
    with pytest.raises(ValueError, match="got chunked_attention for layer 1"):
        ClaaCache(config, CLAA(layer=1))
    config.layer_types = ["linear_attention"] * 4
    with pytest.raises(ValueError, match="a layer must attend, got none"):
        ClaaCache(config, CLAA(layer=1))
