"""select_topk_packed: what select_topk keeps of each prompt alone, one prompt after the other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import claa_ops
from claa_ops import reference
from support.fakes import assert_refuses
from support.inputs import (
    AWKWARD,
    INDEX_TYPES,
    NANS,
    assert_same_bits_on_any_run,
    chosen_from,
    normal,
)
from support.packed import requests, starts_of

select_topk, select_topk_packed = claa_ops.select_topk, claa_ops.select_topk_packed

CASES = [  # lengths, kept, window
    pytest.param([1], [1], 0, id="one-token"),
    pytest.param([257, 31, 190], [40, 3, 190], 5, id="odd-sizes"),
    pytest.param([4096], [409], 8, id="llama-8b"),
    pytest.param([300, 8, 3, 0, 9], [30, 8, 3, 0, 2], 8, id="at-and-below-the-window"),
    pytest.param([300, 200], [0, 20], 8, id="one-keeps-none"),
    pytest.param([0, 0], [0, 0], 8, id="no-tokens"),
    pytest.param([20] * 200, [7] * 200, 2, id="many-short"),
    # On CUDA a row is read by one block, or shared by several: both sides of each limit.
    pytest.param([8189, 5, 4000], [800, 2, 4000], 8, id="one-block-full"),
    pytest.param([8200, 100], [800, 30], 8, id="small-cluster"),
    pytest.param([131_069, 500, 70_000], [13_000, 50, 35_000], 8, id="large-cluster-full"),
    pytest.param([131_100, 9000, 8], [13_000, 900, 8], 8, id="blocks-that-meet-in-memory"),
]


def select(
    scores: Tensor, lengths: list[int], counts: list[int], *, capacity: int | None = None, **options
) -> Tensor:
    """The op on memory that holds something else."""
    starts = starts_of(counts, str(scores.device))
    index = torch.full((sum(counts) if capacity is None else capacity,), 77, dtype=torch.int32)
    index = index.to(scores.device)
    select_topk_packed(index, scores, torch.tensor(lengths).to(starts), starts, **options)
    return index


def alone(scores: Tensor, lengths: list[int], counts: list[int], *, window: int, **options):
    """Each prompt by the dense op."""
    kept = []
    for row, length, count in zip(scores, lengths, counts, strict=True):
        in_window = min(window, length)
        scored = row[: length - in_window]
        kept.append(select_topk(scored, count, window=in_window, int32=True, **options))
    return torch.cat(kept)


def longest(lengths: list[int], window: int) -> int:
    return max(0, *(length - window for length in lengths))


@pytest.mark.parametrize(("lengths", "counts", "window"), CASES)
def test_is_the_dense_op_on_each_prompt(lengths, counts, window, device):
    scores = normal(len(lengths), longest(lengths, window) + 3, device=device)
    index = select(scores, lengths, counts, window=window, num_sinks=2, capacity=sum(counts) + 70)
    kept = alone(scores, lengths, counts, window=window, num_sinks=2)
    assert torch.equal(index[: len(kept)], kept)
    assert (index[len(kept) :] == -1).all()


@pytest.mark.parametrize("index_type", INDEX_TYPES)
@pytest.mark.parametrize(("lengths", "counts", "window"), CASES)
def test_matches_reference(lengths, counts, window, index_type, device):
    scores = normal(len(lengths), longest(lengths, window), device=device).round(decimals=1)
    actual, expected = (torch.zeros(sum(counts) + 3, dtype=torch.int32) for _ in range(2))
    actual = actual.to(device)
    integers = torch.tensor(lengths).to(index_type), starts_of(counts, "cpu", index_type)
    select_topk_packed(actual, scores, *(x.to(device) for x in integers), window=window)
    reference.select_topk_packed(expected, scores.cpu(), *integers, window=window)
    assert torch.equal(actual.cpu(), expected)


@given(
    drawn=requests(longest=60),
    window=st.integers(0, 8),
    num_sinks=st.integers(0, 6),
    unused=st.integers(0, 9),
    seed=st.integers(0, 2**16),
)
def test_any_lengths_ties_and_capacity(drawn, window, num_sinks, unused, seed, device):
    """What is beyond a prompt's own tokens is not read: NaN would be kept first."""
    lengths, counts = drawn
    context = longest(lengths, window)
    scores = chosen_from(AWKWARD + NANS, len(lengths), context + 2, device=device, seed=seed)
    options = {"window": window, "num_sinks": num_sinks}
    kept = alone(scores, lengths, counts, **options)
    for row, length in zip(scores, lengths, strict=True):
        row[max(0, length - window) :] = torch.nan
    index = select(scores, lengths, counts, capacity=len(kept) + unused, **options)
    assert torch.equal(index[: len(kept)], kept)
    assert (index[len(kept) :] == -1).all()


