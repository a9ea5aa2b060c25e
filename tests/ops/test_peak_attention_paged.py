"""peak_attention_paged: peak_attention of prompts of any lengths, with keys in pages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import claa_ops
from claa_ops import reference
from support.fakes import assert_refuses
from support.inputs import (
    FLOATS,
    assert_no_further,
    assert_same_bits,
    assert_same_bits_on_any_run,
    normal,
)
from support.pages import (
    LAYOUTS,
    OUT_OF_RANGE,
    as_dense,
    in_pages,
    keys_of_lengths,
    rejections,
    valid_call,
)

peak_attention_paged = claa_ops.peak_attention_paged

SIZES = [16, 32, 64, 128, 256]
E4M3 = torch.float8_e4m3fn


def peaks_for(lengths: list[int], queries: int, *, device: str, more: int = 0) -> Tensor:
    """Some entries above all peaks, some among them, some below; room for `more` tokens."""
    most = max(1, max(lengths) + more)
    return normal(len(lengths), queries, most, device=device, seed=9) / 50


def assert_is_each_prompt_alone(
    running: Tensor, query: Tensor, keys: list[Tensor], paged: tuple, *, exact: bool, **options
) -> None:
    """In the columns of each prompt what peak_attention gives; all others are untouched."""
    expected = running.clone()
    for row, (key, row_query) in enumerate(zip(keys, query, strict=True)):
        if len(key):
            columns = expected[row : row + 1, :, : len(key)]
            columns.copy_(
                claa_ops.peak_attention(
                    row_query.transpose(0, 1)[None],
                    as_dense(key),
                    running=columns.contiguous(),
                    **options,
                )
            )
    assert peak_attention_paged(running, query, *paged, **options) is None
    if exact:
        assert_same_bits(running, expected)
    else:
        torch.testing.assert_close(running, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_is_each_prompt_alone(dtype, size, layout, device):
    lengths = [0, 1, 7, size - 1, size, size + 1, 3 * size, 700 + size]
    query = normal(len(lengths), 8, 8, 64, device=device, dtype=dtype)
    keys = keys_of_lengths(lengths, 2, 64, device=device, dtype=dtype, seed=1)
    paged = in_pages(keys, size, layout=layout, capacity=2000)
    running = peaks_for(lengths, 8, device=device, more=100)
    assert_is_each_prompt_alone(running, query, keys, paged, exact=True)


@pytest.mark.parametrize(
    "shape",  # heads, kv_heads, queries, dim
    [
        pytest.param((32, 8, 8, 128), id="llama-8b"),
        pytest.param((32, 8, 128, 128), id="llama-8b-128"),
        pytest.param((9, 3, 64, 64), id="smollm2"),
        pytest.param((4, 1, 33, 256), id="dim-256"),
        pytest.param((8, 2, 9, 80), id="padding-rows"),
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
        running = peaks_for(lengths, queries, device=device) / 100
        paged = in_pages(keys, size)
        exact = device == "cpu" or dim % 8 == 0
        assert_is_each_prompt_alone(running, query, keys, paged, exact=exact)


@pytest.mark.parametrize("prompts", [1, 33, 300])
def test_many_prompts(prompts, device):
    """More than a warp has lanes, and more than one launch takes."""
    lengths = [(37 * r) % 211 for r in range(prompts - 1)] + [1500]
    query = normal(prompts, 8, 8, 128, device=device, dtype=torch.bfloat16)
    keys = keys_of_lengths(lengths, 2, 128, device=device, dtype=torch.bfloat16, seed=1)
    running = peaks_for(lengths, 8, device=device)
    assert_is_each_prompt_alone(running, query, keys, in_pages(keys, 16), exact=True)


@pytest.mark.parametrize("key_dtype", [None, E4M3], ids=["same", "e4m3"])
@pytest.mark.parametrize("scale", [None, 0.3, -0.1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_reference(dtype, scale, key_dtype, device):
    """Against float64, at most twice the error of eager PyTorch; e4m3 keys with their factor."""
    lengths = [500, 0, 77, 1030]
    query = normal(4, 8, 8, 128, device=device, dtype=dtype)
    keys = keys_of_lengths(lengths, 2, 128, device=device, dtype=key_dtype or dtype, seed=1)
    paged = in_pages(keys, 16)
    options = {"scale": scale}
    if key_dtype:
        options["k_scale"] = torch.tensor([0.5], device=device)
    actual, eager = (peaks_for(lengths, 8, device=device) for _ in range(2))
    exact = eager.double()
    peak_attention_paged(actual, query, *paged, **options)
    reference.peak_attention_paged(eager, query, *paged, **options)
    exact_pages = paged.key_pages if key_dtype else paged.key_pages.double()
    reference.peak_attention_paged(exact, query.double(), exact_pages, *paged[1:], **options)
    assert_no_further(actual, eager, exact)


def test_rows_of_a_larger_table(device):
    """The prompts that end in a step are some of the engine's requests, in any order."""
    lengths = [40, 300, 0, 90]
    keys = keys_of_lengths(lengths, 2, 64, device=device, dtype=torch.bfloat16, seed=1)
    key_pages, table, all_lengths = in_pages(keys, 16)
    query = normal(4, 8, 4, 64, device=device, dtype=torch.bfloat16)
    rows = torch.tensor([3, 1], dtype=torch.int32, device=device)
    running = torch.zeros(2, 8, 300, device=device)
    peak_attention_paged(
        running, query[rows], key_pages, table, all_lengths[rows.long()].contiguous(), rows=rows
    )
    expected = torch.zeros(4, 8, 300, device=device)
    peak_attention_paged(expected, query, key_pages, table, all_lengths)
    assert_same_bits(running, expected[rows])


