"""score_layer: score_tokens, and aggregate_scores in place, in one op."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import claa_ops
from claa_ops import reference
from support import window_cases as cases
from support.fakes import assert_refuses
from support.inputs import (
    AWKWARD,
    FLOATS,
    assert_as_exact_as_eager,
    assert_same_bits,
    assert_same_bits_on_any_run,
    chosen_from,
    normal,
    queries_and_keys,
    vector_key,
    vector_query,
)

score_layer = claa_ops.score_layer

MODES = ["avg", "max"]


def running_like(query: Tensor, key: Tensor, seed: int = 9) -> Tensor:
    """Some entries above all scores, some among them, some below."""
    shape = (query.shape[0], key.shape[2] - query.shape[2])
    return normal(*shape, device=query.device.type, seed=seed) / 50


def assert_is_both_steps(running: Tensor, query: Tensor, key: Tensor, **options) -> None:
    """The scores are those of score_tokens, the running maximum that of aggregate_scores."""
    expected_scores = claa_ops.score_tokens(query, key, **options)
    expected = claa_ops.aggregate_scores(running, expected_scores)
    scores = score_layer(running, query, key, **options)
    assert scores.is_contiguous()
    assert_same_bits(scores, expected_scores)
    assert_same_bits(running, expected)


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_matches_reference(shape, dtype, pool_mode, device):
    query, key = queries_and_keys(*shape, device=device, dtype=dtype)
    before, running, other = (running_like(query, key) for _ in range(3))
    scores = score_layer(running, query, key, pool_mode=pool_mode)
    assert_same_bits(running, reference.aggregate_scores(before, scores))
    assert_as_exact_as_eager("score_layer", other, query, key, pool_mode=pool_mode)


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_is_both_steps(shape, dtype, pool_mode, device):
    query, key = queries_and_keys(*shape, device=device, dtype=dtype)
    assert_is_both_steps(running_like(query, key), query, key, pool_mode=pool_mode)


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", cases.OPTIONS)
def test_options(options, dtype, pool_mode, device):
    query, key = queries_and_keys(*cases.OPTION_SHAPE, device=device, dtype=dtype)
    options = cases.as_tensors(options, device)
    for lse in (None, cases.log_sum_exp(query, key, **options)):
        assert_is_both_steps(
            running_like(query, key), query, key, pool_mode=pool_mode, lse=lse, **options
        )


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("window", [8, 64])
def test_long_prompts_with_lse(window, pool_mode, device):
    """Enough keys to fill a GPU, with few query rows and with many."""
    query, key = queries_and_keys(
        1, 8, 2, window, 20_000 + window, 128, device=device, dtype=torch.bfloat16
    )
    lse = cases.log_sum_exp(query, key)
    assert_is_both_steps(running_like(query, key) / 100, query, key, pool_mode=pool_mode, lse=lse)


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("kernel_size", [1, 3, 63, 201, 301])
@pytest.mark.parametrize("context", [1, 62, 1500])
def test_any_kernel_size(context, kernel_size, pool_mode, device):
    query, key = queries_and_keys(2, 4, 2, 6, context + 6, 16, device=device)
    running = running_like(query, key)
    assert_is_both_steps(running, query, key, kernel_size=kernel_size, pool_mode=pool_mode)


def test_scores_of_no_queries_are_zeros_that_count(device):
    for heads, window in ((4, 0), (0, 3)):
        query, key = queries_and_keys(2, heads, 2, window, 20 + window, 8, device=device)
        running = chosen_from(AWKWARD + (torch.nan,), 2, 20, device=device, seed=0)
        assert_is_both_steps(running, query, key)
        assert running.nan_to_num(0).ge(0).all()


def test_padding_scores_nothing(device):
    query, key = queries_and_keys(3, 4, 2, 5, 60, 16, device=device)
    start = torch.tensor([0, 30, 57], device=device)
    running = torch.full((3, 55), -torch.inf, device=device)
    assert_is_both_steps(running, query, key, start=start, kernel_size=1)
    for row, first in zip(running, (0, 30, 55), strict=True):
        assert row[:first].eq(0).all() and row[first:].gt(0).all()


def test_check_values(device):
    """CLAA's importance over the three layers of the published check values."""
    expected = [0.372265, 0.555058, 0.567467, 0.570214, 0.566421, 0.554964]
    expected += [0.563886, 0.565009, 0.561608, 0.557342, 0.56173, 0.384934]
    running = torch.zeros(1, 12, device=device)
    for layer in range(3):
        query, key = vector_query(layer, 12, 15).to(device), vector_key(layer).to(device)
        score_layer(running, query, key, kernel_size=3)
    torch.testing.assert_close(running[0].tolist(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("dim", [16, 128])
def test_nan_stays(dim, pool_mode, device):
    """A NaN in the running maximum or in a score of any head."""
    query, key = queries_and_keys(
        2, 6, 3, 5, 500, dim, device=device, dtype=torch.bfloat16 if dim == 128 else torch.float32
    )
    running = chosen_from(AWKWARD + (torch.nan,), 2, 495, device=device, seed=1)
    key[1, 2, 20, 3] = torch.nan
    expected = running.isnan() | claa_ops.score_tokens(
        query, key, sliding_window=10, pool_mode=pool_mode
    ).isnan().any(1)
    assert_is_both_steps(running, query, key, sliding_window=10, pool_mode=pool_mode)
    assert torch.equal(running.isnan(), expected)
    assert_is_both_steps(running, query, key, pool_mode=pool_mode)
    assert running[1].isnan().all() and not running[0].isnan().all()


def test_a_nan_with_its_sign_set(device):
    """The CPU treats it as a NaN; on CUDA it is less than every score."""
    query, key = queries_and_keys(2, 4, 2, 5, 60, 16, device=device)
    running = torch.full((2, 55), -1, dtype=torch.int32, device=device).view(torch.float32)
    assert running.isnan().all()
    scores = score_layer(running, query, key)
    if device == "cpu":
        assert running.isnan().all()
    else:
        assert torch.equal(running, scores.amax(1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_runs_and_threads_agree_bit_for_bit(dtype, device):
    query, key = queries_and_keys(2, 6, 3, 8, 4099, 64, device=device, dtype=dtype)
    start = torch.tensor([0, 1500], device=device)

    def call() -> Tensor:
        running = running_like(query, key)
        scores = score_layer(running, query, key, start=start)
        return torch.cat([scores, running[:, None]], dim=1)

    assert_same_bits_on_any_run(call)


SIZES = {
    "kv_heads": st.integers(1, 5),
    "group": st.integers(1, 4),
    "window": st.integers(1, 20),
    "context": st.integers(0, 90),
    "dim": st.integers(1, 40),
    "seed": st.integers(0, 2**16),
    "pool_mode": st.sampled_from(MODES),
}


@given(kernel_size=st.sampled_from([1, 3, 7, 63]), **SIZES)
def test_any_running_maximum(
    kv_heads, group, window, context, dim, seed, pool_mode, kernel_size, device
):
    """The running maximum holds ties, both zeros, infinities and NaN."""
    query, key = queries_and_keys(
        2, kv_heads * group, kv_heads, window, context + window, dim, device=device, seed=seed
    )
    running = chosen_from(AWKWARD + (torch.nan,), 2, context, device=device, seed=seed)
    assert_is_both_steps(running, query, key, pool_mode=pool_mode, kernel_size=kernel_size)


@given(order=st.permutations(range(4)), **SIZES)
def test_order_and_repetition_of_layers_do_not_matter(
    order, kv_heads, group, window, context, dim, seed, pool_mode, device
):
    layers = [
        queries_and_keys(
            2, kv_heads * group, kv_heads, window, context + window, dim, device=device, seed=s
        )
        for s in range(seed, seed + 4)
    ]

    def run(indices: list[int]) -> Tensor:
        running = torch.zeros(2, context, device=device)
        for i in indices:
            score_layer(running, *layers[i], pool_mode=pool_mode)
        return running

    forward = run([0, 1, 2, 3])
    assert torch.equal(run(order), forward)
    assert torch.equal(run([*order, *order]), forward)


@given(batch=st.integers(1, 3), lse_given=st.booleans(), **SIZES)
def test_a_row_does_not_know_its_batch(
    batch, lse_given, kv_heads, group, window, context, dim, seed, pool_mode, device
):
    query, key = queries_and_keys(
        batch, kv_heads * group, kv_heads, window, context + window, dim, device=device, seed=seed
    )
    lse = cases.log_sum_exp(query, key) if lse_given else None
    together, alone = (running_like(query, key) for _ in range(2))
    score_layer(together, query, key, lse=lse, pool_mode=pool_mode)
    for b in range(batch):
        row = slice(b, b + 1)
        row_lse = None if lse is None else lse[row]
        score_layer(alone[row], query[row], key[row], lse=row_lse, pool_mode=pool_mode)
    assert_same_bits(together, alone)


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_update_inside_a_graph(dynamic, device):
    """The maximum of two layers, of a running maximum that the graph makes and one it is given."""

    def layers(running: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = torch.zeros_like(running)
        for flipped in (query, -query):
            scores = score_layer(running, flipped, key)
            score_layer(made, flipped, key)
        return scores, made, made - running

    torch._dynamo.reset()
    compiled = torch.compile(layers, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, total in ((2, 40), (3, 77)):
        query, key = queries_and_keys(batch, 4, 2, 5, total, 8, device=device)
        running, expected = (running_like(query, key) for _ in range(2))
        outputs = layers(expected, query, key)
        for actual, output in zip(compiled(running, query, key), outputs, strict=True):
            assert_same_bits(actual, output)
        assert_same_bits(running, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *cases.REJECTED,
        pytest.param({"kernel_size": 4}, "kernel_size must .*odd.*, got 4", id="even-kernel"),
        pytest.param(
            {"running": torch.zeros(12)}, r"running must .*\[B, M\], got \[12\]", id="running-rank"
        ),
        pytest.param(
            {"running": torch.zeros(1, 12)}, "running must .*2 like query, got 1", id="no-broadcast"
        ),
        pytest.param(
            {"running": torch.zeros(2, 16)}, "running must .*M = 12 .*, got 16", id="context"
        ),
        pytest.param(
            {"running": torch.zeros(2, 12).double()},
            "running must have dtype float32, got float64",
            id="running-dtype",
        ),
        pytest.param(
            {"running": torch.zeros(12, 2).T},
            r"running must be contiguous.*, got strides \[1, 2\]",
            id="running-strides",
        ),
    ],
)
def test_rejects(changes, message, device):
    call = cases.rejected_call({"running": torch.zeros(2, 12)} | changes, device)
    assert_refuses("score_layer", call, message, device)


def test_rejects_rows_that_overlap(device):
    call = cases.rejected_call({}, device)
    memory = torch.zeros(24, device=device)
    for stride in (0, 11):
        call["running"] = memory.as_strided((2, 12), (stride, 1))
        message = rf"running must .*overlap, got strides \[{stride}, 1\]"
        assert_refuses("score_layer", call, message, device)
    call["running"] = memory.as_strided((2, 12), (12, 1))
    score_layer(**call)


def test_rejects_an_unknown_mode(device):
    call = cases.rejected_call({"running": torch.zeros(2, 12), "pool_mode": "mean"}, device)
    with pytest.raises(ValueError, match="pool_mode must be one of avg, max; got 'mean'"):
        score_layer(**call)


def test_rejects_a_mix_of_devices(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    call = cases.rejected_call({}, device)
    with pytest.raises(RuntimeError, match="score_layer: running must be on the device of query"):
        score_layer(torch.zeros(2, 12), **call)
