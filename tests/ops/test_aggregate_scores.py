"""aggregate_scores: running maximum over layers and heads."""

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

aggregate_scores = claa_ops.aggregate_scores

SHAPES = [  # of scores; running has no heads
    pytest.param((1, 1), id="one-element"),
    pytest.param((3, 257), id="odd-sizes"),
    pytest.param((2, 3, 257), id="heads-apart"),
    pytest.param((1, 3, 2047), id="smollm2"),
    pytest.param((1, 8, 4096), id="llama-8b"),
    pytest.param((2, 1, 70), id="one-head"),
    pytest.param((2, 0), id="empty-context"),
    pytest.param((2, 4, 0), id="empty-context-heads-apart"),
    pytest.param((0, 4, 9), id="empty-batch"),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, device):
    """A maximum does not round: the result is exact."""
    scores = normal(*shape, device=device)
    running = normal(shape[0], shape[-1], device=device, seed=1)
    before = running.clone()
    actual = aggregate_scores(running, scores)
    assert_same_bits(actual, reference.aggregate_scores(running, scores))
    assert actual.is_contiguous()
    assert torch.equal(running, before), "the op returns a new tensor"


def test_reads_strided_arguments(device):
    wide = normal(4, 6, 90, device=device)
    running = normal(4, 90, device=device, seed=1)[::2, 5:70]
    for scores in (wide[::2, 1::2, 5:70], wide[::2, 3, 5:70], wide[:1, :1, :65].expand(2, 6, 65)):
        expected = aggregate_scores(running.contiguous(), scores.contiguous())
        assert_same_bits(aggregate_scores(running, scores), expected)


def test_begins_with_zeros_or_minus_infinity(device):
    scores = normal(2, 3, 40, device=device)
    start = torch.full((2, 40), -torch.inf, device=device)
    assert torch.equal(aggregate_scores(start, scores), scores.amax(1))
    assert torch.equal(aggregate_scores(start.clamp_min(0), scores), scores.amax(1).clamp_min(0))


def test_check_values(device):
    """CLAA's importance over the three layers of the published check values."""
    expected = [0.372265, 0.555058, 0.567467, 0.570214, 0.566421, 0.554964]
    expected += [0.563886, 0.565009, 0.561608, 0.557342, 0.56173, 0.384934]
    running = torch.zeros(1, 12, device=device)
    for layer in range(3):
        query, key = vector_query(layer, 12, 15).to(device), vector_key(layer).to(device)
        scores = claa_ops.score_tokens(query, key, kernel_size=3)
        running = aggregate_scores(running, scores)
    torch.testing.assert_close(running[0].tolist(), expected, rtol=0, atol=2e-6)


@given(
    order=st.permutations(range(4)),
    heads_apart=st.booleans(),
    context=st.integers(0, 50),
    seed=st.integers(0, 2**16),
)
def test_order_and_repetition_of_layers_do_not_matter(order, heads_apart, context, seed, device):
    shape = (4, 2, 3, context) if heads_apart else (4, 2, context)
    layers = chosen_from(AWKWARD, *shape, device=device, seed=seed)
    start = torch.full((2, context), -torch.inf, device=device)

    def run(indices: list[int]) -> torch.Tensor:
        running = start
        for i in indices:
            running = aggregate_scores(running, layers[i])
        return running

    forward = run([0, 1, 2, 3])
    assert torch.equal(run(order), forward)
    assert torch.equal(run([*order, *order]), forward)


@given(heads=st.integers(1, 5), context=st.integers(1, 50), seed=st.integers(0, 2**16))
def test_nan_stays(heads, context, seed, device):
    scores = chosen_from(AWKWARD + NANS, 2, heads, context, device=device, seed=seed)
    running = chosen_from(AWKWARD + NANS, 2, context, device=device, seed=seed + 1)
    actual = aggregate_scores(running, scores)
    assert_same_bits(actual, reference.aggregate_scores(running, scores))
    assert torch.equal(actual.isnan(), scores.isnan().any(1) | running.isnan())


@given(batch=st.integers(1, 4), context=st.integers(0, 50), seed=st.integers(0, 2**16))
def test_a_row_does_not_know_its_batch(batch, context, seed, device):
    scores = normal(batch, 3, context, device=device, seed=seed)
    running = normal(batch, context, device=device, seed=seed + 1)
    together = aggregate_scores(running, scores)
    for b in range(batch):
        row = slice(b, b + 1)
        assert_same_bits(together[row], aggregate_scores(running[row], scores[row]))


def test_runs_and_threads_agree_bit_for_bit(device):
    scores = normal(2, 8, 50_001, device=device)
    running = normal(2, 50_001, device=device, seed=1)
    assert_same_bits_on_any_run(lambda: aggregate_scores(running, scores))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"running": torch.zeros(5)}, r"running must .*, got \[5\]", id="running-rank"),
        pytest.param({"scores": torch.zeros(5)}, r"scores must .*, got \[5\]", id="scores-rank"),
        pytest.param(
            {"scores": torch.zeros(1, 2, 3, 5)},
            r"scores must .*, got \[1, 2, 3, 5\]",
            id="scores-rank-4",
        ),
        pytest.param({"scores": torch.zeros(2, 3, 6)}, "scores must .*6", id="context"),
        pytest.param({"scores": torch.zeros(3, 5)}, "scores must .*3", id="batch"),
        pytest.param({"scores": torch.zeros(1, 5)}, "scores must .*1", id="no-broadcast"),
        pytest.param({"scores": torch.zeros(2, 0, 5)}, "scores must .*0", id="no-heads"),
        pytest.param(
            {"running": torch.zeros(2, 5).double()},
            "running must have dtype float32.*, got float64",
            id="running-dtype",
        ),
        pytest.param(
            {"scores": torch.zeros(2, 5).half()},
            "scores must have dtype float32.*, got float16",
            id="scores-dtype",
        ),
        pytest.param(
            {"running": torch.zeros(5, 2).T},
            r"running must be contiguous.*, got strides \[1, 2\]",
            id="running-strides",
        ),
        pytest.param(
            {"scores": torch.zeros(2, 5, 3).mT},
            r"scores must be contiguous.*, got strides \[15, 1, 3\]",
            id="scores-strides",
        ),
    ],
)
def test_rejects(changes, message, device):
    call = {"running": torch.zeros(2, 5), "scores": torch.zeros(2, 3, 5)} | changes
    assert_refuses("aggregate_scores", call, message, device)


def test_rejects_a_mix_of_devices(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    with pytest.raises(RuntimeError, match="aggregate_scores: scores must be on the device of"):
        aggregate_scores(torch.zeros(2, 5, device=device), torch.zeros(2, 5))
