"""The memory of a cache: the model's own tensors, or copies that keep nothing else alive."""

import pytest
import torch

from claa_ops.huggingface.cache import FullLayer
from claa_ops.methods import CLAA, FullKV
from claa_ops.prefill import ClaaCache, attach
from support.tiny_models import build, prompt


def projected(tokens: int, heads: int) -> torch.Tensor:
    """[2, heads, tokens, 8], as a projection makes it."""
    return torch.randn(2, tokens, heads, 8).transpose(1, 2)


def test_the_prompt_is_held_without_a_copy_and_later_tokens_are_appended():
    layer = FullLayer()
    key, value = projected(9, 2), projected(9, 2)
    held = layer.update(key, value)
    assert held[0] is key and held[1] is value
    more = projected(1, 2), projected(1, 2)
    keys, values = layer.update(*more)
    assert torch.equal(keys, torch.cat([key, more[0]], dim=2))
    assert torch.equal(values, torch.cat([value, more[1]], dim=2))


def test_a_slice_is_copied():
    """Of one projection for queries, keys and values, a view would keep all three."""
    _, key, value = projected(9, 8).split([4, 2, 2], dim=1)
    for held, given in zip(FullLayer().update(key, value), (key, value), strict=True):
        assert torch.equal(held, given)
        assert held.untyped_storage().nbytes() == held.nbytes


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3", "mistral"])
@pytest.mark.parametrize("method", [FullKV(), CLAA(keep=0.5, layer=1, last_n=2)])
def test_no_layer_keeps_more_memory_than_its_entries(family, method):
    model = attach(build(family))
    ids, _ = prompt(60)
    cache = ClaaCache(model.config, method)
    model(ids, past_key_values=cache)
    for layer in cache.layers:
        for held in (layer.keys, layer.values):
            assert held.untyped_storage().nbytes() == held.nbytes
