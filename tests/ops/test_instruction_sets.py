"""The CPU kernels are built once per instruction set: every build that this machine runs is right.

The other tests run only the best one.
"""

from collections.abc import Iterator

import pytest
import torch

import claa_ops
from claa_ops import reference
from support import window_cases as cases
from support.inputs import (
    AWKWARD,
    FLOATS,
    NANS,
    assert_as_exact_as_eager,
    assert_same_bits,
    assert_same_bits_on_any_run,
    chosen_from,
    normal,
    queries_and_keys,
)
from support.model_calls import MAKERS, PACKED, UPDATED
from support.pages import in_pages

ISAS = ["plain", "avx2", "avx512", "avx512_bf16"]
BEST = torch.ops.claa._cpu_isa(-1)


@pytest.fixture(params=ISAS, autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    number = ISAS.index(request.param)
    if number > BEST:
        pytest.skip(f"this processor has no {request.param}")
    assert torch.ops.claa._cpu_isa(number) == number
    yield request.param
    torch.ops.claa._cpu_isa(BEST)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options", [case for case in cases.OPTIONS if case.id in ("plain", "softcap", "everything")]
)
def test_scores(options, dtype):
    query, key = queries_and_keys(*cases.OPTION_SHAPE, device="cpu", dtype=dtype)
    options = cases.as_tensors(options, "cpu")
    for lse in (None, cases.log_sum_exp(query, key, **options)):
        assert_as_exact_as_eager("score_window", query, key, lse=lse, **options)
        assert_as_exact_as_eager("score_tokens", query, key, lse=lse, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [1, 3, 15, 16, 17, 80, 256])
def test_any_head_dim(dim, dtype):
    """Rounding grows with the length of a product; 16 rows make the largest error a steady one."""
    query, key = queries_and_keys(16, 4, 2, 5, 133, dim, device="cpu", dtype=dtype)
    for op in ("score_window", "score_tokens", "peak_attention"):
        assert_as_exact_as_eager(op, query, key)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [1, 3, 15, 16, 17, 80, 256])
@pytest.mark.parametrize("num_seeds", [1, 9, 64])
def test_hops(num_seeds, dim, dtype):
    scores = normal(2, 600, device="cpu")
    states = normal(2, 2, 605, dim, device="cpu", dtype=dtype, seed=1)
    assert_as_exact_as_eager("hop_tokens", scores, states, hops=1, num_seeds=num_seeds)


@pytest.mark.parametrize("pool_mode", ["avg", "max"])
@pytest.mark.parametrize("context", [1, 7, 8, 9, 100])
def test_pools(context, pool_mode):
    assert_as_exact_as_eager(
        "pool_heads", normal(2, 6, context, device="cpu"), 2, pool_mode=pool_mode
    )


@pytest.mark.parametrize("context", [1, 7, 16, 33, 1000])
def test_exact_ops_agree_with_the_reference(context):
    scores = chosen_from(AWKWARD + NANS, 3, 2, context, device="cpu", seed=context)
    k = context // 2
    kept = claa_ops.select_topk(scores, k + 3, window=3)
    assert torch.equal(kept, reference.select_topk(scores, k + 3, window=3))
    running = normal(3, context, device="cpu")
    assert_same_bits(
        claa_ops.aggregate_scores(running, scores), reference.aggregate_scores(running, scores)
    )
    torch.testing.assert_close(
        claa_ops.rank_variance(scores, k),
        reference.rank_variance(scores.double(), k).float(),
        rtol=2e-7,
        atol=0,
    )
    query, key = queries_and_keys(3, 4, 2, 5, context + 5, 16, device="cpu")
    expected = claa_ops.aggregate_scores(running, claa_ops.score_tokens(query, key))
    claa_ops.score_layer(running, query, key)
    assert_same_bits(running, expected)
    x = normal(3, context + 3, 5, device="cpu")
    rows = claa_ops.gather_tokens(x, kept[:, 0])
    assert torch.equal(rows, reference.gather_tokens(x, kept[:, 0]))
    cache = x[:, None].expand(3, 2, context + 3, 5)
    actual, expected = (f(cache, cache, kept) for f in (claa_ops.gather_kv, reference.gather_kv))
    assert all(map(torch.equal, actual, expected))


PACKED_CALLS = [p for p in MAKERS if p.values[0](2, 60, "cpu", 0).op in PACKED]


@pytest.mark.parametrize("make", PACKED_CALLS)
def test_ops_on_packed_prompts_agree_with_the_reference(make):
    call = make(3, 523, "cpu", 0)
    actual, count = call(), UPDATED[call.op]
    expected = tuple(x.clone() for x in call.args[:count])
    getattr(reference, call.op)(*expected, *call.args[count:], **call.options)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("dtype", FLOATS)
def test_keys_in_pages(dtype):
    """As the ops for keys in rows, and e4m3 keys as the numbers that they are."""
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[(numbers & 0x7F) != 0x7F].repeat(10)[: 30 * 2 * 40].view(30, 2, 40)
    narrow = numbers.view(torch.float8_e4m3fn)
    query = normal(1, 8, 4, 40, device="cpu", dtype=dtype) / 100
    key = narrow.to(dtype).transpose(0, 1)[None]
    window = query.transpose(1, 2)
    expected, scores, peaks = (torch.zeros(1, 22), torch.zeros(1, 22), torch.zeros(1, 8, 30))
    claa_ops.score_layer(expected, window, key)
    claa_ops.score_layer_paged(scores, query, *in_pages([narrow], 16))
    claa_ops.peak_attention_paged(peaks, query, *in_pages([narrow], 16))
    assert_same_bits(scores, expected)
    assert_same_bits(peaks, claa_ops.peak_attention(window, key))


def test_nan_stays():
    query, key = queries_and_keys(2, 4, 2, 5, 60, 16, device="cpu")
    key[1, 0, 20, 3] = torch.nan
    for op in ("score_window", "score_tokens", "peak_attention"):
        actual, expected = getattr(claa_ops, op)(query, key), getattr(reference, op)(query, key)
        assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("op", ["score_window", "score_tokens", "peak_attention"])
def test_a_padded_row_is_the_row_alone(op):
    query, key = queries_and_keys(1, 4, 2, 8, 700, 32, device="cpu")
    for start in (1, 8, 333):
        alone = getattr(claa_ops, op)(query, key[:, :, start:])
        padded = getattr(claa_ops, op)(query, key, start=torch.tensor([start]))
        assert_same_bits(padded[..., start:], alone)


@pytest.mark.parametrize("op", ["score_window", "score_tokens", "peak_attention"])
def test_runs_and_threads_agree_bit_for_bit(op):
    query, key = queries_and_keys(2, 6, 3, 8, 2099, 40, device="cpu")
    assert_same_bits_on_any_run(lambda: getattr(claa_ops, op)(query, key))
