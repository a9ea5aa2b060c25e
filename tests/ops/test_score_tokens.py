"""score_tokens: score_window and pool_heads in one op."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import claa_ops
from claa_ops import reference
from support import window_cases as cases
from support.fakes import assert_refuses
from support.inputs import (
    FLOATS,
    INDEX_TYPES,
    assert_as_exact_as_eager,
    assert_no_further,
    assert_same_bits,
    assert_same_bits_on_any_run,
    queries_and_keys,
    vector_key,
    vector_query,
)

score_tokens = claa_ops.score_tokens

MODES = ["avg", "max"]
KERNEL_SIZES = [1, 3, 7, 63, 201]


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_matches_reference(shape, dtype, pool_mode, device):
    query, key = queries_and_keys(*shape, device=device, dtype=dtype)
    assert_as_exact_as_eager("score_tokens", query, key, pool_mode=pool_mode)


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
@pytest.mark.parametrize("context", [1, 2, 5, 62, 100, 1500])
def test_any_kernel_size(context, kernel_size, pool_mode, device):
    """Including a kernel that is wider than the context."""
    query, key = queries_and_keys(2, 4, 2, 6, context + 6, 16, device=device)
    assert_as_exact_as_eager(
        "score_tokens", query, key, kernel_size=kernel_size, pool_mode=pool_mode
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", cases.DIMS)
def test_any_head_dim(dim, dtype, device):
    """Rounding grows with the length of a product; 16 rows make the largest error a steady one."""
    query, key = queries_and_keys(16, 4, 2, 5, 133, dim, device=device, dtype=dtype)
    assert_as_exact_as_eager("score_tokens", query, key)


@pytest.mark.parametrize("window", cases.WINDOWS)
def test_any_window(window, device):
    query, key = queries_and_keys(1, 6, 2, window, window + 150, 24, device=device)
    assert_as_exact_as_eager("score_tokens", query, key)


@pytest.mark.parametrize("lse_given", [False, True], ids=["measured", "lse"])
@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", cases.WIDE_SHAPES)
def test_wide_windows(shape, dtype, pool_mode, lse_given, device):
    """As exact as eager, and a row does not depend on its batch."""
    query, key = queries_and_keys(*shape, device=device, dtype=dtype)
    start = torch.tensor([0, 137][: len(query)], device=device)
    lse = cases.log_sum_exp(query, key, start=start) if lse_given else None
    together = assert_as_exact_as_eager(
        "score_tokens", query, key, start=start, lse=lse, pool_mode=pool_mode
    )
    for b in range(len(query)):
        row = slice(b, b + 1)
        row_lse = None if lse is None else lse[row]
        alone = score_tokens(
            query[row], key[row], start=start[row], lse=row_lse, pool_mode=pool_mode
        )
        assert_same_bits(together[row], alone)


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", cases.OPTIONS)
def test_options(options, dtype, pool_mode, device):
    query, key = queries_and_keys(*cases.OPTION_SHAPE, device=device, dtype=dtype)
    options = cases.as_tensors(options, device)
    assert_as_exact_as_eager("score_tokens", query, key, pool_mode=pool_mode, **options)


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("options", cases.OPTIONS)
def test_lse_given_is_lse_computed(options, pool_mode, device):
    query, key = queries_and_keys(*cases.OPTION_SHAPE, device=device)
    options = cases.as_tensors(options, device)
    lse = cases.log_sum_exp(query, key, **options)
    exact_options = {n: x.double() if n == "sink_logits" else x for n, x in options.items()}
    assert_no_further(
        score_tokens(query, key, lse=lse, pool_mode=pool_mode, **options),
        reference.score_tokens(query, key, pool_mode=pool_mode, **options),
        reference.score_tokens(query.double(), key.double(), pool_mode=pool_mode, **exact_options),
        steps=16,  # the lse itself, up to 9 here, is rounded to float32
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", cases.OPTIONS)
def test_options_with_lse(options, dtype, device):
    query, key = queries_and_keys(*cases.OPTION_SHAPE, device=device, dtype=dtype)
    options = cases.as_tensors(options, device)
    lse = cases.log_sum_exp(query, key, **options)
    assert_as_exact_as_eager("score_tokens", query, key, lse=lse, **options)


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_start_is_of_either_index_type(index_type, device):
    query, key = queries_and_keys(3, 4, 2, 5, 60, 16, device=device)
    start = torch.tensor([0, 30, 57], device=device, dtype=index_type)
    assert_as_exact_as_eager("score_tokens", query, key, start=start)


def test_check_values(device):
    """The pooled sums of the published check values, three layers."""
    expected = [  # the first KV head of each layer
        [0.359066, 0.538777, 0.553096, 0.570214, 0.566421, 0.547073]
        + [0.553737, 0.565009, 0.561608, 0.550855, 0.560255, 0.384934],
        [0.355315, 0.543332, 0.565408, 0.569314, 0.55834, 0.546247]
        + [0.562559, 0.564011, 0.556752, 0.553338, 0.56173, 0.382171],
        [0.363894, 0.555058, 0.567467, 0.557994, 0.550999, 0.551298]
        + [0.563886, 0.556562, 0.55287, 0.557342, 0.558228, 0.371321],
    ]
    last = [  # the second KV head of the last layer
        0.359519,
        0.549246,
        0.562956,
        0.562635,
        0.552128,
        0.550783,
        0.559827,
        0.559341,
        0.554068,
        0.553052,
        0.559523,
        0.375187,
    ]
    for layer, values in enumerate(expected):
        query, key = vector_query(layer, 12, 15).to(device), vector_key(layer).to(device)
        actual = score_tokens(query, key, kernel_size=3)[0]
        torch.testing.assert_close(actual[0].tolist(), values, rtol=0, atol=2e-6)
    torch.testing.assert_close(actual[1].tolist(), last, rtol=0, atol=2e-6)


def test_no_heads_score_nothing(device):
    query, key = queries_and_keys(2, 0, 2, 3, 20, 8, device=device)
    assert torch.equal(score_tokens(query, key), torch.zeros(2, 2, 17, device=device))


@pytest.mark.parametrize("pool_mode", MODES)
def test_nan_reaches_as_far_as_the_pool(pool_mode, device):
    """A NaN key spoils the heads that see it; where no query sees it, it does no harm."""
    query, key = queries_and_keys(2, 4, 2, 5, 60, 16, device=device)
    key[1, 0, 20, 3] = torch.nan
    for sliding_window in (0, 10):
        options = {"pool_mode": pool_mode, "sliding_window": sliding_window}
        actual = score_tokens(query, key, **options)
        expected = reference.score_tokens(query, key, **options)
        assert torch.equal(actual.isnan(), expected.isnan())
    assert not actual.isnan().any()


@pytest.mark.parametrize("lse_given", [False, True], ids=["measured", "lse"])
@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("window", [5, 8, 12, 37])
def test_infinite_keys_have_no_probability(window, dtype, pool_mode, lse_given, device):
    """Nor do they spoil the probabilities of others, whatever the padding rows of a tile hold."""
    inputs = queries_and_keys(2, 6, 2, window, window + 700, 64, device=device, dtype=dtype)
    query, key = cases.with_infinite_keys(*inputs)
    start = torch.tensor([0, 137], device=device)
    lse = cases.log_sum_exp(query, key, start=start) if lse_given else None
    scores = assert_as_exact_as_eager(
        "score_tokens", query, key, start=start, lse=lse, pool_mode=pool_mode
    )
    assert scores.isfinite().all()


SIZES = {
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 4),
    "window": st.integers(1, 20),
    "context": st.integers(0, 90),
    "dim": st.integers(1, 40),
    "seed": st.integers(0, 2**16),
    "pool_mode": st.sampled_from(MODES),
    "kernel_size": st.sampled_from([1, 3, 7, 15, 63]),
}


@given(**SIZES)
def test_is_score_window_then_pool_heads(
    kv_heads, group, window, context, dim, seed, pool_mode, kernel_size, device
):
    query, key = queries_and_keys(
        2, kv_heads * group, kv_heads, window, context + window, dim, device=device, seed=seed
    )
    pooling = {"kernel_size": kernel_size, "pool_mode": pool_mode}
    scores = claa_ops.score_window(query, key)
    expected = claa_ops.pool_heads(scores, kv_heads, **pooling)
    torch.testing.assert_close(
        score_tokens(query, key, **pooling), expected, rtol=3e-6, atol=1e-6 * window
    )


@given(**SIZES)
def test_a_query_has_one_vote_per_head(
    kv_heads, group, window, context, dim, seed, pool_mode, kernel_size, device
):
    """Averaging adds nothing: a row sums to at most W times the group's heads."""
    query, key = queries_and_keys(
        1, kv_heads * group, kv_heads, window, context + window, dim, device=device, seed=seed
    )
    scores = score_tokens(query, key, scale=1.0, kernel_size=kernel_size, pool_mode=pool_mode)
    assert scores.ge(0).all()
    limit = window * group * (1 + 1e-5)
    assert (scores.double().sum(-1) if pool_mode == "avg" else scores).le(limit).all()


