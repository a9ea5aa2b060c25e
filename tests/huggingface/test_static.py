"""StaticClaaCache: compiled decoding in buffers of fixed size."""

import pytest
import torch
from transformers import CompileConfig

from claa_ops.huggingface.static import StaticClaaCache
from claa_ops.methods import CLAA
from claa_ops.prefill import ClaaCache, attach
from support.tiny_models import build, generate, prompt

RAGGED = CLAA(keep=0.5, keep_kv=0.3, layer=1, last_n=2, first_full=1)
HALF = CLAA(keep=0.5, keep_kv=1.0, layer=1, last_n=2)


def compiled_everywhere() -> CompileConfig:
    config = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    config._compile_all_devices = True
    return config


@torch.no_grad()
@pytest.mark.parametrize(("lengths", "method"), [((60,), HALF), ((60, 41), RAGGED)])
def test_generate_compiles_it_and_decodes_the_same(lengths, method):
    torch.compiler.reset()
    model = attach(build("llama"))
    ids, mask = prompt(*lengths)
    tokens, logits = generate(model, ids, ClaaCache(model.config, method), mask, steps=7)

    cache = ClaaCache(model.config, method)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    model(ids, attention_mask=mask, position_ids=position, past_key_values=cache)
    static = StaticClaaCache(cache, max_new_tokens=7)
    assert static.get_seq_length() == 60
    ids = torch.cat([ids, tokens[:, :1]], dim=1)
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    static_tokens, static_logits = generate(
        model, ids, static, mask, steps=6, compile_config=compiled_everywhere()
    )
    assert torch.equal(static_tokens, tokens[:, 1:])
    torch.testing.assert_close(static_logits, logits[:, 1:], atol=1e-4, rtol=1e-4)
    assert [layer.keys.shape[2] - 7 for layer in static.layers] == cache.lengths


@torch.no_grad()
def test_it_is_a_copy():
    model = attach(build("llama"))
    ids, _ = prompt(60)
    cache = ClaaCache(model.config, RAGGED)
    model(ids, past_key_values=cache)
    expected = model(ids[:, :1], past_key_values=StaticClaaCache(cache, 1)).logits
    static = StaticClaaCache(cache, 3)
    assert cache.lengths == [60, 18, 18, 18]
    cache.reset()
    torch.testing.assert_close(model(ids[:, :1], past_key_values=static).logits, expected)


@torch.no_grad()
def test_what_it_cannot_hold_is_refused():
    model = attach(build("mistral"))
    cache = ClaaCache(model.config, RAGGED)
    with pytest.raises(ValueError, match="a prompt must have been prefilled, got none"):
        StaticClaaCache(cache, 4)
    model(prompt(60)[0], past_key_values=cache)
    with pytest.raises(ValueError, match="all layers must have full attention, got a window"):
        StaticClaaCache(cache, 4)
