"""Laws of the methods: budgets, padding, seeds, sinks and the attention's logsumexp."""

import dataclasses
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claa_ops import prefill
from claa_ops.methods import (
    ASL,
    CLAA,
    METHODS,
    Coarse,
    FastKV,
    FastKVDeferral,
    GemFilter,
    Hops,
    LazyLLM,
    Oracle,
    Peak,
    PromptDistill,
    PyramidInfer,
    PyramidKV,
    Random,
    SinksRandom,
    SnapKV,
    StreamingLLM,
    UniPrefill,
    make_method,
)
from claa_ops.selection.budget import Budget
from support.prefill_trace import DIM, GROUPS, HEADS, LAYERS, trace, trace_over

PRUNING = [CLAA, FastKV, FastKVDeferral, LazyLLM, Oracle, Peak, Random, SinksRandom]


PADDED = {  # each method with the rates a and b, and other numbers that depend on the length
    "snapkv": lambda a, b: SnapKV(keep=a, window=5),
    "streaming": lambda a, b: StreamingLLM(keep=a, num_sinks=3),
    "pyramidkv": lambda a, b: PyramidKV(keep=a, window=5),
    "pyramidkv-count": lambda a, b: PyramidKV(keep=30, window=5),
    "pyramidkv-window": lambda a, b: PyramidKV(keep=a, window=32),
    "pyramidinfer": lambda a, b: PyramidInfer(rho=a, recent=b / 2, least=9),
    "lazyllm": lambda a, b: LazyLLM(keep=a),
    "lazyllm-count": lambda a, b: LazyLLM(keep=12, keep_kv=b),
    "lazyllm-revived": lambda a, b: LazyLLM(
        keep=(max(a, b), min(a, b), 0.9 * min(a, b)), layer=(0, 2, 3), revive=True
    ),
    "lazyllm-revived-mixed": lambda a, b: LazyLLM(
        keep=(60, 40, a), layer=(0, 2, 3), num_sinks=3, revive=True
    ),
    "coarse": lambda a, b: Coarse(keep=a, layer=1, ahead=3, every=1 + int(4 * b), window=5),
    "coarse-count": lambda a, b: Coarse(keep=30, keep_kv=b, layer=0, ahead=4, window=5),
    "coarse-left-alone": lambda a, b: Coarse(keep=a, keep_kv=45, layer=1, ahead=2, window=5),
    "promptdistill": lambda a, b: PromptDistill(keep=(max(a, b), min(a, b)), layer=(1, 3)),
    "uniprefill": lambda a, b: UniPrefill(top_p=a, block=1 + int(9 * b), num_sinks=3, window=5),
    "fastkv": lambda a, b: FastKV(keep=a, keep_kv=b, layer=2, window=5),
    "fastkv-layer": lambda a, b: FastKV(keep=a, keep_kv=b, layer=2, window=5, rates_of="layer"),
    "claa": lambda a, b: CLAA(keep=a, keep_kv=b, layer=3, last_n=2, first_full=1, window=5),
    "claa-zscore": lambda a, b: CLAA(keep=a, layer=3, last_n=2, zscore=True, window=5),
    "claa-staged": lambda a, b: CLAA(keep=(max(a, b), min(a, b)), layer=(1, 3), window=5),
    "claa-count": lambda a, b: CLAA(keep=30, keep_kv=20, layer=2, last_n=2, window=5),
    # Prompts below `keep_kv` are left alone.
    "claa-left-alone": lambda a, b: CLAA(keep=20, keep_kv=45, layer=2, last_n=2, window=5),
    "fastkv-left-alone": lambda a, b: FastKV(keep=a, keep_kv=45, layer=2, window=5),
    # Rates after numbers: where the longest row fits, a shorter one may not.
    "claa-mixed": lambda a, b: CLAA(keep=(30, a), layer=(1, 3), zscore=True, window=5),
    "claa-mixed-plain": lambda a, b: CLAA(keep=(30, 30, a), layer=(0, 2, 4), window=5),
    "fastkv-mixed": lambda a, b: FastKV(keep=30, keep_kv=a, layer=0, window=5),
    "peak-mixed": lambda a, b: Peak(keep=(30, 12, a), layer=(1, 2, 4), window=5),
    "hops": lambda a, b: Hops(
        keep=(max(a, b), min(a, b)), layer=(1, 3), window=5, least=9, num_seeds=4, keep_least=0
    ),
    "claa-least": lambda a, b: CLAA(
        keep=(max(a, b), min(a, b)), layer=(1, 3), keep_kv=b, keep_least=20, window=5
    ),
    "peak-mass": lambda a, b: Peak(keep=a, layer=2, mass=0.99 * b, keep_least=9, window=5),
    "hops-mass": lambda a, b: Hops(
        keep=(max(a, b), min(a, b)),
        layer=(1, 3),
        window=5,
        least=9,
        num_seeds=4,
        keep_least=0,
        mass=0.8,
    ),
    "claa-near": lambda a, b: CLAA(keep=(a, 0.98 * a), keep_kv=0.97 * a, layer=(1, 3), window=2),
    "claa-equal": lambda a, b: CLAA(
        keep=max(a, 0.5), layer=3, first_full=1, equal_cache=True, window=2
    ),
    "claa-equal-count": lambda a, b: CLAA(
        keep=30, layer=3, first_full=1, equal_cache=True, window=2
    ),
    "peak": lambda a, b: Peak(keep=(max(a, b), min(a, b)), layer=(1, 3), window=5),
    "random": lambda a, b: Random(keep=(max(a, b), min(a, b)), layer=(1, 3), window=5),
    "sinks-random": lambda a, b: SinksRandom(keep=a, keep_kv=b, layer=2, window=5),
    "oracle": lambda a, b: Oracle(keep=(max(a, b), min(a, b)), layer=(1, 3), window=5),
    "fastkv-deferral": lambda a, b: FastKVDeferral(keep=a, layer=2, first_full=2, window=5),
}