@given(data=st.data(), lse_given=st.booleans(), batch=st.integers(1, 3), **SIZES)
def test_a_row_does_not_know_its_batch(
    data,
    lse_given,
    batch,
    kv_heads,
    group,
    window,
    context,
    dim,
    seed,
    pool_mode,
    kernel_size,
    device,
):
    total = context + window
    query, key = queries_and_keys(
        batch, kv_heads * group, kv_heads, window, total, dim, device=device, seed=seed
    )
    starts = data.draw(st.lists(st.integers(0, total), min_size=batch, max_size=batch))
    start = torch.tensor(starts, device=device)
    options = {"pool_mode": pool_mode, "kernel_size": kernel_size}
    lse = cases.log_sum_exp(query, key, start=start) if lse_given else None
    together = score_tokens(query, key, start=start, lse=lse, **options)
    for b in range(batch):
        row = slice(b, b + 1)
        row_lse = None if lse is None else lse[row]
        alone = score_tokens(query[row], key[row], start=start[row], lse=row_lse, **options)
        assert_same_bits(together[row], alone)


@given(data=st.data(), lse_given=st.booleans(), **SIZES)
def test_a_padded_row_is_the_row_alone(
    data, lse_given, kv_heads, group, window, context, dim, seed, pool_mode, kernel_size, device
):
    """Bit for bit on the CPU; and the contents of the padding are never read."""
    query, key = queries_and_keys(
        1, kv_heads * group, kv_heads, window, context + window, dim, device=device, seed=seed
    )
    start = data.draw(st.integers(0, context))
    options = {"pool_mode": pool_mode, "kernel_size": kernel_size}
    lse = cases.log_sum_exp(query, key[:, :, start:]) if lse_given else None
    alone = score_tokens(query, key[:, :, start:], lse=lse, **options)
    key[:, :, :start] = torch.nan
    starts = torch.tensor([start], device=device)
    padded = score_tokens(query, key, start=starts, lse=lse, **options)[..., start:]
    if device == "cpu":
        assert_same_bits(padded, alone)
    else:
        torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("start", [1, 8, 63, 1000, 1024, 2491])
