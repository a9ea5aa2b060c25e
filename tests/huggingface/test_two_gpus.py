"""A model whose layers are spread over two GPUs."""

import pytest
import torch
from accelerate import dispatch_model

from claa_ops.huggingface.turns import ask_again
from claa_ops.methods import CLAA, Coarse, FastKV, LazyLLM, Peak
from claa_ops.prefill import ClaaCache, attach, decode, prefill
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
        Coarse(keep=60, layer=0, ahead=2),  # goes back from the second to the first
        LazyLLM(keep=(90, 50), layer=(0, 2), revive=True),
    ],
    ids=["CLAA", "Peak", "FastKV", "in_layer", "Coarse", "revive"],
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


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(200, 200), (200, 130)], ids=["even", "padded"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("answers", [(4, 4), (4, 2)], ids=["of one length", "uneven"])
def test_a_second_look_is_as_on_one(layer, lengths, answers):
    ids, mask = (each.cuda() for each in prompt(*lengths))
    method, turns = Peak(keep=60, layer=layer, second_look=True), prompt(9, 9, seed=3)[0]
    logits = []
    for model in (attach(build("llama").cuda()), attach(spread(build("llama")))):
        prefilled = prefill(model, ids, method, mask)
        written = decode(model, prefilled, max_new_tokens=4, eos_token_id=[])
        said = [row[:tokens] for row, tokens in zip(written, answers, strict=True)]
        for _ in range(2):
            prefilled = ask_again(model, prefilled, said, [*turns])
            logits.append(prefilled.logits)
            said = [row[:0] for row in written]
    torch.testing.assert_close(logits[0], logits[2], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits[1], logits[3], atol=1e-3, rtol=1e-3)
