"""What score_layer_paged and peak_attention_paged promise alike; their own files have the rest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.inputs import (
    FLOATS,
    assert_no_further,
    assert_same_bits,
    assert_same_bits_on_any_run,
    normal,
)
from support.paged_ops import PAGED_OPS
from support.pages import LAYOUTS, in_pages, keys_of_lengths

SIZES = [16, 32, 64, 128, 256]
E4M3 = torch.float8_e4m3fn

pytestmark = pytest.mark.parametrize("op", PAGED_OPS)


def edges(window: int, size: int) -> list[int]:
    """Lengths at which something begins or ends."""
    near = [0, 1, window - 1, window, window + 1, window + 2]
    return near + [size - 1, size, size + 1, 3 * size, 5 * size + window, 700 + size]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_is_each_prompt_alone(op, dtype, size, layout, device):
    lengths = edges(8, size)
    query = normal(len(lengths), 8, 8, 64, device=device, dtype=dtype)
    keys = keys_of_lengths(lengths, 2, 64, device=device, dtype=dtype, seed=1)
    paged = in_pages(keys, size, layout=layout, capacity=2000)
    running = op.running_for(lengths, 8, device=device, more=100)
    op.assert_is_each_prompt_alone(running, query, keys, paged)


@pytest.mark.parametrize("prompts", [1, 33, 300])
def test_many_prompts(op, prompts, device):
    """More than a warp has lanes, and more than one launch takes."""
    lengths = [(37 * r) % 211 for r in range(prompts - 1)] + [1500]
    query = normal(prompts, 8, 8, 128, device=device, dtype=torch.bfloat16)
    keys = keys_of_lengths(lengths, 2, 128, device=device, dtype=torch.bfloat16, seed=1)
    running = op.running_for(lengths, 8, device=device)
    op.assert_is_each_prompt_alone(running, query, keys, in_pages(keys, 16))


@pytest.mark.parametrize("key_dtype", [None, E4M3], ids=["same", "e4m3"])
@pytest.mark.parametrize("scale", [None, 0.3, -0.1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_reference(op, dtype, scale, key_dtype, device):
    """Against float64, at most twice the error of eager PyTorch; e4m3 keys with their factor."""
    lengths = [500, 0, 77, 1030]
    query = normal(4, 8, 8, 128, device=device, dtype=dtype)
    keys = keys_of_lengths(lengths, 2, 128, device=device, dtype=key_dtype or dtype, seed=1)
    paged = in_pages(keys, 16)
    options = {"scale": scale}
    if key_dtype:
        options["k_scale"] = torch.tensor([0.5], device=device)
    actual, eager = (op.running_for(lengths, 8, device=device) for _ in range(2))
    exact = eager.double()
    op.call(actual, query, *paged, **options)
    op.eager(eager, query, *paged, **options)
    exact_pages = paged.key_pages if key_dtype else paged.key_pages.double()
    op.eager(exact, query.double(), exact_pages, *paged[1:], **options)
    assert_no_further(actual, eager, exact)


def test_rows_of_a_larger_table(op, device):
    """The prompts that end in a step are some of the engine's requests, in any order."""
    lengths = [40, 300, 0, 90]
    keys = keys_of_lengths(lengths, 2, 64, device=device, dtype=torch.bfloat16, seed=1)
    key_pages, table, all_lengths = in_pages(keys, 16)
    query = normal(4, 8, 4, 64, device=device, dtype=torch.bfloat16)
    rows = torch.tensor([3, 1], dtype=torch.int32, device=device)
    running = op.zeros(2, 8, 300, device=device)
    op.call(
        running, query[rows], key_pages, table, all_lengths[rows.long()].contiguous(), rows=rows
    )
    expected = op.zeros(4, 8, 300, device=device)
    op.call(expected, query, key_pages, table, all_lengths)
    assert_same_bits(running, expected[rows])


