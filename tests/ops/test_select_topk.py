"""select_topk: ascending positions of the tokens to keep."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    vector_key,
    vector_query,
)

select_topk = claa_ops.select_topk

SHAPES = [  # shape of scores, k, window
    pytest.param((1,), 1, 0, id="one-element"),
    pytest.param((2, 3, 257), 40, 5, id="odd-sizes"),
    pytest.param((1, 3, 2039), 204, 8, id="smollm2"),
    pytest.param((1, 8, 4088), 409, 8, id="llama-8b"),
    pytest.param((1, 8, 4088), 4096, 8, id="keep-all"),
    pytest.param((2, 300), 0, 8, id="keep-none"),
    pytest.param((2, 300), 8, 8, id="window-alone"),
    pytest.param((2, 300), 3, 8, id="less-than-the-window"),
    pytest.param((2, 0), 4, 8, id="empty-context"),
    pytest.param((2, 0), 0, 0, id="empty-everything"),
    pytest.param((0, 50), 5, 2, id="empty-batch"),
    pytest.param((2, 2, 2, 33), 9, 1, id="four-dimensions"),
    pytest.param((1, 70_001), 7001, 8, id="long"),
    # On CUDA a row is read by one block, or shared by several: both sides of each limit.
    pytest.param((3, 8189), 800, 8, id="one-block-full"),
    pytest.param((3, 8190), 800, 8, id="small-cluster"),
    pytest.param((3, 32_765), 3000, 0, id="small-cluster-full"),
    pytest.param((1, 131_069), 13_000, 8, id="large-cluster-full"),
    pytest.param((1, 131_071), 13_000, 8, id="blocks-that-meet-in-memory"),
]


def check(scores: torch.Tensor, k: int, **options: object) -> torch.Tensor:
    actual = select_topk(scores, k, **options)
    # On the CPU: torch sorts a NaN with the sign bit last on CUDA.
    on_cpu = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    expected = reference.select_topk(scores.cpu(), k, **on_cpu).to(scores.device)
    assert actual.dtype == expected.dtype
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)
    return actual


@pytest.mark.parametrize("int32", [False, True], ids=["int64", "int32"])
@pytest.mark.parametrize(("shape", "k", "window"), SHAPES)
def test_matches_reference(shape, k, window, int32, device):
    check(normal(*shape, device=device), k, window=window, int32=int32)


@pytest.mark.parametrize("k", [0, 1, 5, 6, 7, 12, 40, 100, 140, 141, 145, 148])
@pytest.mark.parametrize("num_sinks", [0, 1, 4, 200])
@pytest.mark.parametrize("window", [0, 1, 8])
def test_sinks_and_padding(window, num_sinks, k, device):
    """Rows: plain; padded; the last token alone is valid; nothing but padding; start in window."""
    start = torch.tensor([0, 30, 139, 140, 143], device=device)
    scores = chosen_from((0.0, 1.0, 2.0, -1.0), 5, 2, 140, device=device, seed=k)
    check(scores, min(k, 140 + window), window=window, num_sinks=num_sinks, start=start)


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_start_is_of_either_index_type(index_type, device):
    start = torch.tensor([0, 20], device=device, dtype=index_type)
    check(normal(2, 3, 50, device=device), 35, window=3, num_sinks=2, start=start)


def test_reads_strided_scores(device):
    wide = normal(4, 6, 90, device=device)
    for scores in (wide[::2, 1::2, 5:70], wide.transpose(0, 1), wide[:1, :1].expand(3, 2, 90)):
        check(scores, 20, window=4)


def test_a_tie_goes_to_the_lower_position(device):
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 1.0], device=device)
    assert select_topk(scores, 4).tolist() == [0, 1, 2, 3]
    zeros = torch.tensor([-0.0, 0.0, -0.0, 0.0], device=device)  # equal, whatever their sign
    assert select_topk(zeros, 2).tolist() == [0, 1]
    nans = torch.tensor([torch.inf, -torch.nan, 1.0, torch.nan], device=device)
    assert select_topk(nans, 2).tolist() == [1, 3]
    assert select_topk(torch.zeros(5000, device=device), 2500).tolist() == list(range(2500))


def test_padding_comes_last_whatever_its_score(device):
    scores = torch.tensor([[torch.nan, torch.inf, 9.0, -torch.inf, -3.0]], device=device)
    start = torch.tensor([3], device=device)
    assert select_topk(scores, 2, start=start).tolist() == [[3, 4]]
    assert select_topk(scores, 4, start=start).tolist() == [[0, 1, 3, 4]]


def test_check_values(device):
    """The keep sets of CLAA, FastKV and SnapKV on the published check values."""
    layers = [
        claa_ops.score_tokens(
            vector_query(layer, 12, 15).to(device), vector_key(layer).to(device), kernel_size=3
        )
        for layer in range(3)
    ]
    window = [12, 13, 14, 15]
    claa = torch.stack(layers).amax(dim=(0, 2))
    assert select_topk(claa, 9, window=4).tolist() == [[2, 3, 4, 6, 7, *window]]
    fastkv = layers[2].sum(dim=1)
    assert select_topk(fastkv, 9, window=4).tolist() == [[2, 3, 6, 7, 10, *window]]
    kept = [[[2, 6, 10, *window], [2, 3, 6, *window]]]
    assert select_topk(layers[2], 7, window=4).tolist() == kept


@given(
    values=st.lists(st.sampled_from(AWKWARD + NANS), min_size=1, max_size=60),
    window=st.integers(0, 8),
    num_sinks=st.integers(0, 6),
    data=st.data(),
)
def test_keeps_the_best_the_window_and_the_sinks(values, window, num_sinks, data, device):
    """The promises of the docstring, one by one, without the reference."""
    context = len(values)
    start = data.draw(st.integers(0, context), label="start")
    k = data.draw(st.integers(0, context + window), label="k")
    scores = torch.tensor([values], device=device)
    kept = select_topk(
        scores, k, window=window, num_sinks=num_sinks, start=torch.tensor([start], device=device)
    )[0].tolist()
    dropped = sorted(set(range(context + window)) - set(kept))

    assert len(kept) == k
    assert kept == sorted(set(kept))
    assert all(0 <= p < context + window for p in kept)

    def rank(p: int) -> tuple:
        """Greater is better; unlike the reference, nothing is sorted."""
        if p >= context:
            return (3, p, 0)
        if p < start:
            return (0, 0, -p)
        if p < start + num_sinks:
            return (2, -p, 0)
        value = values[p]
        return (1, (1, 0) if value != value else (0, value), -p)

    if kept and dropped:
        assert min(map(rank, kept)) > max(map(rank, dropped))


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    context=st.integers(0, 300),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_a_row_does_not_know_its_batch(batch, heads, context, seed, data, device):
    scores = chosen_from(AWKWARD + NANS, batch, heads, context, device=device, seed=seed)
    k = data.draw(st.integers(0, context + 2), label="k")
    starts = data.draw(st.lists(st.integers(0, context), min_size=batch, max_size=batch))
    start = torch.tensor(starts, device=device)
    together = check(scores, k, window=2, num_sinks=1, start=start)
    for b in range(batch):
        alone = select_topk(scores[b], k, window=2, num_sinks=1, start=start[b].repeat(heads))
        assert torch.equal(together[b], alone)


@given(
    context=st.integers(1, 200),
    start=st.integers(0, 100),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_a_padded_row_is_the_row_alone(context, start, seed, data, device):
    k = data.draw(st.integers(0, context + 3), label="k")
    padded = normal(1, start + context, device=device, seed=seed).round()
    alone = select_topk(padded[:, start:], k, window=3, num_sinks=2)
    start_at = torch.tensor([start], device=device)
    assert torch.equal(select_topk(padded, k, window=3, num_sinks=2, start=start_at), alone + start)


@given(
    context=st.integers(1, 200),
    batch=st.integers(1, 4),
    window=st.integers(0, 8),
    num_sinks=st.integers(0, 4),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_each_row_keeps_its_count_and_is_the_row_alone(
    context, batch, window, num_sinks, seed, data, device
):
    """Rows of different lengths and different counts: what each keeps alone, after -1."""
    starts = data.draw(st.lists(st.integers(0, context), min_size=batch, max_size=batch))
    rate = data.draw(st.floats(0, 1), label="rate")
    lengths = [context + window - start for start in starts]
    counts = [int(length * rate) for length in lengths]
    k = int((context + window) * rate)
    scores = chosen_from(AWKWARD + NANS, batch, 2, context, device=device, seed=seed)
    together = check(
        scores,
        k,
        window=window,
        num_sinks=num_sinks,
        start=torch.tensor(starts, device=device),
        counts=torch.tensor(counts, device=device, dtype=torch.int32),
    )
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
        alone = select_topk(scores[b, :, start:], count, window=window, num_sinks=num_sinks) + start
        assert torch.equal(together[b, :, k - count :], alone)
        assert (together[b, :, : k - count] == -1).all()


@pytest.mark.parametrize("start", [None, 0, 4, 17, 40])
@pytest.mark.parametrize("tokens", [40, 20_000])
def test_any_count(tokens, start, device):
    """Negative, less than the window, less than window and sinks, beyond the valid, beyond k."""
    counts = torch.tensor([-3, 0, 2, 6, 7, 20, 31, 1000], device=device)
    scores = normal(8, 3, tokens, device=device)
    options = {} if start is None else {"start": torch.full((8,), start, device=device)}
    check(scores, 30, window=5, num_sinks=2, counts=counts, **options)


@given(
    context=st.integers(1, 400),
    seed=st.integers(0, 2**16),
    window=st.integers(0, 4),
    data=st.data(),
)
def test_a_larger_k_keeps_what_a_smaller_one_kept(context, seed, window, data, device):
    scores = chosen_from(AWKWARD + NANS, context, device=device, seed=seed)
    sizes = st.integers(0, context + window)
    small, large = sorted(data.draw(st.tuples(sizes, sizes), label="sizes"))
    few = select_topk(scores, small, window=window).tolist()
    assert set(few) <= set(select_topk(scores, large, window=window).tolist())


@pytest.mark.parametrize(
    "values", [(0.0,), (1.0, 2.0), AWKWARD + NANS], ids=["one-value", "two-values", "awkward"]
)
@pytest.mark.parametrize("k", [1, 1000, 4095, 19_990])
def test_long_rows_of_ties(values, k, device):
    check(chosen_from(values, 2, 20_000, device=device, seed=k), k)


def test_neighbouring_floats_are_distinguished(device):
    """Every bit counts: 40,000 consecutive floats, around 1 and from zero up."""
    for first in (0x3F800000 - 20_000, 0):
        bits = torch.arange(first, first + 40_000, dtype=torch.int32)
        shuffled = bits[torch.randperm(40_000, generator=torch.Generator().manual_seed(0))]
        scores = shuffled.view(torch.float32).to(device)
        check(scores, 12_345)
        check(-scores, 12_345)


def test_runs_and_threads_agree_bit_for_bit(device):
    scores = normal(2, 4, 30_001, device=device).round(decimals=2)
    start = torch.tensor([0, 700], device=device)
    assert_same_bits_on_any_run(
        lambda: select_topk(scores, 5000, window=8, num_sinks=4, start=start)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"scores": torch.tensor(1.0)}, r"scores must .*, got (\[\]|a scalar)", id="rank"
        ),
        pytest.param(
            {"scores": torch.zeros(2, 9).double()},
            "scores must have dtype float32, got float64",
            id="dtype",
        ),
        pytest.param(
            {"scores": torch.zeros(9, 2).T},
            r"scores must be contiguous.*, got strides \[1, 2\]",
            id="strides",
        ),
        pytest.param(
            {"k": 12}, r"k must be in \[0, M \+ window\] = \[0, 11\], got 12", id="k-too-large"
        ),
        pytest.param({"k": -1}, r"k must be in \[0, .*, got -1", id="k-negative"),
        pytest.param({"window": -1}, "window must .*, got -1", id="window-negative"),
        pytest.param({"num_sinks": -1}, "num_sinks must .*, got -1", id="num_sinks-negative"),
        pytest.param(
            {"start": torch.zeros(3).long()}, "start must .*2 like scores, got 3", id="start-size"
        ),
        pytest.param(
            {"start": torch.zeros(2, 1).long()}, r"start must .*, got \[2, 1\]", id="start-rank"
        ),
        pytest.param(
            {"start": torch.zeros(2)}, "start must .*dtype.*, got float32", id="start-dtype"
        ),
        pytest.param(
            {"scores": torch.zeros(9), "counts": torch.zeros(9).long()},
            r"(counts|scores) (must|needs) .*, got \[9\]",
            id="counts-without-batch",
        ),
        pytest.param(
            {"counts": torch.zeros(3).long()},
            "counts must .*2 like scores, got 3",
            id="counts-size",
        ),
        pytest.param(
            {"counts": torch.zeros(2)},
            "counts must .*dtype.*, got float32",
            id="counts-dtype",
        ),
        pytest.param(
            {"scores": torch.zeros(9), "start": torch.zeros(9).long()},
            r"(start|scores) (must|needs) .*, got \[9\]",
            id="start-without-batch",
        ),
    ],
)
def test_rejects(changes, message, device):
    call = {"scores": torch.zeros(2, 9), "k": 4, "window": 2} | changes
    assert_refuses("select_topk", call, message, device)


def test_rejects_a_mix_of_devices(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    with pytest.raises(RuntimeError, match="select_topk: start must be on the device of scores"):
        select_topk(torch.zeros(2, 9, device=device), 4, start=torch.zeros(2).long())