def test_padding_rows_may_hold_anything(device):
    """A row of a padded batch: length 0, no pages, NaN queries, NaN in running."""
    keys = keys_of_lengths([60, 0], 2, 64, device=device, dtype=torch.float16, seed=1)
    query = normal(2, 8, 4, 64, device=device, dtype=torch.float16)
    query[1] = torch.nan
    running = torch.tensor([0.0, torch.nan], device=device)[:, None, None].repeat(1, 8, 100)
    peak_attention_paged(running, query, *in_pages(keys, 16))
    assert running[0, :, :60].gt(0).all() and running[0, :, 60:].eq(0).all()
    assert running[1].isnan().all()


def test_no_prompts_no_pages_no_room(device):
    query = normal(2, 8, 4, 16, device=device)
    paged = in_pages(keys_of_lengths([0, 0], 2, 16, device=device, dtype=torch.float32, seed=1), 16)
    running = torch.ones(2, 8, 5, device=device)
    empty = paged.key_pages[:0], paged.block_table[:, :0], paged.lengths
    for tensors in (paged, empty):
        peak_attention_paged(running, query, *tensors)
        peak_attention_paged(running[..., :0], query, *tensors)
    peak_attention_paged(running[:0], query[:0], paged.key_pages, *(x[:0] for x in paged[1:]))
    assert running.eq(1).all()


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


def test_runs_and_threads_agree_bit_for_bit(device):
    lengths = [2100, 1, 900]
    query = normal(3, 8, 6, 64, device=device)
    keys = keys_of_lengths(lengths, 3, 64, device=device, dtype=torch.float32, seed=1)
    paged = in_pages(keys, 16)

    def call() -> Tensor:
        running = peaks_for(lengths, 8, device=device)
        peak_attention_paged(running, query, *paged)
        return running

    assert_same_bits_on_any_run(call)


@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    queries=st.integers(1, 12),
    dim=st.sampled_from([8, 40, 64, 128]),
    size=st.sampled_from(SIZES),
    layout=st.sampled_from([param.values[0] for param in LAYOUTS]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    more=st.integers(0, 100),
    seed=st.integers(0, 2**16),
)
def test_any_lengths_in_any_pages(
    lengths, kv_heads, group, queries, dim, size, layout, dtype, more, seed, device
):
    """Neither other prompts, nor pages, nor the room for longer ones change a bit."""
    query = normal(len(lengths), queries, kv_heads * group, dim, device=device, dtype=dtype)
    keys = keys_of_lengths(lengths, kv_heads, dim, device=device, dtype=dtype, seed=seed)
    paged = in_pages(keys, size, layout=layout, capacity=max(lengths) + more, seed=seed)
    running = peaks_for(lengths, queries, device=device, more=more)
    assert_is_each_prompt_alone(running, query, keys, paged, exact=True)


def test_a_captured_graph_replays_on_other_lengths(device):
    if device != "cuda":
        pytest.skip("needs a GPU")
    query = normal(3, 8, 8, 128, device=device, dtype=torch.bfloat16)
    paged = in_pages(
        keys_of_lengths([4000] * 3, 2, 128, device=device, dtype=torch.bfloat16, seed=1), 16
    )
    running = torch.zeros(3, 8, 4000, device=device)
    graph = torch.cuda.CUDAGraph()
    peak_attention_paged(running, query, *paged)
    with torch.cuda.graph(graph):
        peak_attention_paged(running, query, *paged)
    for lengths in ([4000, 17, 0], [8, 9, 3999], [0, 0, 0]):
        paged.lengths.copy_(torch.tensor(lengths))
        running.zero_()
        graph.replay()
        expected = torch.zeros_like(running)
        peak_attention_paged(expected, query, *paged)
        assert_same_bits(running, expected)
        assert running[:, 0].gt(0).sum(1).tolist() == lengths


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
    assert_refuses("peak_attention_paged", call, message)


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
    assert_refuses("peak_attention_paged", call, message)


@pytest.mark.parametrize(("changes", "message"), OUT_OF_RANGE)
def test_the_cpu_rejects_what_is_out_of_range(changes, message):
    with pytest.raises(RuntimeError, match=f"^peak_attention_paged: {message}"):
        peak_attention_paged(**valid_call(torch.zeros(2, 4, 32), changes, "cpu"))
