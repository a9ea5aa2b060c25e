"""score_window: attention of the last W queries to the context, summed over them."""

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
    normal,
    queries_and_keys,
    vector_key,
    vector_query,
)

score_window = claa_ops.score_window


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_matches_reference(shape, dtype, device):
    query, key = queries_and_keys(*shape, device=device, dtype=dtype)
    assert_as_exact_as_eager("score_window", query, key)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", cases.DIMS)
def test_any_head_dim(dim, dtype, device):
    """Rounding grows with the length of a product; 16 rows make the largest error a steady one."""
    query, key = queries_and_keys(16, 4, 2, 5, 133, dim, device=device, dtype=dtype)
    assert_as_exact_as_eager("score_window", query, key)


@pytest.mark.parametrize("seed", [17, 28])
def test_long_products_round_no_worse_than_eager(seed, device):
    """Inputs on which a single chain of 256 additions is off by more than twice eager's error."""
    query, key = queries_and_keys(2, 4, 2, 5, 133, 256, device=device, seed=seed)
    assert_as_exact_as_eager("score_window", query, key)


@pytest.mark.parametrize("window", cases.WINDOWS)
def test_any_window(window, device):
    query, key = queries_and_keys(1, 6, 2, window, window + 150, 24, device=device)
    assert_as_exact_as_eager("score_window", query, key)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", cases.OPTIONS)
def test_options(options, dtype, device):
    query, key = queries_and_keys(*cases.OPTION_SHAPE, device=device, dtype=dtype)
    options = cases.as_tensors(options, device)
    assert_as_exact_as_eager("score_window", query, key, **options)


