"""hop_tokens: scores of the tokens that a chain of facts leads to."""

import math

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
    FLOATS,
    INDEX_TYPES,
    NANS,
    assert_as_exact_as_eager,
    assert_same_bits,
    assert_same_bits_on_any_run,
    chosen_from,
    normal,
)

hop_tokens = claa_ops.hop_tokens

SHAPES = [  # batch, context, window, pieces, dim, num_seeds
    pytest.param((1, 1, 0, 1, 1, 1), id="one-element"),
    pytest.param((2, 203, 5, 3, 40, 7), id="odd-sizes"),
    pytest.param((1, 2039, 8, 3, 64, 64), id="smollm2"),
    pytest.param((1, 4088, 8, 8, 128, 64), id="llama-8b"),
    pytest.param((2, 300, 8, 1, 576, 65), id="hidden-states"),
    pytest.param((1, 150, 0, 1, 8192, 16), id="wide-hidden-states"),
    pytest.param((2, 130, 1, 2, 16, 130), id="every-token-a-seed"),
    pytest.param((2, 20, 4, 2, 16, 64), id="fewer-tokens-than-seeds"),
    pytest.param((2, 0, 4, 2, 16, 64), id="no-tokens"),
    pytest.param((0, 30, 4, 2, 16, 64), id="empty-batch"),
]


