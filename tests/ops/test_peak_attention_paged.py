"""peak_attention_paged: what score_layer_paged has not. test_paged.py has what both promise."""

import pytest
import torch

import claa_ops
from claa_ops import reference
from support.fakes import assert_refuses
from support.inputs import assert_same_bits, normal
from support.paged_ops import PEAKS
from support.pages import OUT_OF_RANGE, in_pages, keys_of_lengths, rejections, valid_call

peak_attention_paged = claa_ops.peak_attention_paged


@pytest.mark.parametrize(
    "shape",  # heads, kv_heads, queries, dim
    [
        pytest.param((32, 8, 8, 128), id="llama-8b"),
        pytest.param((32, 8, 128, 128), id="llama-8b-128"),
        pytest.param((9, 3, 64, 64), id="smollm2"),
        pytest.param((4, 1, 33, 256), id="dim-256"),
        pytest.param((8, 2, 9, 80), id="padding-rows"),
        pytest.param((8, 2, 8, 192), id="three-panels"),
        pytest.param((6, 2, 5, 33), id="unaligned"),
    ],
)
def test_long_prompts(shape, device):
    """Enough keys for several chunks of a block, for large output tiles and for small ones."""
    heads, kv_heads, queries, dim = shape
    lengths = [9000, 0, 333, 27_011] if device == "cuda" else [900, 0, 33, 2701]
    query = normal(4, queries, heads, dim, device=device, dtype=torch.bfloat16)
    keys = keys_of_lengths(lengths, kv_heads, dim, device=device, dtype=torch.bfloat16, seed=1)
    for size in (16, 64):
        running = PEAKS.running_for(lengths, queries, device=device) / 100
        paged = in_pages(keys, size)
        exact = device == "cpu" or dim % 8 == 0
        PEAKS.assert_is_each_prompt_alone(running, query, keys, paged, exact=exact)


@pytest.mark.parametrize("place", ["key", "query", "running"])
def test_nan_propagates(place, device):
    keys = keys_of_lengths([90, 40], 2, 16, device=device, dtype=torch.float32, seed=1)
    query, running = normal(2, 3, 4, 16, device=device), torch.zeros(2, 3, 90, device=device)
    {"key": keys[1][20, 1], "query": query[1, 2, 3], "running": running[1, 2]}[place][5] = torch.nan
    expected, paged = running.clone(), in_pages(keys, 16)
    peak_attention_paged(running, query, *paged)
    reference.peak_attention_paged(expected, query, *paged)
    assert expected.isnan().any() and not expected.isnan().all()
    assert torch.equal(running.isnan(), expected.isnan())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *rejections("T"),
        pytest.param(
            {"running": torch.zeros(1, 4, 32)}, "running must have R = 2 .*, got 1", id="prompts"
        ),
        pytest.param(
            {"running": torch.zeros(2, 3, 32)}, "running must have T = 4 .*, got 3", id="queries"
        ),
        pytest.param(
            {"running": torch.zeros(2, 4, 32).half()},
            "running must have dtype float32, got float16",
            id="running-dtype",
        ),
        pytest.param(
            {"running": torch.zeros(2, 32, 4).mT},
            r"running must be contiguous.*, got strides \[",
            id="running-strides",
        ),
    ],
)
def test_rejects(changes, message, device):
    call = valid_call(torch.zeros(2, 4, 32), changes, device)
    assert_refuses("peak_attention_paged", call, message, device)


def test_rows_may_lie_in_either_order(device):
    keys = keys_of_lengths([40, 20], 2, 16, device=device, dtype=torch.float32, seed=1)
    query, memory = normal(2, 3, 4, 16, device=device), torch.zeros(3, 2, 50, device=device)
    packed = torch.zeros(2, 3, 40, device=device)
    for running in (packed, memory.transpose(0, 1)[..., :40]):
        peak_attention_paged(running, query, *in_pages(keys, 16))
    assert_same_bits(memory.transpose(0, 1)[..., :40], packed)
    assert not memory[..., 40:].any()


@pytest.mark.parametrize("shape", [(1, 4, 32), (2, 1, 32)])
def test_rejects_rows_that_overlap(shape, device):
    running = torch.zeros(shape, device=device).expand(2, 4, 32)
    call = valid_call(torch.zeros(2, 4, 32), {}, device) | {"running": running}
    message = r"running must .*overlap, got strides \["
    assert_refuses("peak_attention_paged", call, message, device)


@pytest.mark.parametrize(("changes", "message"), OUT_OF_RANGE)
def test_the_cpu_rejects_what_is_out_of_range(changes, message):
    with pytest.raises(RuntimeError, match=f"^peak_attention_paged: {message}"):
        peak_attention_paged(**valid_call(torch.zeros(2, 4, 32), changes, "cpu"))