@pytest.mark.parametrize("options", cases.OPTIONS)
def test_lse_given_is_lse_computed(options, device):
    query, key = queries_and_keys(*cases.OPTION_SHAPE, device=device)
    options = cases.as_tensors(options, device)
    lse = cases.log_sum_exp(query, key, **options)
    exact_options = {n: x.double() if n == "sink_logits" else x for n, x in options.items()}
    assert_no_further(
        score_window(query, key, lse=lse, **options),
        reference.score_window(query, key, **options),
        reference.score_window(query.double(), key.double(), **exact_options),
        steps=16,  # the lse itself, up to 9 here, is rounded to float32
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", cases.OPTIONS)
def test_options_with_lse(options, dtype, device):
    query, key = queries_and_keys(*cases.OPTION_SHAPE, device=device, dtype=dtype)
    options = cases.as_tensors(options, device)
    lse = cases.log_sum_exp(query, key, **options)
    assert_as_exact_as_eager("score_window", query, key, lse=lse, **options)


def test_lse_of_a_query_without_keys_is_not_read(device):
    query, key = queries_and_keys(2, 4, 2, 6, 40, 16, device=device)
    start = torch.tensor([37, 40], device=device)  # 3 of 6 queries are padding; all are
    lse = cases.log_sum_exp(query, key, start=start)
    expected = score_window(query, key, start=start, lse=lse)
    for garbage in (torch.nan, torch.inf, -torch.inf, 0.0):
        filled = torch.where(lse == -torch.inf, garbage, lse)
        assert_same_bits(score_window(query, key, start=start, lse=filled), expected)
    assert not expected.any()


def test_sinks_may_have_the_dtype_of_query(device):
    query, key = queries_and_keys(2, 4, 2, 5, 60, 16, device=device, dtype=torch.bfloat16)
    sink_logits = torch.tensor([-1.0, 0.5, 2.0, 4.0], device=device)
    rounded = score_window(query, key, sink_logits=sink_logits.bfloat16())
    assert_same_bits(rounded, score_window(query, key, sink_logits=sink_logits))


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_start_is_of_either_index_type(index_type, device):
    query, key = queries_and_keys(3, 4, 2, 5, 60, 16, device=device)
    start = torch.tensor([0, 30, 57], device=device, dtype=index_type)
    assert_as_exact_as_eager("score_window", query, key, start=start)


def test_last_dimension_of_one_is_contiguous_at_any_stride(device):
    query = normal(1, 2, 3, 8, device=device)[..., ::8]
    key = normal(1, 2, 20, 8, device=device)[..., ::8]
    expected = score_window(query.clone(), key.clone())
    assert_same_bits(score_window(query, key), expected)


def test_large_logits_neither_overflow_nor_vanish(device):
    """Small integers make the products exact, so eager and op differ in the softmax alone."""
    query, key = (x.round() for x in queries_and_keys(1, 4, 2, 4, 90, 32, device=device))
    for scale in (1.0, 64.0, -64.0, 2.0**20):
        assert_as_exact_as_eager("score_window", query, key, scale=scale)


def test_check_values(device):
    expected = [0.286622, 0.264706, 0.259009, 0.290576, 0.298873, 0.26911]
    expected += [0.258187, 0.293437, 0.291986, 0.26229, 0.270998, 0.302872]
    actual = score_window(vector_query(0, 12, 15).to(device), vector_key(0).to(device))
    torch.testing.assert_close(actual[0, 0].tolist(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("lse_given", [False, True], ids=["measured", "lse"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("window", [5, 8, 12, 37])
def test_infinite_keys_have_no_probability(window, dtype, lse_given, device):
    inputs = queries_and_keys(2, 6, 2, window, window + 700, 64, device=device, dtype=dtype)
    query, key = cases.with_infinite_keys(*inputs)
    lse = cases.log_sum_exp(query, key) if lse_given else None
    scores = assert_as_exact_as_eager("score_window", query, key, lse=lse)
    assert scores[..., ::13].count_nonzero() == 0


def test_nan_stays_in_the_heads_that_see_it(device):
    for place in ((0, 1, 3, 0), (1, 0, 57, 2)):  # a context key and a key inside the window
        query, key = queries_and_keys(2, 4, 2, 5, 60, 16, device=device)
        key[place] = torch.nan
        actual, expected = score_window(query, key), reference.score_window(query, key)
        assert expected.isnan().any() and not expected.isnan().all()
        assert torch.equal(actual.isnan(), expected.isnan())
    query[0, 2, 1] = torch.nan
    actual, expected = score_window(query, key), reference.score_window(query, key)
    assert torch.equal(actual.isnan(), expected.isnan())


SIZES = {
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 4),
    "window": st.integers(1, 20),
    "context": st.integers(0, 90),
    "dim": st.integers(1, 40),
    "seed": st.integers(0, 2**16),
}


@given(scale=st.sampled_from([0.0, 1e-3, 0.2, 1.0, 40.0]), **SIZES)
def test_a_query_has_one_vote(kv_heads, group, window, context, dim, seed, scale, device):
    """Entries lie in [0, W], a row of scores sums to at most W."""
    query, key = queries_and_keys(
        2, kv_heads * group, kv_heads, window, context + window, dim, device=device, seed=seed
    )
    scores = score_window(query, key, scale=scale)
    assert scores.shape == (2, kv_heads * group, context)
    assert scores.ge(0).all()
    assert scores.double().sum(-1).le(window * (1 + 1e-5)).all()


@given(data=st.data(), batch=st.integers(1, 3), lse_given=st.booleans(), **SIZES)
def test_a_row_does_not_know_its_batch(
    data, batch, lse_given, kv_heads, group, window, context, dim, seed, device
):
    total = context + window
    query, key = queries_and_keys(
        batch, kv_heads * group, kv_heads, window, total, dim, device=device, seed=seed
    )
    starts = data.draw(st.lists(st.integers(0, total), min_size=batch, max_size=batch))
    start = torch.tensor(starts, device=device)
    options = {"sliding_window": data.draw(st.sampled_from([0, 1, 7, 50]))}
    lse = cases.log_sum_exp(query, key, start=start, **options) if lse_given else None
    together = score_window(query, key, start=start, lse=lse, **options)
    for b in range(batch):
        row = slice(b, b + 1)
        row_lse = None if lse is None else lse[row]
        alone = score_window(query[row], key[row], start=start[row], lse=row_lse, **options)
        assert_same_bits(together[row], alone)


@given(data=st.data(), lse_given=st.booleans(), **SIZES)
def test_a_padded_row_is_the_row_alone(
    data, lse_given, kv_heads, group, window, context, dim, seed, device
):
    """Bit for bit on the CPU; and the contents of the padding are never read."""
    query, key = queries_and_keys(
        1, kv_heads * group, kv_heads, window, context + window, dim, device=device, seed=seed
    )
    start = data.draw(st.integers(0, context))
    lse = cases.log_sum_exp(query, key[:, :, start:]) if lse_given else None
    alone = score_window(query, key[:, :, start:], lse=lse)
    key[:, :, :start] = torch.nan
    padded = score_window(query, key, start=torch.tensor([start], device=device), lse=lse)
    assert not padded[..., :start].any()
    if device == "cpu":
        assert_same_bits(padded[..., start:], alone)
    else:
        torch.testing.assert_close(padded[..., start:], alone)


@pytest.mark.parametrize("start", [1, 8, 63, 1000, 1024, 2491])
def test_a_long_padded_row_is_the_row_alone(start, device):
    query, key = queries_and_keys(1, 4, 2, 8, 2500, 32, device=device)
    padded = score_window(query, key, start=torch.tensor([start], device=device))
    alone = score_window(query, key[:, :, start:])
    if device == "cpu":
        assert_same_bits(padded[..., start:], alone)
    else:
        torch.testing.assert_close(padded[..., start:], alone)


@pytest.mark.parametrize("dtype", FLOATS)
def test_runs_and_threads_agree_bit_for_bit(dtype, device):
    query, key = queries_and_keys(2, 6, 3, 8, 4099, 64, device=device, dtype=dtype)
    start = torch.tensor([0, 1500], device=device)
    assert_same_bits_on_any_run(lambda: score_window(query, key, start=start, softcap=5.0))


@pytest.mark.parametrize(("changes", "message"), cases.REJECTED)
def test_rejects(changes, message, device):
    assert_refuses("score_window", cases.rejected_call(changes, device), message, device)


def test_rejects_a_mix_of_devices(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    call = cases.rejected_call({}, device)
    with pytest.raises(RuntimeError, match="score_window: key must be on the device of query"):
        score_window(call["query"], call["key"].cpu())