def test_padding_rows_may_hold_anything(op, device):
    """A row of a padded batch: length 0, no pages, NaN queries, NaN in running."""
    keys = keys_of_lengths([60, 0], 2, 64, device=device, dtype=torch.float16, seed=1)
    query = normal(2, 8, 4, 64, device=device, dtype=torch.float16)
    query[1] = torch.nan
    running = op.zeros(2, 8, 100, device=device)
    running[1] = torch.nan
    op.call(running, query, *in_pages(keys, 16))
    columns = op.columns(60, 8)
    assert running[0, ..., :columns].gt(0).all() and running[0, ..., columns:].eq(0).all()
    assert running[1].isnan().all()


def test_no_prompts_no_pages_no_room(op, device):
    query = normal(2, 8, 4, 16, device=device)
    paged = in_pages(keys_of_lengths([0, 0], 2, 16, device=device, dtype=torch.float32, seed=1), 16)
    running = op.zeros(2, 8, 13, device=device) + 1
    empty = paged.key_pages[:0], paged.block_table[:, :0], paged.lengths
    for tensors in (paged, empty):
        op.call(running, query, *tensors)
        op.call(running[..., :0], query, *tensors)
    op.call(running[:0], query[:0], paged.key_pages, *(x[:0] for x in paged[1:]))
    assert running.eq(1).all()


def test_runs_and_threads_agree_bit_for_bit(op, device):
    lengths = [2100, 1, 900]
    query = normal(3, 8, 6, 64, device=device)
    keys = keys_of_lengths(lengths, 3, 64, device=device, dtype=torch.float32, seed=1)
    paged = in_pages(keys, 16)

    def call() -> Tensor:
        running = op.running_for(lengths, 8, device=device)
        op.call(running, query, *paged)
        return running

    assert_same_bits_on_any_run(call)


@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    queries=st.integers(1, 12),
    dim=st.sampled_from([8, 40, 64, 96, 128, 192]),
    size=st.sampled_from(SIZES),
    layout=st.sampled_from([param.values[0] for param in LAYOUTS]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    more=st.integers(0, 100),
    seed=st.integers(0, 2**16),
)
def test_any_lengths_in_any_pages(
    op, lengths, kv_heads, group, queries, dim, size, layout, dtype, more, seed, device
):
    """Neither other prompts, nor pages, nor the room for longer ones change a bit."""
    query = normal(len(lengths), queries, kv_heads * group, dim, device=device, dtype=dtype)
    keys = keys_of_lengths(lengths, kv_heads, dim, device=device, dtype=dtype, seed=seed)
    paged = in_pages(keys, size, layout=layout, capacity=max(lengths) + more, seed=seed)
    running = op.running_for(lengths, queries, device=device, more=more)
    op.assert_is_each_prompt_alone(running, query, keys, paged)


def test_a_captured_graph_replays_on_other_lengths(op, device):
    if device != "cuda":
        pytest.skip("needs a GPU")
    query = normal(3, 8, 8, 128, device=device, dtype=torch.bfloat16)
    paged = in_pages(
        keys_of_lengths([4000] * 3, 2, 128, device=device, dtype=torch.bfloat16, seed=1), 16
    )
    running = op.zeros(3, 8, 4000, device=device)
    graph = torch.cuda.CUDAGraph()
    op.call(running, query, *paged)
    with torch.cuda.graph(graph):
        op.call(running, query, *paged)
    for lengths in ([4000, 17, 0], [8, 9, 3999], [0, 0, 0]):
        paged.lengths.copy_(torch.tensor(lengths))
        running.zero_()
        graph.replay()
        expected = torch.zeros_like(running)
        op.call(expected, query, *paged)
        assert_same_bits(running, expected)
        updated = running.gt(0).flatten(1, -2).any(1) if op.by_query else running.gt(0)
        assert updated.sum(1).tolist() == [max(0, op.columns(n, 8)) for n in lengths]
