"""pool_heads: smooth each head over neighbouring tokens, add the heads of a group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import claa_ops
from claa_ops import reference
from support.fakes import assert_refuses
from support.inputs import (
    AWKWARD,
    NANS,
    assert_as_exact_as_eager,
    assert_same_bits,
    assert_same_bits_on_any_run,
    chosen_from,
    normal,
    vector_key,
    vector_query,
)

pool_heads = claa_ops.pool_heads

SHAPES = [  # batch, heads, kv_heads, context
    pytest.param((1, 1, 1, 1), id="one-element"),
    pytest.param((2, 6, 2, 257), id="odd-sizes"),
    pytest.param((1, 9, 3, 2047), id="smollm2"),
    pytest.param((1, 32, 8, 4096), id="llama-8b"),
    pytest.param((2, 4, 4, 100), id="one-head-each"),
    pytest.param((2, 4, 2, 0), id="empty-context"),
    pytest.param((0, 4, 2, 50), id="empty-batch"),
]
MODES = ["avg", "max"]
KERNEL_SIZES = [1, 3, 7, 63, 201]


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, pool_mode, device):
    batch, heads, kv_heads, context = shape
    scores = normal(batch, heads, context, device=device)
    assert_as_exact_as_eager("pool_heads", scores, kv_heads, pool_mode=pool_mode)


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
@pytest.mark.parametrize("context", [1, 2, 5, 62, 100, 1500])
def test_any_kernel_size(context, kernel_size, pool_mode, device):
    """Including a kernel that is wider than the context."""
    scores = normal(2, 4, context, device=device)
    assert_as_exact_as_eager("pool_heads", scores, 2, kernel_size=kernel_size, pool_mode=pool_mode)


def test_average_counts_the_zeros_outside(device):
    edge = torch.tensor([4, 5, 6, 7, 7, 7, 7, 6, 5, 4], device=device) / 7
    actual = pool_heads(torch.ones(1, 1, 10, device=device), 1)
    torch.testing.assert_close(actual[0, 0], edge)


def test_maximum_ignores_what_is_outside(device):
    scores = torch.tensor([[[-5.0, -4.0, -3.0]]], device=device)
    assert pool_heads(scores, 1, kernel_size=3, pool_mode="max").tolist() == [[[-4.0, -3.0, -3.0]]]


@pytest.mark.parametrize("pool_mode", MODES)
def test_reads_strided_scores(pool_mode, device):
    wide = normal(2, 8, 96, device=device)
    for strided in (
        wide[:, ::2, :65],
        wide.transpose(0, 1)[::2, :, 3:],
        wide[:1, :1].expand(3, 4, 96),
    ):
        expected = pool_heads(strided.contiguous(), 2, pool_mode=pool_mode)
        assert_same_bits(pool_heads(strided, 2, pool_mode=pool_mode), expected)


def test_check_values(device):
    expected = [0.183776, 0.270113, 0.271431, 0.28282, 0.286187, 0.27539]
    expected += [0.273578, 0.281203, 0.282571, 0.275091, 0.27872, 0.19129]
    query, key = vector_query(0, 12, 15).to(device), vector_key(0).to(device)
    scores = claa_ops.score_window(query, key)
    actual = pool_heads(scores, 4, kernel_size=3)[0, 0]
    torch.testing.assert_close(actual.tolist(), expected, rtol=0, atol=2e-6)


SIZES = {
    "batch": st.integers(1, 3),
    "kv_heads": st.integers(1, 4),
    "group": st.integers(1, 5),
    "context": st.integers(0, 70),
    "seed": st.integers(0, 2**16),
}


@given(kernel_size=st.sampled_from([1, 3, 7, 31]), **SIZES)
def test_adding_in_two_steps_is_adding_in_one(
    batch, kv_heads, group, context, seed, kernel_size, device
):
    """Pool per head, then H -> 2G -> G is H -> G at once; exact on small integers."""
    heads = 2 * kv_heads * group
    scores = normal(batch, heads, context, device=device, seed=seed).mul(30).round()
    once = pool_heads(scores, kv_heads, kernel_size=kernel_size, pool_mode="max")
    pooled = pool_heads(scores, heads, kernel_size=kernel_size, pool_mode="max")
    halfway = pool_heads(pooled, 2 * kv_heads, kernel_size=1)
    assert torch.equal(pool_heads(halfway, kv_heads, kernel_size=1), once)


@given(kernel_size=st.sampled_from([1, 3, 7, 31]), **SIZES)
def test_averaging_commutes_with_adding_heads(
    batch, kv_heads, group, context, seed, kernel_size, device
):
    scores = normal(batch, kv_heads * group, context, device=device, seed=seed).abs()
    added = pool_heads(scores, kv_heads, kernel_size=1)
    expected = pool_heads(added, kv_heads, kernel_size=kernel_size)
    torch.testing.assert_close(
        pool_heads(scores, kv_heads, kernel_size=kernel_size), expected, rtol=3e-6, atol=1e-6
    )


@given(pool_mode=st.sampled_from(MODES), **SIZES)
def test_a_row_does_not_know_its_batch(batch, kv_heads, group, context, seed, pool_mode, device):
    scores = normal(batch, kv_heads * group, context, device=device, seed=seed)
    together = pool_heads(scores, kv_heads, pool_mode=pool_mode)
    for b in range(batch):
        assert_same_bits(
            together[b : b + 1], pool_heads(scores[b : b + 1], kv_heads, pool_mode=pool_mode)
        )


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@given(seed=st.integers(0, 2**16), context=st.integers(1, 40))
def test_maximum_of_awkward_values(kernel_size, seed, context, device):
    """NaN wins, infinity stays; one head in a group, so nothing is added."""
    scores = chosen_from(AWKWARD + NANS, 2, 3, context, device=device, seed=seed)
    actual = pool_heads(scores, 3, kernel_size=kernel_size, pool_mode="max")
    expected = reference.pool_heads(scores, 3, kernel_size=kernel_size, pool_mode="max")
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_value_spoils_its_neighbours_only(bad, device):
    """A running sum would carry it to the end of the row."""
    scores = torch.ones(1, 2, 50, device=device)
    scores[0, 1, 20] = bad
    expected = reference.pool_heads(scores, 1)
    torch.testing.assert_close(pool_heads(scores, 1), expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("pool_mode", MODES)
def test_runs_and_threads_agree_bit_for_bit(pool_mode, device):
    scores = normal(2, 8, 20_001, device=device)
    assert_same_bits_on_any_run(lambda: pool_heads(scores, 2, pool_mode=pool_mode))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"scores": torch.zeros(8, 5)}, r"scores must .*, got \[8, 5\]", id="rank"),
        pytest.param(
            {"scores": torch.zeros(1, 8, 5).bfloat16()},
            "scores must have dtype float32, got bfloat16",
            id="dtype",
        ),
        pytest.param(
            {"scores": torch.zeros(1, 5, 8).mT},
            r"scores must be contiguous.*, got strides \[",
            id="strides",
        ),
        pytest.param({"num_kv_heads": 3}, "num_kv_heads must divide H = 8, got 3", id="group"),
        pytest.param({"num_kv_heads": 0}, "num_kv_heads must .*, got 0", id="no-kv-heads"),
        pytest.param({"num_kv_heads": -2}, "num_kv_heads must .*, got -2", id="negative-heads"),
        pytest.param({"kernel_size": 4}, "kernel_size must .*odd.*, got 4", id="even-kernel"),
        pytest.param({"kernel_size": 0}, "kernel_size must .*, got 0", id="no-kernel"),
        pytest.param({"kernel_size": -3}, "kernel_size must .*, got -3", id="negative-kernel"),
    ],
)
def test_rejects(changes, message, device):
    call = {"scores": torch.zeros(1, 8, 5), "num_kv_heads": 2} | changes
    assert_refuses("pool_heads", call, message, device)


def test_rejects_an_unknown_mode(device):
    with pytest.raises(ValueError, match="pool_mode must be one of avg, max; got 'sum'"):
        pool_heads(torch.zeros(1, 2, 5, device=device), 1, pool_mode="sum")


def test_says_what_could_not_be_allocated(device):
    """A petabyte of results from a few megabytes of scores."""
    scores = torch.zeros(1, 1, 2**20, device=device).expand(2**28, 1, 2**20)
    with pytest.raises(RuntimeError, match=r"could not allocate .* \[268435456, 1, 1048576\]"):
        pool_heads(scores, 1)