def test_a_long_padded_row_is_the_row_alone(start, pool_mode, device):
    query, key = queries_and_keys(1, 4, 2, 8, 2500, 32, device=device)
    alone = score_tokens(query, key[:, :, start:], pool_mode=pool_mode)
    padded = score_tokens(
        query, key, start=torch.tensor([start], device=device), pool_mode=pool_mode
    )
    if device == "cpu":
        assert_same_bits(padded[..., start:], alone)
    else:
        torch.testing.assert_close(padded[..., start:], alone)


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_runs_and_threads_agree_bit_for_bit(dtype, pool_mode, device):
    query, key = queries_and_keys(2, 6, 3, 8, 4099, 64, device=device, dtype=dtype)
    start = torch.tensor([0, 1500], device=device)
    assert_same_bits_on_any_run(lambda: score_tokens(query, key, start=start, pool_mode=pool_mode))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *cases.REJECTED,
        pytest.param({"kernel_size": 4}, "kernel_size must .*odd.*, got 4", id="even-kernel"),
        pytest.param({"kernel_size": 0}, "kernel_size must .*, got 0", id="no-kernel"),
        pytest.param({"kernel_size": -3}, "kernel_size must .*, got -3", id="negative-kernel"),
    ],
)
def test_rejects(changes, message, device):
    assert_refuses("score_tokens", cases.rejected_call(changes, device), message, device)


def test_rejects_an_unknown_mode(device):
    with pytest.raises(ValueError, match="pool_mode must be one of avg, max; got 'mean'"):
        score_tokens(**cases.rejected_call({"pool_mode": "mean"}, device))


def test_rejects_a_mix_of_devices(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    call = cases.rejected_call({}, device)
    with pytest.raises(RuntimeError, match="score_tokens: key must be on the device of query"):
        score_tokens(call["query"], call["key"].cpu())
