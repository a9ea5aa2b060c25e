"""rank_variance: how much the ranks of the important tokens change between layers."""

import statistics

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
    assert_same_bits,
    assert_same_bits_on_any_run,
    chosen_from,
    normal,
    vector_key,
    vector_query,
)

rank_variance = claa_ops.rank_variance

SHAPES = [  # layers, batch, context, k
    pytest.param((1, 1, 1, 1), id="one-element"),
    pytest.param((3, 2, 257, 40), id="odd-sizes"),
    pytest.param((8, 1, 2047, 204), id="smollm2"),
    pytest.param((8, 2, 4096, 2048), id="llama-8b"),
    pytest.param((3, 2, 100, 100), id="keep-all"),
    pytest.param((3, 2, 100, 0), id="keep-none"),
    pytest.param((3, 2, 0, 0), id="empty-context"),
    pytest.param((3, 0, 10, 4), id="empty-batch"),
    pytest.param((2, 1, 70_001, 7000), id="long"),
]


def check(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Ranks are exact; their variance is rounded once to float32, twice at most."""
    actual = rank_variance(scores, k)
    # On the CPU: torch sorts a NaN with the sign bit last on CUDA.
    expected = reference.rank_variance(scores.double().cpu(), k).to(scores.device)
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, rtol=2e-7, atol=0)
    return actual


# The reference takes the variance of an empty tensor where there are no tokens.
@pytest.mark.filterwarnings("ignore:var\\(\\). degrees of freedom")
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, device):
    layers, batch, context, k = shape
    check(normal(layers, batch, context, device=device), k)


@pytest.mark.parametrize(
    "values", [(0.0,), (0.0, 1.0), AWKWARD + NANS], ids=["one", "two", "awkward"]
)
@pytest.mark.parametrize("k", [1, 20, 299])
def test_a_tie_ranks_by_position(k, values, device):
    check(chosen_from(values, 4, 2, 300, device=device, seed=k), k)


def test_reads_strided_scores(device):
    wide = normal(6, 4, 90, device=device)
    for scores in (wide[::2, 1::2, 5:70], wide.transpose(0, 1), wide[:, :1].expand(6, 3, 90)):
        assert_same_bits(rank_variance(scores, 20), rank_variance(scores.contiguous(), 20))
        check(scores, 20)


def test_check_values(device):
    """ASL's variance at its first two layers, and their ratio."""
    layers = torch.stack(
        [
            claa_ops.score_tokens(
                vector_query(layer, 12, 15).to(device), vector_key(layer).to(device), kernel_size=3
            ).sum(dim=1)
            for layer in range(3)
        ]
    )
    first, second = (rank_variance(layers[i : i + 2], 4).item() for i in (0, 1))
    assert first == pytest.approx(0.95, rel=1e-6)
    assert second == pytest.approx(3.333333, rel=1e-6)
    assert second / first == pytest.approx(3.508772, rel=1e-6)


SIZES = {
    "layers": st.integers(1, 5),
    "batch": st.integers(1, 3),
    "context": st.integers(1, 60),
    "seed": st.integers(0, 2**16),
    "data": st.data(),
}


@given(**SIZES)
def test_is_zero_where_all_layers_agree(layers, batch, context, seed, data, device):
    one = chosen_from(AWKWARD + NANS, 1, batch, context, device=device, seed=seed)
    k = data.draw(st.integers(0, context), label="k")
    assert not rank_variance(one.expand(layers, batch, context), k).any()


@given(**SIZES)
def test_is_its_plain_definition(layers, batch, context, seed, data, device):
    """Token by token in Python, without the reference."""
    scores = normal(layers, batch, context, device=device, seed=seed).round(decimals=1)
    k = data.draw(st.integers(0, context), label="k")
    actual = rank_variance(scores, k).tolist()
    for b in range(batch):
        ranks = []
        for layer in scores[:, b].tolist():
            order = sorted(range(context), key=lambda p: (-layer[p], p))
            ranks.append([1 + order.index(p) for p in range(context)])
        taken = [of_token for of_token in zip(*ranks, strict=True) if min(of_token) <= k]
        expected = statistics.fmean(map(statistics.pvariance, taken)) if taken else 0.0
        assert actual[b] == pytest.approx(expected, rel=1e-6)


@given(order=st.permutations(range(4)), seed=st.integers(0, 2**16), k=st.integers(0, 50))
def test_only_the_order_of_scores_counts(order, seed, k, device):
    """Neither their size nor the order of the layers."""
    scores = normal(4, 2, 50, device=device, seed=seed)
    expected = rank_variance(scores, k)
    assert_same_bits(rank_variance(scores * 8, k), expected)
    torch.testing.assert_close(rank_variance(scores[order], k), expected, rtol=2e-7, atol=0)


@given(**SIZES)
def test_a_row_does_not_know_its_batch(layers, batch, context, seed, data, device):
    scores = normal(layers, batch, context, device=device, seed=seed)
    k = data.draw(st.integers(0, context), label="k")
    together = rank_variance(scores, k)
    for b in range(batch):
        assert_same_bits(together[b : b + 1], rank_variance(scores[:, b : b + 1], k))


def test_runs_and_threads_agree_bit_for_bit(device):
    scores = normal(6, 2, 20_001, device=device)
    assert_same_bits_on_any_run(lambda: rank_variance(scores, 2000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"scores": torch.zeros(2, 9)}, r"scores must .*, got \[2, 9\]", id="rank"),
        pytest.param(
            {"scores": torch.zeros(3, 2, 9).half()},
            "scores must have dtype float32, got float16",
            id="dtype",
        ),
        pytest.param(
            {"scores": torch.zeros(3, 9, 2).mT},
            r"scores must be contiguous.*, got strides \[18, 1, 2\]",
            id="strides",
        ),
        pytest.param({"k": 10}, r"k must be in \[0, M\] = \[0, 9\], got 10", id="k-too-large"),
        pytest.param({"k": -1}, r"k must be in \[0, .*, got -1", id="k-negative"),
    ],
)
def test_rejects(changes, message, device):
    call = {"scores": torch.zeros(3, 2, 9), "k": 4} | changes
    assert_refuses("rank_variance", call, message, device)