@pytest.mark.parametrize("name", PADDED)
@settings(max_examples=25)
@given(
    first=st.floats(0.02, 1.0),
    second=st.floats(0.02, 1.0),
    length=st.integers(1, 110),
    padding=st.lists(st.integers(0, 109), min_size=1, max_size=3),
)
def test_a_padded_row_keeps_what_it_keeps_alone(name, first, second, length, padding):
    method = dataclasses.replace(PADDED[name](first, second), kernel_size=3)
    shortest = 10 if name.startswith("claa-equal") else 1  # shorter ones are refused alone
    length = max(length, shortest)
    start = torch.tensor([min(n, length - shortest) for n in padding])
    generator = torch.Generator().manual_seed(length)
    query, key = (
        torch.randn(LAYERS, len(start), heads, length, DIM, generator=generator)
        for heads in (HEADS, GROUPS)
    )
    ranking = torch.rand(len(start), length, generator=generator)
    together = trace_over(method, query, key, ranking, start)
    for row, begin in enumerate(start.tolist()):
        one = slice(row, row + 1)
        cut = (x[:, one, :, begin:] for x in (query, key))
        alone = trace_over(method, *cut, ranking[one, begin:], None)
        for held, expected in zip(together.held, alone.held, strict=True):
            assert torch.equal(held[row][held[row] >= begin].view(GROUPS, -1) - begin, expected[0])
        kept, expected = together.state.positions, alone.state.positions
        kept = torch.arange(length) if kept is None else kept[row]
        expected = torch.arange(length - begin) if expected is None else expected[0]
        assert torch.equal(kept[kept >= begin] - begin, expected)


@settings(max_examples=30)
@given(
    st.sampled_from(PRUNING),
    st.integers(10, 120),
    st.lists(st.floats(0.05, 1.0), min_size=1, max_size=3),
    st.integers(0, 5),
    st.integers(0, 60),
)
def test_what_continues_is_what_the_budgets_say(kind, length, rates, first_full, padding):
    rates = sorted(rates, reverse=True)
    layers = tuple(range(0, 2 * len(rates), 2))
    method = kind(keep=tuple(rates), layer=layers, first_full=first_full, window=4)
    method = dataclasses.replace(method, kernel_size=3, keep_kv=rates[-1])
    result = trace(method, length, min(padding, length - 1))

    expected, n = [], length
    tokens = {rate: Budget.of(rate).tokens(length, 4) for rate in rates}
    for layer in range(LAYERS):
        expected.append(n)
        if layer in layers:
            n = min(n, tokens[rates[layers.index(layer)]])
    assert result.seen == expected
    for layer, held in enumerate(result.held):
        whole = layer < first_full
        cached = result.seen[layer] if whole else min(result.seen[layer], tokens[rates[-1]])
        assert held.shape == (2, GROUPS, cached)
        for row, begin in ((0, 0), (1, min(padding, length - 1))):
            for head in held[row]:
                assert_ascends_to_the_end(head, begin, length)
    if result.state.positions is not None:
        for row, begin in ((0, 0), (1, min(padding, length - 1))):
            assert_ascends_to_the_end(result.state.positions[row], begin, length)


def assert_ascends_to_the_end(kept, begin, length):
    """Padding, then tokens, each once, and all of the window of 4."""
    tokens = kept[kept >= begin]
    assert torch.equal(tokens, kept[len(kept) - len(tokens) :])
    assert (tokens.diff() > 0).all()
    window = tokens[-4:]
    assert torch.equal(window, torch.arange(length - len(window), length))


@pytest.mark.parametrize("first_full", [0, 3, 9])
@pytest.mark.parametrize("keep_kv", [10, 0.5, 1.0])
def test_the_selection_does_not_depend_on_the_caches(first_full, keep_kv):
    method = CLAA(keep=20, layer=3, last_n=2, keep_kv=10, first_full=0)
    other = dataclasses.replace(method, keep_kv=keep_kv, first_full=first_full)
    expected, kept = trace(method, 60), trace(other, 60)
    assert torch.equal(kept.selected[3], expected.selected[3])


def test_one_layer_of_one_head_is_fastkv():
    claa = trace(CLAA(keep=20, layer=3, last_n=1, first_full=0), 60, groups=1)
    fastkv = trace(FastKV(keep=20, layer=3), 60, groups=1)
    assert torch.equal(claa.state.positions, fastkv.state.positions)
    for ours, theirs in zip(claa.held, fastkv.held, strict=True):
        assert torch.equal(ours, theirs)


