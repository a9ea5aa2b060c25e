"""Protected tokens: no layer and no cache drops one, and budgets are of the others."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claa_ops import prefill
from claa_ops.methods import (
    CLAA,
    METHODS,
    FastKV,
    GemFilter,
    Hops,
    LazyLLM,
    Peak,
    SelectiveContext,
    SinksRandom,
    SpeculativePrefill,
    make_method,
)
from claa_ops.selection import Budget
from support.prefill_trace import DIM, GROUPS, HEADS, LAYERS, trace_over

from .test_invariants import PADDED

SERVED = [name for name in PADDED if "revived" not in name]


def drawn(batch, length, seed=0):
    """Queries and keys of each layer, and a ranking."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    query, key = (
        torch.randn(LAYERS, batch, heads, length, DIM, generator=generator)
        for heads in (HEADS, GROUPS)
    )
    return query, key, torch.rand(batch, length, generator=generator)


def masks(batch, length, shares, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, length, generator=generator) < torch.tensor(shares)[:, None]


def kept_of(trace, row, begin):
    """What continues of a row, from its first token on."""
    kept = trace.state.positions
    tokens = torch.arange(trace.state.prompt_length) if kept is None else kept[row]
    return tokens[tokens >= begin] - begin


@pytest.mark.parametrize("name", SERVED)
@settings(max_examples=25)
@given(
    first=st.floats(0.02, 1.0),
    second=st.floats(0.02, 1.0),
    length=st.integers(10, 110),
    rows=st.lists(
        st.tuples(st.integers(0, 100), st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 99),
)
def test_a_row_keeps_all_of_them_and_what_it_keeps_alone(name, first, second, length, rows, seed):
    """Whether rows are padded or all are as long and keep different numbers."""
    method = dataclasses.replace(PADDED[name](first, second), kernel_size=3)
    padding, shares = zip(*rows, strict=True)
    start = torch.tensor([min(n, length - 10) for n in padding])
    query, key, ranking = drawn(len(rows), length, seed)
    protect = masks(len(rows), length, shares, seed)
    given_start = start if start.any() else None
    together = trace_over(method, query, key, ranking, given_start, protect)
    for row, begin in enumerate(start.tolist()):
        one = slice(row, row + 1)
        cut = [x[:, one, :, begin:] for x in (query, key)]
        mask = protect[one, begin:]
        alone = trace_over(method, *cut, ranking[one, begin:], None, mask)
        sure = mask[0].nonzero()[:, 0]
        assert torch.isin(sure, kept_of(alone, 0, 0)).all()
        assert torch.equal(kept_of(together, row, begin), kept_of(alone, 0, 0))
        for held, expected in zip(together.held, alone.held, strict=True):
            assert all(torch.isin(sure, head).all() for head in expected[0])
            assert torch.equal(held[row][held[row] >= begin].view(GROUPS, -1) - begin, expected[0])


@pytest.mark.parametrize("name", SERVED)
@settings(max_examples=10)
@given(rate=st.floats(0.05, 1.0), length=st.integers(10, 110), padding=st.integers(0, 100))
def test_a_row_without_any_keeps_what_it_keeps_without_protection(name, rate, length, padding):
    method = dataclasses.replace(PADDED[name](rate, 0.4), kernel_size=3)
    start = torch.tensor([0, min(padding, length - 10)])
    query, key, ranking = drawn(2, length)
    protect = masks(2, length, [0.4, 0.0])
    plain = trace_over(method, query, key, ranking, start)
    one = trace_over(method, query, key, ranking, start, protect)
    none = trace_over(method, query, key, ranking, start, torch.zeros_like(protect))
    for row, begin in enumerate(start.tolist()):
        assert torch.equal(kept_of(none, row, begin), kept_of(plain, row, begin))
        for held, expected in zip(none.held, plain.held, strict=True):
            kept, wanted = (x[row][x[row] >= begin] for x in (held, expected))
            assert torch.equal(kept, wanted)
    begin = int(start[1])
    assert torch.equal(kept_of(one, 1, begin), kept_of(plain, 1, begin))


@settings(max_examples=60)
@given(
    st.sampled_from([CLAA, FastKV, Peak, Hops, SinksRandom, LazyLLM]),
    st.integers(1, 120),
    st.one_of(st.floats(0.02, 1.0), st.integers(9, 60)),
    st.sampled_from([0.0, 0.05, 0.3, 0.9]),
    st.integers(0, 9),
)
def test_the_others_are_the_best_ones_as_many_as_the_budget_says(kind, length, keep, share, seed):
    """Against a slow selection from the ranking."""
    window, sinks = 5, 4 if kind is SinksRandom else 0
    method = kind(keep=keep, layer=2, window=window, num_sinks=sinks)
    query, key, ranking = drawn(1, length, seed)
    protect = masks(1, length, [share], seed)
    trace = trace_over(method, query, key, ranking, None, protect)

    past = max(0, length - window)
    sure = {token for token in range(past) if protect[0, token]}
    if protect.any():
        sure |= set(range(min(sinks, past)))
    # Without any the sinks are of the budget.
    beside = set() if protect.any() else set(range(min(sinks, past)))
    if trace.state.positions is None:  # nothing had to be dropped
        assert Budget.of(keep).tokens(length, window) >= length
        return
    budget = Budget.of(keep).tokens(length - len(sure), window)
    best = sorted(set(range(past)) - sure - beside, key=lambda t: -trace.state.importance[0, t])
    best = best[: max(0, min(budget, length - len(sure)) - len(beside) - window)]
    expected = sorted(sure | beside | set(best)) + list(range(past, length))
    assert trace.state.positions[0].tolist() == expected


def test_staged_selections_keep_them_all_the_way():
    method = CLAA(keep=(0.5, 0.3, 0.1), layer=(0, 2, 4), keep_kv=0.05, first_full=0, window=5)
    query, key, ranking = drawn(1, 100)
    protect = torch.zeros(1, 100, dtype=torch.bool)
    protect[0, 10:40] = True
    trace = trace_over(method, query, key, ranking, None, protect)
    others = [Budget.of(rate).tokens(70, 5) for rate in (0.5, 0.3, 0.1)]
    assert trace.seen == [100, *[30 + n for n in others for _ in range(2)]][:LAYERS]
    assert [held.shape[2] for held in trace.held] == [30 + 5] * LAYERS


def test_what_a_part_ran_ahead_of_is_not_in_its_way():
    """A part of Coarse is thrown away: it runs no protected tokens that it would not run."""
    query, key, ranking = drawn(1, 100)
    protect = torch.ones(1, 100, dtype=torch.bool)
    method = make_method("coarse", num_layers=LAYERS, keep=0.2)
    trace = trace_over(method, query, key, ranking, None, protect)
    plain = trace_over(method, query, key, ranking, None)
    assert trace.state.ahead == plain.state.ahead
    assert trace.state.length == 100


def test_two_passes_read_them():
    protect = masks(2, 80, [0.2, 0.5])
    query, key, _ = drawn(2, 80)
    method = GemFilter(keep=0.1, layer=1)
    state = prefill.begin(
        method, num_layers=LAYERS, prompt_length=80, protect=protect, first_pass=True
    )
    for layer in (0, 1):
        state.observe(layer, query[layer], key[layer])
        state.compress(layer, key[layer], key[layer])
        index = state.select(layer)
    for row, mask in enumerate(protect):
        assert torch.isin(mask.nonzero()[:, 0], index[row]).all()
        others = 80 - int(mask.sum())
        assert (index[row] >= 0).sum() == mask.sum() + max(1, others // 10)


@pytest.mark.parametrize("chunk", [None, 8])
def test_a_ranking_by_a_draft_keeps_them(chunk):
    protect = masks(1, 90, [0.2])
    ranking = torch.rand(1, 90, generator=torch.Generator().manual_seed(0))
    state = prefill.begin(
        SpeculativePrefill(keep=0.3, chunk=chunk),
        num_layers=LAYERS,
        prompt_length=90,
        ranking=ranking,
        protect=protect,
        first_pass=True,
    )
    kept = state.choose()[0]
    assert torch.isin(protect[0].nonzero()[:, 0], kept).all() and len(kept) < 90


def test_selective_context_keeps_them():
    protect = masks(1, 90, [0.3])
    state = prefill.begin(
        SelectiveContext(keep=0.2),
        num_layers=LAYERS,
        prompt_length=90,
        ranking=torch.rand(1, 90),
        protect=protect,
        first_pass=True,
    )
    assert torch.isin(protect[0].nonzero()[:, 0], state.choose()[0]).all()


@pytest.mark.parametrize("kept_of_others", [1.0, 0.5])
def test_infinite_scores_and_nan_take_no_place_of_theirs(kept_of_others):
    """A ranking may hold infinities, as PyramidInfer's does."""

    @dataclasses.dataclass(frozen=True)
    class Infinite(CLAA):
        def rank(self, layer, before):
            return torch.full((1, layer.context), torch.inf)

    protect = torch.zeros(1, 60, dtype=torch.bool)
    protect[0, 30:40] = True
    query, key, ranking = drawn(1, 60)
    method = Infinite(keep=9, layer=1, window=5, keep_kv=kept_of_others)
    kept = trace_over(method, query, key, ranking, None, protect).state.positions[0]
    assert torch.isin(torch.arange(30, 40), kept).all() and len(kept) == 10 + 9


def test_packed_prompts_have_masks_of_their_own():
    lengths, method = [60, 33, 47], CLAA(keep=0.2, layer=1, window=5)
    protect = [masks(1, 60, [0.3])[0], None, masks(1, 47, [0.9])[0]]
    total = sum(lengths)
    query, key = torch.randn(total, HEADS, DIM), torch.randn(total, GROUPS, DIM)
    state = prefill.begin_packed(method, num_layers=LAYERS, prompt_lengths=lengths, protect=protect)
    begin, place = 0, torch.arange(total)
    for layer in (0, 1):
        state.observe(layer, query, key)
        state.compress(layer, key, key)
        index = state.select(layer)
    for length, mask in zip(lengths, protect, strict=True):
        alone = prefill.begin(
            method,
            num_layers=LAYERS,
            prompt_length=length,
            protect=None if mask is None else mask[None],
        )
        own = slice(begin, begin + length)
        for layer in (0, 1):
            rows = [x[own].transpose(0, 1)[None].contiguous() for x in (query, key)]
            alone.observe(layer, *rows)
            alone.compress(layer, rows[1], rows[1])
            expected = alone.select(layer)
        mine = place[index][(place[index] >= begin) & (place[index] < begin + length)]
        assert torch.equal(mine - begin, expected[0])
        begin += length


@pytest.mark.parametrize(
    ("protect", "error", "message"),
    [
        ([True] * 30, TypeError, "protect must be a tensor, got list"),
        (torch.ones(1, 30), ValueError, "protect must be bool, got torch.float32"),
        (
            torch.ones(30, dtype=torch.bool),
            ValueError,
            r"protect must have shape \[batch, 30\], got \[30\]",
        ),
        (
            torch.ones(1, 29, dtype=torch.bool),
            ValueError,
            r"protect must have shape \[batch, 30\], got \[1, 29\]",
        ),
    ],
)
def test_other_masks_are_refused(protect, error, message):
    with pytest.raises(error, match=f"^begin: {message}$"):
        prefill.begin(CLAA(), num_layers=LAYERS, prompt_length=30, protect=protect)


def test_a_mask_of_other_prompts_is_refused():
    protect = torch.ones(2, 30, dtype=torch.bool)
    state = prefill.begin(CLAA(layer=2), num_layers=LAYERS, prompt_length=30, protect=protect)
    message = "^observe: protect must be of the 1 prompts of the batch, got one of 2$"
    with pytest.raises(ValueError, match=message):
        state.observe(0, torch.randn(1, HEADS, 30, DIM), torch.randn(1, GROUPS, 30, DIM))


def test_revival_and_protection_do_not_go_together():
    protect = torch.ones(1, 30, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^LazyLLM: protect must be None with revive"):
        prefill.begin(LazyLLM(revive=True), num_layers=LAYERS, prompt_length=30, protect=protect)


def test_another_number_of_masks_is_refused():
    message = "^begin_packed: protect must be one for each of the 2 prompts, got 1$"
    with pytest.raises(ValueError, match=message):
        prefill.begin_packed(CLAA(), num_layers=LAYERS, prompt_lengths=[5, 6], protect=[None])


def test_every_method_of_the_registry_is_among_these_laws():
    known = {"full", "asl", "gemfilter", "speculative", "selective-context"}  # above, or below
    of_laws = {type(PADDED[name](0.5, 0.4)) for name in SERVED}
    for name in set(METHODS) - known:
        assert type(make_method(name, num_layers=LAYERS, keep=0.2)) in of_laws


@pytest.mark.parametrize("tau", [None, 0.9])
def test_asl_keeps_them_whatever_layer_it_chooses(tau):
    method = make_method("asl", num_layers=LAYERS, keep=0.2, tau=tau, passes=1, window=8)
    query, key, ranking = drawn(1, 90)
    protect = masks(1, 90, [0.3])
    trace = trace_over(method, query, key, ranking, None, protect)
    sure = protect[0].nonzero()[:, 0]
    assert all(torch.isin(sure, head).all() for held in trace.held for head in held[0])


def test_a_compiled_prefill_keeps_the_same():
    method = CLAA(keep=0.1, layer=1, first_full=0, keep_kv=0.2, window=5)
    query, key, _ = drawn(1, 100)

    def kept(protect):
        state = prefill.begin(method, num_layers=LAYERS, prompt_length=100, protect=protect)
        for layer in (0, 1):
            state.observe(layer, query[layer], key[layer])
            cached, _ = state.compress(layer, key[layer], key[layer])
            index = state.select(layer)
        return index, cached

    compiled = torch.compile(kept, fullgraph=True, backend="eager")
    for share in (0.3, 0.7):
        protect = masks(1, 100, [share])
        for found, expected in zip(compiled(protect), kept(protect), strict=True):
            assert torch.equal(found, expected)
