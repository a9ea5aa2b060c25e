"""peak_attention: the largest attention of any head from each query to each key."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import claa_ops
from claa_ops import reference
from support.fakes import assert_refuses
from support.inputs import (
    FLOATS,
    INDEX_TYPES,
    assert_as_exact_as_eager,
    assert_same_bits,
    assert_same_bits_on_any_run,
    normal,
    queries_and_keys,
    vector_key,
    vector_query,
)

peak_attention = claa_ops.peak_attention

SHAPES = [  # batch, heads, kv_heads, queries, total, dim
    pytest.param((1, 1, 1, 1, 1, 1), id="one-element"),
    pytest.param((2, 6, 2, 5, 203, 80), id="odd-sizes"),
    pytest.param((1, 9, 3, 8, 2047, 64), id="smollm2"),
    pytest.param((1, 32, 8, 8, 4096, 128), id="llama-8b"),
    pytest.param((1, 4, 1, 33, 500, 96), id="one-kv-head"),
    pytest.param((2, 4, 2, 9, 3, 16), id="more-queries-than-keys"),
    pytest.param((2, 4, 2, 0, 30, 16), id="no-queries"),
    pytest.param((2, 4, 2, 3, 0, 16), id="no-keys"),
    pytest.param((0, 4, 2, 8, 64, 64), id="empty-batch"),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, device):
    query, key = queries_and_keys(*shape, device=device, dtype=dtype)
    assert_as_exact_as_eager("peak_attention", query, key)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [1, 3, 64, 80, 96, 128, 256])
def test_any_head_dim(dim, dtype, device):
    """Rounding grows with the length of a product; 16 rows make the largest error a steady one."""
    query, key = queries_and_keys(16, 4, 2, 5, 133, dim, device=device, dtype=dtype)
    assert_as_exact_as_eager("peak_attention", query, key)


@pytest.mark.parametrize("seed", [17, 28])
def test_long_products_round_no_worse_than_eager(seed, device):
    """Inputs on which a single chain of 256 additions is off by more than twice eager's error."""
    query, key = queries_and_keys(2, 4, 2, 5, 133, 256, device=device, seed=seed)
    assert_as_exact_as_eager("peak_attention", query, key)


@pytest.mark.parametrize("queries", [1, 2, 7, 16, 31, 64, 128])
def test_any_number_of_queries(queries, device):
    query, key = queries_and_keys(1, 6, 2, queries, 150, 24, device=device)
    assert_as_exact_as_eager("peak_attention", query, key)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param({"scale"}, id="scale"),
        pytest.param({"running"}, id="running"),
        pytest.param({"start"}, id="start"),
        pytest.param({"scale", "running", "start"}, id="everything"),
    ],
)
def test_options(names, dtype, device):
    """Rows: plain; padded; one valid key; nothing but padding."""
    query, key = queries_and_keys(4, 6, 2, 5, 600, 40, device=device, dtype=dtype)
    options = {
        "scale": 0.3,
        "running": normal(4, 5, 600, device=device, seed=9).mul(0.01),
        "start": torch.tensor([0, 137, 599, 600], device=device),
    }
    options = {name: options[name] for name in names}
    assert_as_exact_as_eager("peak_attention", query, key, **options)


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_start_is_of_either_index_type(index_type, device):
    query, key = queries_and_keys(3, 4, 2, 5, 60, 16, device=device)
    start = torch.tensor([0, 30, 60], device=device, dtype=index_type)
    assert_as_exact_as_eager("peak_attention", query, key, start=start)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_do_not_change_a_bit(dtype, device):
    projected = normal(2, 200, 4, 64, device=device, dtype=dtype, seed=1)
    cache = normal(2, 2, 300, 67, device=device, dtype=dtype, seed=3)
    running = normal(2, 20, 300, device=device, seed=5).mul(0.01)[:, ::2, 50:250]
    query, key = projected.transpose(1, 2)[:, :, -10:], cache[:, :, 50:250, 3:]
    strided = peak_attention(query, key, running=running)
    packed = peak_attention(query.contiguous(), key.contiguous(), running=running.contiguous())
    if device == "cpu" or dtype == torch.float32:
        assert_same_bits(strided, packed)
    else:  # on CUDA tensor cores read a key by 16 bytes, and these keys are not aligned to that
        torch.testing.assert_close(strided, packed)


def test_large_logits_neither_overflow_nor_vanish(device):
    """Small integers make the products exact, so eager and op differ in the softmax alone."""
    query, key = (x.round() for x in queries_and_keys(1, 4, 2, 4, 90, 32, device=device))
    for scale in (1.0, 64.0, -64.0, 2.0**20):
        assert_as_exact_as_eager("peak_attention", query, key, scale=scale)