def test_infinity_protects_a_token(device):
    """However many there are; if too many, the lower positions."""
    scores = torch.rand(2, 50, device=device)
    scores[0, 10:40] = torch.inf
    scores[1, [3, 49]] = torch.inf
    index = select(scores, [52, 52], [20, 5], window=2)
    assert index[:20].tolist() == [*range(10, 28), 50, 51]
    assert {3, 49, 50, 51} < set(index[20:].tolist())


def test_more_than_a_prompt_has(device):
    index = select(torch.rand(2, 5, device=device), [3, 7], [5, 8], window=2)
    assert index.tolist() == [-1, -1, 0, 1, 2, -1, *range(7)]


def test_lengths_and_limits_out_of_range_are_the_nearest_in_range(device):
    scores = normal(3, 20, device=device)
    index = torch.full((8,), 77, dtype=torch.int32, device=device)
    lengths = torch.tensor([-4, 1000, 10], device=device)
    starts = torch.tensor([-2, 0, 6, 99], device=device)
    select_topk_packed(index, scores, lengths, starts, window=2)
    assert torch.equal(index, alone(scores, [0, 22, 10], [0, 6, 2], window=2))
    select_topk_packed(index, scores, lengths, starts.flip(0), window=2)
    assert (index == -1).all()


def test_no_requests(device):
    index = select(torch.zeros(0, 9, device=device), [], [], capacity=5, window=2)
    assert index.tolist() == [-1] * 5


def test_writes_into_a_part_of_a_buffer(device):
    buffer = torch.full((9,), 77, dtype=torch.int32, device=device)
    lengths, starts = torch.tensor([4], device=device), torch.tensor([0, 2], device=device)
    select_topk_packed(buffer[3:6], torch.rand(1, 4, device=device), lengths, starts, window=2)
    assert buffer.tolist() == [77] * 3 + [2, 3, -1] + [77] * 3


@given(drawn=requests(longest=200), seed=st.integers(0, 2**16), data=st.data())
def test_a_request_does_not_know_the_others(drawn, seed, data, device):
    lengths, counts = drawn
    scores = normal(len(lengths), 200, device=device, seed=seed).round()
    r = data.draw(st.integers(0, len(lengths) - 1), label="request")
    together = select(scores, lengths, counts, window=3)
    begin = sum(counts[:r])
    by_itself = select(scores[r : r + 1], lengths[r : r + 1], counts[r : r + 1], window=3)
    assert torch.equal(together[begin : begin + counts[r]], by_itself)


def test_runs_and_threads_agree_bit_for_bit(device):
    lengths, counts = [30_001, 700, 12_000], [3000, 70, 6000]
    scores = normal(3, 30_001, device=device).round(decimals=2)
    assert_same_bits_on_any_run(lambda: select(scores, lengths, counts, window=8, num_sinks=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": torch.zeros(2, 2).int()}, r"index must have shape \[k\], got \[2, 2\]"),
        ({"index": torch.zeros(4).long()}, "index must have dtype int32, got int64"),
        ({"index": torch.zeros(8).int()[::2]}, r"index must be contiguous.*, got strides \[2\]"),
        ({"scores": torch.zeros(9)}, r"scores must have shape \[R, M\], got \[9\]"),
        ({"scores": torch.zeros(2, 9).double()}, "scores must have dtype float32, got float64"),
        ({"scores": torch.zeros(9, 2).T}, r"scores must be contiguous.*, got strides \[1, 2\]"),
        ({"lengths": torch.zeros(3).int()}, r"lengths must have R = 2 like scores, got 3 in \[3\]"),
        ({"lengths": torch.zeros(2)}, "lengths must have dtype int64 or int32, got float32"),
        ({"lengths": torch.zeros(2, 1).int()}, r"lengths must have shape \[R\], got \[2, 1\]"),
        ({"starts": torch.zeros(2).int()}, r"starts must have R \+ 1 = 3 like scores, got 2"),
        ({"starts": torch.zeros(3)}, "starts must have dtype int64 or int32, got float32"),
        ({"window": -1}, "window must not be negative, got -1"),
        ({"num_sinks": -1}, "num_sinks must not be negative, got -1"),
    ],
)
def test_rejects(changes, message, device):
    call = {
        "index": torch.zeros(4).int(),
        "scores": torch.zeros(2, 9),
        "lengths": torch.zeros(2).int(),
        "starts": torch.zeros(3).int(),
        "window": 2,
    } | changes
    assert_refuses("select_topk_packed", call, message, device)
