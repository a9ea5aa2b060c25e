"""A model whose layers are spread over two GPUs."""

import pytest
import torch
from accelerate import dispatch_model

from claa_ops.methods import CLAA, FastKV, Peak
from claa_ops.prefill import ClaaCache, attach
from support.tiny_models import build, generate, prompt

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def spread(model):
    """Two of four layers on each GPU."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{layer}": layer // 2 for layer in range(4)}
    skipped = model._skip_keys_device_placement
    return dispatch_model(model.cuda(0), places, main_device=0, skip_keys=skipped)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(200,), (200, 130)], ids=["one", "padded"])
@pytest.mark.parametrize(
    "method",
    [
        CLAA(keep=60, layer=2, last_n=3, first_full=1),  # ranked on both, selected on the second
        Peak(keep=60, layer=1),  # selected between the two
        FastKV(keep=(90, 40), layer=(0, 2)),
        CLAA(keep=60, layer=2, last_n=3, first_full=1, in_layer=True),
    ],
    ids=["CLAA", "Peak", "FastKV", "in_layer"],
)
def test_it_answers_as_on_one(method, lengths):
    ids, mask = (each.cuda() for each in prompt(*lengths))
    alone, apart = attach(build("llama").cuda()), attach(spread(build("llama")))
    tokens, logits = generate(alone, ids, ClaaCache(alone.config, method), mask)
    cache = ClaaCache(apart.config, method)
    other_tokens, other_logits = generate(apart, ids, cache, mask)
    assert torch.equal(tokens, other_tokens)
    torch.testing.assert_close(logits, other_logits, atol=1e-3, rtol=1e-3)
    assert [layer.keys.device.index for layer in cache.layers] == [0, 0, 1, 1]