def peaks_of_check_values(device: str) -> Tensor:
    running = None
    for layer in range(3):
        query, key = vector_query(layer, 15, 17).to(device), vector_key(layer).to(device)
        running = peak_attention(query, key, running=running)
    return running[0]  # [3, 16]


def test_check_values_of_the_oracle(device):
    """Peak over layers and heads, mean over queries, then pool."""
    expected = [0.048068, 0.064871, 0.081259, 0.080937, 0.081364, 0.08187, 0.081403, 0.080827]
    expected += [0.081602, 0.081876, 0.080887, 0.080861, 0.081575, 0.080789, 0.064281, 0.048561]
    mean = peaks_of_check_values(device).mean(dim=0)
    importance = claa_ops.pool_heads(mean[None, None], 1, kernel_size=5)[0, 0]
    torch.testing.assert_close(importance.tolist(), expected, rtol=0, atol=2e-6)
    assert claa_ops.select_topk(importance, 5).tolist() == [5, 6, 8, 9, 12]


def test_check_values_of_speculative_prefill(device):
    """Pool per layer, head and query, then take the peak: the op is asked head by head."""
    expected = [0.041279, 0.051707, 0.064377, 0.064178, 0.066726, 0.068185, 0.066521, 0.065526]
    expected += [0.06795, 0.067862, 0.065337, 0.066781, 0.067843, 0.065059, 0.052541, 0.038474]
    peak = torch.zeros(3, 16, device=device)
    for layer in range(3):
        query, key = vector_query(layer, 15, 17).to(device), vector_key(layer).to(device)
        for head in range(4):
            attention = peak_attention(query[:, head : head + 1], key[:, head // 2, None])
            pooled = F.avg_pool1d(attention, 5, stride=1, padding=2)[0]
            peak = torch.maximum(peak, pooled)
    importance = peak.mean(dim=0)
    torch.testing.assert_close(importance.tolist(), expected, rtol=0, atol=2e-6)
    chunks = importance.view(4, 4).mean(dim=1)  # keep 30 % of four chunks, rounded up
    assert claa_ops.select_topk(chunks, 2).tolist() == [1, 2]


@pytest.mark.parametrize("place", ["key", "query", "running"])
def test_nan_propagates(place, device):
    query, key = queries_and_keys(2, 4, 2, 3, 40, 16, device=device)
    running = torch.zeros(2, 3, 40, device=device)
    {"key": key[1, 0], "query": query[1, 2], "running": running[1]}[place][2, 1] = torch.nan
    actual = peak_attention(query, key, running=running)
    expected = reference.peak_attention(query, key, running=running)
    assert expected.isnan().any() and not expected.isnan().all()
    assert torch.equal(actual.isnan(), expected.isnan())


SIZES = {
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 4),
    "queries": st.integers(1, 20),
    "total": st.integers(1, 90),
    "dim": st.integers(1, 40),
    "seed": st.integers(0, 2**16),
}


@given(scale=st.sampled_from([0.0, 1e-3, 0.2, 1.0, 40.0]), **SIZES)
def test_peaks_are_shares_of_a_vote(kv_heads, group, queries, total, dim, seed, scale, device):
    """In [0, 1]; over the keys they sum to 1 for one head, and to at most H for H heads."""
    heads = kv_heads * group
    query, key = queries_and_keys(2, heads, kv_heads, queries, total, dim, device=device, seed=seed)
    peak = peak_attention(query, key, scale=scale)
    assert peak.ge(0).all() and peak.le(1 + 1e-6).all()
    sums = peak.double().sum(-1)
    assert sums.ge(1 - 1e-5).all() and sums.le(heads * (1 + 1e-5)).all()
    one = peak_attention(query[:, :1], key[:, :1], scale=scale).sum(-1)
    torch.testing.assert_close(one, torch.ones_like(one), rtol=1e-5, atol=0)


@given(**SIZES)
def test_is_the_maximum_over_its_heads(kv_heads, group, queries, total, dim, seed, device):
    """Head by head through ``running``, in any order, gives all heads at once: bit for bit."""
    heads = kv_heads * group
    query, key = queries_and_keys(1, heads, kv_heads, queries, total, dim, device=device, seed=seed)
    running = None
    for head in reversed(range(heads)):
        own = key[:, head // group, None]
        running = peak_attention(query[:, head : head + 1], own, running=running)
    together = peak_attention(query, key)
    if device == "cpu":
        assert_same_bits(running, together)
    else:
        torch.testing.assert_close(running, together)
    assert_same_bits(peak_attention(query, key, running=together), together)


@given(data=st.data(), batch=st.integers(1, 3), **SIZES)
def test_a_row_does_not_know_its_batch(
    data, batch, kv_heads, group, queries, total, dim, seed, device
):
    query, key = queries_and_keys(
        batch, kv_heads * group, kv_heads, queries, total, dim, device=device, seed=seed
    )
    starts = data.draw(st.lists(st.integers(0, total), min_size=batch, max_size=batch))
    start = torch.tensor(starts, device=device)
    together = peak_attention(query, key, start=start)
    for b in range(batch):
        row = slice(b, b + 1)
        assert_same_bits(together[row], peak_attention(query[row], key[row], start=start[row]))


@given(data=st.data(), **SIZES)
def test_a_padded_row_is_the_row_alone(data, kv_heads, group, queries, total, dim, seed, device):
    """Bit for bit on the CPU; and the contents of the padding are never read."""
    query, key = queries_and_keys(
        1, kv_heads * group, kv_heads, queries, total, dim, device=device, seed=seed
    )
    start = data.draw(st.integers(0, total - 1))
    alone = peak_attention(query, key[:, :, start:])
    key[:, :, :start] = torch.nan
    padded = peak_attention(query, key, start=torch.tensor([start], device=device))
    assert not padded[..., :start].any()
    if device == "cpu":
        assert_same_bits(padded[..., start:], alone)
    else:
        torch.testing.assert_close(padded[..., start:], alone)


@pytest.mark.parametrize("dtype", FLOATS)
def test_runs_and_threads_agree_bit_for_bit(dtype, device):
    query, key = queries_and_keys(2, 6, 3, 8, 4099, 64, device=device, dtype=dtype)
    start = torch.tensor([0, 1500], device=device)
    assert_same_bits_on_any_run(lambda: peak_attention(query, key, start=start))


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"query": _zeros(2, 3)}, r"query must .*, got \[2, 3\]", id="query-rank"),
        pytest.param({"key": _zeros(4, 16, 64)}, r"key must .*, got \[4, 16, 64\]", id="key-rank"),
        pytest.param(
            {"query": _zeros(2, 8, 4, 64).double()},
            "query must .*dtype.*, got float64",
            id="query-dtype",
        ),
        pytest.param(
            {"query": _zeros(2, 8, 4, 64).half()},
            "key must .*dtype float16.*, got float32",
            id="key-dtype",
        ),
        pytest.param({"key": _zeros(3, 4, 16, 64)}, "key must .*2 like query, got 3", id="batch"),
        pytest.param({"key": _zeros(2, 4, 16, 32)}, "key must .*64 like query, got 32", id="dim"),
        pytest.param({"key": _zeros(2, 3, 16, 64)}, "G must divide H = 8, got 3", id="group"),
        pytest.param(
            {"query": _zeros(2, 8, 64, 4).mT},
            r"query must be contiguous.*, got strides \[",
            id="query-strides",
        ),
        pytest.param(
            {"key": _zeros(2, 4, 64, 16).mT},
            r"key must be contiguous.*, got strides \[",
            id="key-strides",
        ),
        pytest.param({"running": _zeros(2, 4, 15)}, "running must .*15", id="running-shape"),
        pytest.param(
            {"running": _zeros(4, 16)}, r"running must .*, got \[4, 16\]", id="running-rank"
        ),
        pytest.param(
            {"running": _zeros(2, 4, 16).half()},
            "running must .*float32.*, got float16",
            id="running-dtype",
        ),
        pytest.param(
            {"running": _zeros(2, 16, 4).mT},
            r"running must be contiguous.*, got strides \[",
            id="running-strides",
        ),
        pytest.param(
            {"start": _zeros(3).long()}, "start must .*2 like query, got 3", id="start-shape"
        ),
        pytest.param({"start": _zeros(2)}, "start must .*dtype.*, got float32", id="start-dtype"),
    ],
)
def test_rejects(changes, message, device):
    call = {"query": _zeros(2, 8, 4, 64), "key": _zeros(2, 4, 16, 64)} | changes
    assert_refuses("peak_attention", call, message, device)


def test_rejects_a_mix_of_devices(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    query, key = queries_and_keys(1, 2, 1, 3, 8, 4, device=device)
    with pytest.raises(RuntimeError, match="peak_attention: key must be on the device of query"):
        peak_attention(query, key.cpu())
