"""What holds for every method that prunes, whatever the prompt."""

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
    FastKV,
    FastKVDeferral,
    GemFilter,
    Oracle,
    Peak,
    PyramidInfer,
    Random,
    SinksRandom,
    make_method,
)
from claa_ops.methods.budget import Budget

LAYERS, HEADS, GROUPS, DIM = 6, 4, 2, 4
SYSTEMS = [CLAA, FastKV, FastKVDeferral, Oracle, Peak, Random, SinksRandom]


@dataclasses.dataclass
class Trace:
    state: prefill.PrefillState
    seen: list[int]
    held: list[torch.Tensor]  # of each layer: which tokens of the prompt each head caches
    selected: dict[int, torch.Tensor]


def trace(method, length, padding=0, groups=GROUPS):
    """A prefill over random queries and keys, [B = 2]; the second row is padded."""
    generator = torch.Generator().manual_seed(length)
    start = torch.tensor([0, padding]) if padding else None
    ranking = torch.rand(2, length, generator=generator)
    state = prefill.begin(
        method, num_layers=LAYERS, prompt_length=length, start=start, ranking=ranking
    )
    result = Trace(state, [], [], {})
    positions = torch.arange(length).expand(2, -1)
    for layer in range(LAYERS):
        query = torch.randn(2, HEADS, length, DIM, generator=generator)
        key = torch.randn(2, groups, length, DIM, generator=generator)
        rows = positions[:, None, :, None].expand(-1, -1, -1, DIM)
        query = query.gather(2, rows.expand(-1, HEADS, -1, -1))
        key = key.gather(2, rows.expand(-1, groups, -1, -1))
        state.observe(layer, query, key)
        place = rows[..., :1].expand(-1, groups, -1, -1)
        result.seen.append(state.length)
        result.held.append(state.compress(layer, place, place)[0][..., 0])
        if layer < LAYERS - 1 and (index := state.select(layer)) is not None:
            result.selected[layer] = index
            positions = positions.gather(1, index)
    return result


@settings(max_examples=30)
@given(
    st.sampled_from(SYSTEMS),
    st.integers(10, 120),
    st.lists(st.floats(0.05, 1.0), min_size=1, max_size=3),
    st.integers(0, 5),
    st.integers(0, 60),
)
def test_what_goes_on_is_what_the_budgets_say(system, length, rates, first_full, padding):
    rates = sorted(rates, reverse=True)
    layers = tuple(range(0, 2 * len(rates), 2))
    method = system(keep=tuple(rates), layer=layers, first_full=first_full, window=4)
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
        assert (held.diff(dim=2) > 0).all()  # ascending, so each once
        assert (held[..., -4:] == torch.arange(length - 4, length)).all()
    for index in result.selected.values():
        assert (index.diff(dim=1) > 0).all()
    if result.state.positions is not None:
        kept = result.state.positions
        assert (kept[:, -4:] == torch.arange(length - 4, length)).all()
        real = min(kept.shape[1], length - min(padding, length - 1))
        assert (kept[1, -real:] >= min(padding, length - 1)).all()  # padding goes first


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
    result = trace(SinksRandom(keep=(30, 16), layer=(0, 2), sink=5), 60, padding=20)
    assert result.state.positions[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert result.state.positions[1, :5].tolist() == [20, 21, 22, 23, 24]


def test_random_tokens_are_drawn_once(monkeypatch):
    drawn = Mock(wraps=torch.rand)
    monkeypatch.setattr("torch.rand", drawn)
    trace(SinksRandom(keep=(30, 16), layer=(0, 2), keep_kv=13, sink=5), 60)
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
            state.observe(layer, query[layer, :, :, dropped:], key[layer, :, :, dropped:])
        states.append(state)
    padded, alone = states
    torch.testing.assert_close(padded.importance[:, padding:], alone.importance)
    assert padded.notes.get("variance") == alone.notes.get("variance")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("full", "speculative")])
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
        layer = max(getattr(method, "layer", 1), 1)  # PyramidInfer's layer 0 keeps all
        state.observe(layer, query, key, lse=logsumexp)
        scores.append(state.layer_scores)
    torch.testing.assert_close(*scores)


def test_rankings_stand_in_importance_before_the_selection():
    for system in (*SYSTEMS, ASL):
        method = system(keep=20, layer=3, window=8, **({"last_n": 2} if system is ASL else {}))
        state = prefill.begin(
            dataclasses.replace(method, layer=2),
            num_layers=LAYERS,
            prompt_length=60,
            ranking=torch.rand(2, 60) if method.needs_ranking else None,
        )
        rows = torch.randn(1 if system is ASL else 2, HEADS, 60, DIM)
        for layer in range(3):
            state.observe(layer, rows, rows[:, :GROUPS])
        assert state.importance.shape == (rows.shape[0], 52)
        assert state.importance.dtype == torch.float32


def test_queries_that_are_missing_are_noticed():
    state = prefill.begin(CLAA(keep=20, layer=1), num_layers=LAYERS, prompt_length=60)
    message = "query of layer 0 must have the last 8 rows, which CLAA reads, got 7"
    with pytest.raises(ValueError, match=message):
        state.observe(0, torch.zeros(1, HEADS, 7, DIM), torch.zeros(1, GROUPS, 60, DIM))