def inputs(
    batch: int,
    context: int,
    window: int,
    pieces: int,
    dim: int,
    *,
    device: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Scores, and states as Hugging Face lays them out: [B, G, N, D] views of [B, N, G, D]."""
    scores = normal(batch, context, device=device, seed=seed)
    memory = (batch, context + window, pieces, dim)
    states = normal(*memory, device=device, dtype=dtype, seed=seed + 1) + 0.5  # a mean to take off
    return scores, states.transpose(1, 2)


def check_first_hop(scores: Tensor, states: Tensor, **options: object) -> Tensor:
    """As exact as eager PyTorch; half-width states are rounded by that, but not by us."""
    actual = assert_as_exact_as_eager("hop_tokens", scores, states, hops=1, **options)
    expected = reference.hop_tokens(scores.double(), states.double(), hops=1, **options)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-4, atol=1e-12)
    return actual


def check(
    scores: Tensor, states: Tensor, *, num_seeds: int, start: Tensor | None = None, **options
) -> Tensor:
    """Each hop is the first one from its seeds, to the bit; a first hop is as the reference says.

    The seeds are found from the result: where two scores are almost equal, rounding decides which
    token is a seed, and all that follows.
    """
    found = hop_tokens(scores, states, num_seeds=num_seeds, start=start, **options)
    if not found.numel():
        assert found.shape == (scores.shape[0], options.get("hops", 4), scores.shape[1])
        return found
    first = {name: value for name, value in options.items() if name != "hops"}
    check_first_hop(scores, states, num_seeds=num_seeds, start=start, **first)
    for b in range(scores.shape[0]):
        row = slice(b, b + 1)
        own_start = None if start is None else start[row]
        left = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
        if start is not None:
            left[: start[b]] = False
        rank = scores[b]
        for hop in range(found.shape[1]):
            count = min(num_seeds, int(left.sum()))
            seeds = best(rank, left, count)
            if count == 0:
                assert not found[b, hop].any()
                continue
            chosen = torch.zeros_like(scores[row])
            chosen[0, seeds] = 1.0
            seeded = {"hops": 1, "num_seeds": count, "start": own_start}
            alone = hop_tokens(chosen, states[row], **first, **seeded)
            assert_same_bits(found[row, hop : hop + 1], alone)
            left[seeds] = False
            rank = found[b, hop]
    return found


def best(rank: Tensor, left: Tensor, count: int) -> list[int]:
    """The best tokens of those that are left, without the reference."""
    order = [(math.isnan(r), 0.0 if math.isnan(r) else r) for r in rank.tolist()]
    positions = left.nonzero().flatten().tolist()
    return sorted(positions, key=lambda p: (*(-x for x in order[p]), p))[:count]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, device):
    *sizes, num_seeds = shape
    scores, states = inputs(*sizes, device=device, dtype=dtype)
    check(scores, states, num_seeds=num_seeds)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("pieces", "dim"),
    [(1, 1), (5, 1), (3, 5), (2, 8), (1, 24), (1, 40), (60, 32), (3, 96), (9, 128), (1, 1672)],
)
def test_any_length_of_a_state(pieces, dim, dtype, device):
    """On a GPU about a thousand channels of the seeds are read once, more for every tile."""
    check_first_hop(*inputs(2, 333, 3, pieces, dim, device=device, dtype=dtype), num_seeds=20)


@pytest.mark.parametrize("num_seeds", [1, 2, 8, 15, 16, 17, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("dtype", FLOATS)
def test_any_number_of_seeds(num_seeds, dtype, device):
    scores, states = inputs(2, 700, 3, 2, 32, device=device, dtype=dtype)
    check_first_hop(scores, states, num_seeds=num_seeds)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param({"start"}, id="start"),
        pytest.param({"gap"}, id="gap"),
        pytest.param({"temperature"}, id="temperature"),
        pytest.param({"pool_mode"}, id="max"),
        pytest.param({"kernel_size"}, id="kernel-size"),
        pytest.param({"start", "gap", "temperature", "pool_mode"}, id="everything"),
    ],
)
def test_options(names, dtype, device):
    """Rows: plain; padded; nine valid tokens; one; nothing but padding."""
    scores, states = inputs(5, 600, 4, 2, 40, device=device, dtype=dtype)
    options = {
        "start": torch.tensor([0, 137, 591, 599, 600], device=device),
        "gap": 100,
        "temperature": 0.025,
        "pool_mode": "max",
        "kernel_size": 601,
    }
    options = {name: options[name] for name in names}
    check(scores, states, num_seeds=24, **options)


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_start_is_of_either_index_type(index_type, device):
    scores, states = inputs(3, 60, 2, 2, 16, device=device)
    start = torch.tensor([0, 30, 60], device=device, dtype=index_type)
    check(scores, states, num_seeds=4, start=start)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_do_not_change_a_bit(dtype, device):
    scores = normal(4, 400, device=device)[::2, 50:250]
    states = normal(2, 3, 300, 67, device=device, dtype=dtype)[:, :, 50:260, 3:]
    strided = hop_tokens(scores, states, num_seeds=9, hops=1)
    packed = hop_tokens(scores.contiguous(), states.contiguous(), num_seeds=9, hops=1)
    if device == "cpu" or dtype == torch.float32:
        assert_same_bits(strided, packed)
    else:  # on CUDA tensor cores read a state by 16 bytes, and these are not aligned to that
        torch.testing.assert_close(strided, packed, rtol=1e-4, atol=0)


def test_a_tie_goes_to_the_lower_position(device):
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, -0.0, 0.0, torch.nan]], device=device)
    states = normal(1, 1, 7, 8, device=device)
    for num_seeds, seeds in ((1, [6]), (2, [1, 6]), (4, [0, 1, 3, 6]), (6, [0, 1, 2, 3, 4, 6])):
        chosen = torch.zeros_like(scores)
        chosen[0, seeds] = 1.0
        options = {"hops": 1, "num_seeds": num_seeds, "gap": 0, "kernel_size": 1}
        expected = hop_tokens(chosen, states, **options)
        assert_same_bits(hop_tokens(scores, states, **options), expected)


def test_follows_a_chain(device):
    """Each fact has one direction in common with the next one, and the seed with the first."""
    noise = normal(1, 1, 3000, 64, device=device, dtype=torch.bfloat16)
    directions = torch.linalg.qr(normal(64, 64, device=device).cpu().double()).Q
    places = [100, 2800, 700, 1900, 1400, 400]
    for link, (here, there) in enumerate(zip(places, places[1:], strict=False)):
        both = (40 * directions[link]).to(device, torch.bfloat16)
        noise[0, 0, here + 2] = noise[0, 0, there] = both
    scores = torch.zeros(1, 3000, device=device)
    scores[0, 102] = 1.0
    # A fact is found by its first token, and pooling takes in the one that names the next fact.
    # Links have no direction: a fact leads back to the one before it too.
    found = hop_tokens(scores, noise, hops=5, num_seeds=10, kernel_size=5)
    for hop, place in enumerate(places[1:]):
        tokens = found[0, hop].topk(10).indices.tolist()
        assert set(tokens) >= set(range(place - 2, place + 3)), hop


def test_tokens_without_a_direction_have_a_cosine_of_0(device):
    """All states are the mean: every link is one of as many as there are tokens beyond the gap."""
    scores, states = normal(1, 50, device=device), torch.full((1, 2, 50, 8), 3.0, device=device)
    scores[0, 20] = 9.0
    found = hop_tokens(scores, states, hops=1, num_seeds=1, gap=2, kernel_size=1)[0, 0]
    expected = torch.full((50,), 1 / 45, device=device)
    expected[18:23] = 0.0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_neither_padding_nor_the_window_is_read(dtype, device):
    scores, states = inputs(2, 400, 30, 2, 24, device=device, dtype=dtype)
    start = torch.tensor([0, 150], device=device)
    options = {"num_seeds": 10, "start": start}
    expected = hop_tokens(scores, states, **options)
    states, scores = states.clone(), scores.clone()
    states[:, :, 400:] = states[1, :, :150] = scores[1, :150] = torch.nan
    assert_same_bits(hop_tokens(scores, states, **options), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_stays_in_its_row(dtype, device):
    scores, states = inputs(3, 200, 4, 2, 16, device=device, dtype=dtype)
    expected = hop_tokens(scores, states, num_seeds=5, hops=1)
    states[1, 0, 77, 3] = torch.nan
    actual = hop_tokens(scores, states, num_seeds=5, hops=1)
    assert_same_bits(actual[::2], expected[::2])
    spread = reference.hop_tokens(scores, states, num_seeds=5, hops=1).isnan()
    assert spread.any()
    assert torch.equal(actual.isnan(), spread)


SIZES = {
    "context": st.integers(1, 80),
    "window": st.integers(0, 3),
    "pieces": st.integers(1, 3),
    "dim": st.integers(1, 20) | st.sampled_from([64, 72]),
    "num_seeds": st.integers(1, 20),
    "gap": st.integers(0, 12),
    "seed": st.integers(0, 2**16),
}


@given(data=st.data(), dtype=st.sampled_from([p.values[0] for p in FLOATS]), **SIZES)
def test_is_its_plain_definition(
    context, window, pieces, dim, num_seeds, gap, seed, data, dtype, device
):
    """The first hop, token by token in Python, without the reference."""
    _, states = inputs(1, context, window, pieces, dim, device=device, dtype=dtype, seed=seed)
    scores = chosen_from(AWKWARD + NANS, 1, context, device=device, seed=seed)
    start = data.draw(st.integers(0, context), label="start")
    temperature = data.draw(st.sampled_from([0.025, 0.1, 1.0, 50.0]), label="temperature")
    actual = hop_tokens(
        scores,
        states,
        hops=1,
        num_seeds=num_seeds,
        temperature=temperature,
        gap=gap,
        kernel_size=1,
        start=torch.tensor([start], device=device),
    )[0, 0]
    x = states[0, :, :context].transpose(0, 1).flatten(1).double().cpu()
    x = x - x[start:].mean(dim=0)
    length = x.norm(dim=-1)
    tokens = range(start, context)
    left = torch.arange(context) >= start
    expected = [0.0] * context
    for s in best(scores[0], left, num_seeds):
        far = [j for j in tokens if abs(j - s) > gap]
        # A single token is its own mean, but for the rounding of a sum and a division.
        cosine = {
            j: (x[s] @ x[j] / (length[s] * length[j])).item() if len(tokens) > 1 else 0.0
            for j in far
        }
        weight = {j: math.exp((cosine[j] - 1) / temperature) for j in far}
        for j in far:
            expected[j] = max(expected[j], weight[j] / sum(weight.values()))
    torch.testing.assert_close(
        actual.cpu().double(), torch.tensor(expected).double(), rtol=2e-3, atol=1e-9
    )


@given(**SIZES)
def test_links_are_shares(context, window, pieces, dim, num_seeds, gap, seed, device):
    """One seed's links sum to 1, if any token is beyond its gap; those of many to at most many."""
    scores, states = inputs(2, context, window, pieces, dim, device=device, seed=seed)
    options = {"hops": 1, "gap": gap, "kernel_size": 1}
    one = hop_tokens(scores, states, num_seeds=1, **options)[:, 0]
    many = hop_tokens(scores, states, num_seeds=num_seeds, **options)[:, 0]
    assert one.ge(0).all() and many.ge(one).all() and many.le(1 + 1e-6).all()
    assert many.double().sum(-1).le(num_seeds * (1 + 1e-5)).all()
    position = torch.arange(context, device=device)
    is_far = (position - scores.argmax(dim=-1, keepdim=True)).abs() > gap
    torch.testing.assert_close(one.sum(-1), is_far.any(dim=-1).float(), rtol=1e-5, atol=0)
    assert not one[~is_far].any()


@given(hops=st.integers(1, 5), **SIZES)
def test_later_hops_do_not_change_earlier_ones(
    context, window, pieces, dim, num_seeds, gap, seed, hops, device
):
    """And each one is the first hop of its seeds, which are new ones."""
    scores, states = inputs(2, context, window, pieces, dim, device=device, seed=seed)
    options = {"num_seeds": num_seeds, "gap": gap, "kernel_size": 5}
    found = check(scores, states, hops=hops, **options)
    assert_same_bits(hop_tokens(scores, states, hops=hops + 1, **options)[:, :hops], found)


@given(scale=st.sampled_from([0.125, 2.0, 64.0]), **SIZES)
def test_only_directions_count(context, window, pieces, dim, num_seeds, gap, seed, scale, device):
    scores, states = inputs(2, context, window, pieces, dim, device=device, seed=seed)
    options = {"num_seeds": num_seeds, "gap": gap}
    assert_same_bits(
        hop_tokens(scores, states * scale, **options), hop_tokens(scores, states, **options)
    )


@given(data=st.data(), batch=st.integers(1, 3), **SIZES)
def test_a_row_does_not_know_its_batch(
    data, batch, context, window, pieces, dim, num_seeds, gap, seed, device
):
    scores, states = inputs(batch, context, window, pieces, dim, device=device, seed=seed)
    starts = data.draw(st.lists(st.integers(0, context), min_size=batch, max_size=batch))
    start = torch.tensor(starts, device=device)
    options = {"num_seeds": num_seeds, "gap": gap, "kernel_size": 3}
    together = hop_tokens(scores, states, start=start, **options)
    for b in range(batch):
        row = slice(b, b + 1)
        alone = hop_tokens(scores[row], states[row], start=start[row], **options)
        assert_same_bits(together[row], alone)


@given(
    padding=st.integers(1, 700),
    dtype=st.sampled_from([p.values[0] for p in FLOATS]),
    pool_mode=st.sampled_from(["avg", "max"]),
    **SIZES | {"context": st.integers(1, 900)},
)
def test_a_padded_row_is_the_row_alone(
    padding, dtype, pool_mode, context, window, pieces, dim, num_seeds, gap, seed, device
):
    sizes = (1, padding + context, window, pieces, dim)
    scores, states = inputs(*sizes, device=device, dtype=dtype, seed=seed)
    options = {"num_seeds": num_seeds, "gap": gap, "pool_mode": pool_mode}
    alone = hop_tokens(scores[:, padding:], states[:, :, padding:], **options)
    start = torch.tensor([padding], device=device)
    padded = hop_tokens(scores, states, start=start, **options)
    assert not padded[..., :padding].any()
    assert_same_bits(padded[..., padding:], alone)


@pytest.mark.parametrize("dtype", FLOATS)
def test_runs_and_threads_agree_bit_for_bit(dtype, device):
    scores, states = inputs(2, 4091, 8, 3, 64, device=device, dtype=dtype)
    start = torch.tensor([0, 1500], device=device)
    assert_same_bits_on_any_run(lambda: hop_tokens(scores, states, start=start))


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"scores": _zeros(9)}, r"scores must .*\[B, M\], got \[9\]", id="scores-rank"),
        pytest.param({"states": _zeros(2, 9, 8)}, r"states must .*, got \[", id="states-rank"),
        pytest.param(
            {"scores": _zeros(2, 9).half()},
            "scores must have dtype float32, got float16",
            id="scores-dtype",
        ),
        pytest.param(
            {"states": _zeros(2, 3, 12, 8).double()},
            "states must have dtype .*, got float64",
            id="states-dtype",
        ),
        pytest.param(
            {"states": _zeros(3, 3, 12, 8)}, "states must have B = 2 like scores", id="batch"
        ),
        pytest.param({"states": _zeros(2, 3, 8, 8)}, "N must be at least M = 9, got 8", id="total"),
        pytest.param({"states": _zeros(2, 0, 12, 8)}, "G must be at least 1, got 0", id="pieces"),
        pytest.param({"states": _zeros(2, 3, 12, 0)}, "D must be at least 1, got 0", id="dim"),
        pytest.param(
            {"scores": _zeros(9, 2).mT},
            r"scores must be contiguous.*, got strides \[1, 2\]",
            id="scores-strides",
        ),
        pytest.param(
            {"states": _zeros(2, 3, 8, 12).mT},
            r"states must be contiguous.*, got strides \[",
            id="states-strides",
        ),
        pytest.param({"hops": 0}, "hops must be at least 1, got 0", id="hops"),
        pytest.param({"num_seeds": 0}, "num_seeds must be at least 1, got 0", id="num-seeds"),
        pytest.param(
            {"temperature": 0.02}, "temperature must be at least 0.025, got 0.02", id="temperature"
        ),
        pytest.param(
            {"temperature": math.nan}, "temperature must be at least 0.025, got nan", id="nan"
        ),
        pytest.param({"gap": -1}, "gap must not be negative, got -1", id="gap"),
        pytest.param({"kernel_size": 4}, "kernel_size must be odd and .*, got 4", id="kernel-size"),
        pytest.param(
            {"start": _zeros(3).long()}, "start must .*2 like scores, got 3", id="start-shape"
        ),
        pytest.param({"start": _zeros(2)}, "start must .*dtype.*, got float32", id="start-dtype"),
    ],
)
def test_rejects(changes, message, device):
    call = {"scores": _zeros(2, 9), "states": _zeros(2, 3, 12, 8)} | changes
    assert_refuses("hop_tokens", call, message, device)


def test_rejects_an_unknown_pool_mode(device):
    scores, states = inputs(1, 9, 0, 1, 4, device=device)
    with pytest.raises(ValueError, match="pool_mode must be one of avg, max; got 'sum'"):
        hop_tokens(scores, states, pool_mode="sum")


def test_rejects_a_mix_of_devices(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    scores, states = inputs(1, 9, 0, 1, 4, device=device)
    with pytest.raises(RuntimeError, match="hop_tokens: states must be on the device of scores"):
        hop_tokens(scores, states.cpu())