def test_asl_of_a_fixed_layer_is_fastkv():
    asl = trace(ASL(keep=20, layer=3, tau=None, window=8), 60)
    fastkv = trace(FastKV(keep=20, layer=3), 60)
    assert torch.equal(asl.state.positions, fastkv.state.positions)
    for ours, theirs in zip(asl.held, fastkv.held, strict=True):
        assert torch.equal(ours, theirs)


def test_sinks_are_the_first_tokens_that_are_not_padding():
    result = trace(SinksRandom(keep=(30, 16), layer=(0, 2), num_sinks=5), 60, padding=20)
    assert result.state.positions[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert result.state.positions[1, :5].tolist() == [20, 21, 22, 23, 24]


def test_random_tokens_are_drawn_once(monkeypatch):
    drawn = Mock(wraps=torch.rand)
    monkeypatch.setattr("torch.rand", drawn)
    trace(SinksRandom(keep=(30, 16), layer=(0, 2), keep_kv=13, num_sinks=5), 60)
    assert drawn.call_count == 2  # the other draw is that of the trace, a ranking


def test_random_tokens_depend_on_the_seed_and_on_nothing_else():
    kept = trace(Random(keep=20, layer=1, seed=3), 60).state.positions
    assert torch.equal(kept, trace(Random(keep=20, layer=4, seed=3), 60).state.positions)
    assert not torch.equal(kept, trace(Random(keep=20, layer=1, seed=4), 60).state.positions)
    shorter = trace(Random(keep=20, layer=1, seed=3), 47).state.positions
    later = kept[kept >= 13].view(2, -1)  # counted from the end
    assert set((later[0] - 13).tolist()) <= set(shorter[0].tolist())


@pytest.mark.parametrize("method", [GemFilter(keep=20, layer=2), ASL(20, 2, last_n=3, window=8)])
def test_what_stands_before_the_prompt_does_not_change_its_ranking(method):
    padding, states = 23, []
    generator = torch.Generator().manual_seed(0)
    query, key = (
        3 * torch.randn(3, 1, heads, 60, DIM, generator=generator) for heads in (HEADS, GROUPS)
    )
    for dropped, start in ((0, torch.tensor([padding])), (padding, None)):
        length = 60 - dropped
        state = prefill.begin(
            method,
            num_layers=LAYERS,
            prompt_length=length,
            start=start,
            first_pass=method.two_pass,
        )
        for layer in range(3):
            seen = key[layer, :, :, dropped:]
            state.observe(layer, query[layer, :, :, dropped:], seen, value=seen)
        states.append(state)
    padded, alone = states
    torch.testing.assert_close(padded.importance[:, padding:], alone.importance)
    assert padded.notes.get("variance") == alone.notes.get("variance")


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("full", "speculative", "selective-context")]
)
def test_the_logsumexp_of_the_attention_changes_nothing(name):
    method = make_method(name, num_layers=LAYERS, keep=20)
    if isinstance(method, PyramidInfer):
        method = dataclasses.replace(method, least=5)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 60, DIM, generator=generator) for heads in (HEADS, GROUPS))
    logits = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) / DIM**0.5
    future = torch.ones(60, 60, dtype=torch.bool).triu(1)
    lse = logits.masked_fill(future, -torch.inf).logsumexp(-1)
    scores = []
    for logsumexp in (None, lse):
        state = prefill.begin(
            method,
            num_layers=LAYERS,
            prompt_length=60,
            ranking=torch.arange(60.0)[None] if method.needs_ranking else None,
            first_pass=method.two_pass,
        )
        layer = max([*method.selection_layers(LAYERS), 1])  # PyramidInfer's layer 0 keeps all
        state.observe(layer, query, key, value=key, lse=logsumexp)
        scores.append(state.observed.scores)
    torch.testing.assert_close(*scores)


def test_rankings_stand_in_importance_before_the_selection():
    for kind in (*PRUNING, ASL):
        method = kind(keep=20, layer=3, window=8, **({"last_n": 2} if kind is ASL else {}))
        state = prefill.begin(
            dataclasses.replace(method, layer=2),
            num_layers=LAYERS,
            prompt_length=60,
            ranking=torch.rand(2, 60) if method.needs_ranking else None,
        )
        rows = torch.randn(1 if kind is ASL else 2, HEADS, 60, DIM)
        for layer in range(3):
            state.observe(layer, rows, rows[:, :GROUPS])
        assert state.importance.shape == (rows.shape[0], 52)
        assert state.importance.dtype == torch.float32


def test_queries_that_are_missing_are_noticed():
    state = prefill.begin(CLAA(keep=20, layer=1), num_layers=LAYERS, prompt_length=60)
    message = "query of layer 0 must have the last 8 rows, which CLAA reads, got 7"
    with pytest.raises(ValueError, match=message):
        state.observe(0, torch.zeros(1, HEADS, 7, DIM), torch.zeros(1, GROUPS, 60, DIM))
