"""Hops: the shares of its rankings, and what its selection adds to Peak's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from claa_ops import prefill, reference
from claa_ops.methods import Hops, Peak

LAYERS, TOKENS, WINDOW = 4, 200, 8
SETTINGS = {"window": WINDOW, "kernel_size": 5, "num_sinks": 0, "keep_kv": 1.0}


@given(
    seed=st.integers(0, 999),
    direct=st.integers(1, 2),
    hops=st.integers(0, 5),
    least=st.integers(0, 70),
    budget=st.integers(1, 120),
)
def test_each_ranking_has_its_share_of_any_budget(seed, direct, hops, least, budget):
    draw = torch.Generator().manual_seed(seed)
    places = [torch.randperm(120, generator=draw) for _ in range(direct + hops)]
    rankings = torch.stack(places)[None].float()
    method = Hops(least=least)
    entries = method._entries(rankings[:, :direct], rankings[:, direct:] if hops else None)[0]
    kept = set(entries.argsort(stable=True)[:budget].tolist())
    best = [row.argsort().tolist() for row in places]  # the tokens of each ranking, best first
    shares = 2 * direct + hops
    for tokens in best[:direct]:
        assert kept >= set(tokens[: max(min(budget, least) // direct, 2 * budget // shares)])
    for tokens in best[direct:]:
        share = min((budget - least) // hops, budget // shares)
        assert kept >= set(tokens[: max(0, share - 1)])


def inputs(seed=0):
    """Queries, keys and values of layers; a chain of three places has alike values."""
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(LAYERS, 2, heads, TOKENS, 16, generator=draw) for heads in (4, 2, 2)
    )
    links = torch.randn(2, 2, 2, 5, 16, generator=draw)  # two links, of five tokens
    value[:, :, :, 40:45] = value[:, :, :, 90:95] = 3 * links[0]
    value[:, :, :, 97:102] = value[:, :, :, 150:155] = 3 * links[1]
    key[:, :, :, 42] = 4 * query[:, :, :2, -1]  # the question finds the chain's first link
    return query, key, value


def selected(method, query, key, value, **options):
    state = prefill.begin(method, num_layers=LAYERS, prompt_length=TOKENS, **options)
    for layer in range(2):
        state.observe(
            layer,
            query[layer],
            key[layer],
            value=value[layer],
            hidden=value[layer].transpose(1, 2).flatten(2),
        )
        state.compress(layer, key[layer], value[layer])
        state.select(layer)
    return state


def test_the_links_of_a_chain_are_kept_that_peak_drops():
    query, key, value = inputs()
    found = {}
    for method in (
        Peak(keep=40, layer=1, **SETTINGS),
        Hops(keep=40, layer=1, question=0, opening=False, least=8, num_seeds=6, **SETTINGS),
    ):
        state = selected(method, query, key, value)
        found[type(method)] = [
            [set(range(first, first + 5)) <= set(row) for first in (40, 90)]
            for row in state.positions.tolist()
        ]
    assert found[Hops] == [[True, True]] * 2
    assert [first for first, _ in found[Peak]] == [True, True]
    assert not any(linked for _, linked in found[Peak])


def test_the_ranking_is_that_of_the_specification():
    query, key, value = inputs(seed=1)
    settings = {"question": 0, "opening": False, "least": 8, "num_seeds": 16}
    method = Hops(keep=60, layer=1, hops=4, temperature=0.1, **settings, **SETTINGS)
    state = selected(method, query, key, value)
    peaks = selected(Peak(keep=60, layer=1, **SETTINGS), query, key, value).importance
    found = reference.hop_tokens(peaks, value[1], hops=4, num_seeds=16, kernel_size=5)
    for row in range(2):
        budget = 60 - WINDOW
        rankings = [peaks[row], *found[row]]
        best = [ranking.argsort(descending=True, stable=True).tolist() for ranking in rankings]
        # Token by token, whichever ranking is due: Peak's until it has 8, then each hop's.
        taken, entered = [8 if budget > 8 else budget, 0, 0, 0, 0], []
        kept = set(best[0][:8])
        size = 8
        while len(kept) < budget:
            size += 1
            taken[0] = max(8, -(-size * 2 // 6))
            for hop in range(4):
                taken[1 + hop] = sum(
                    max(8 + 4 * place, 6 * place) + 0.25 < size for place in range(budget)
                )
            entered = [set(order[:count]) for order, count in zip(best, taken, strict=True)]
            kept = set().union(*entered)
        chosen = set(state.positions[row].tolist()) - set(range(TOKENS - WINDOW, TOKENS))
        assert len(chosen) == budget
        assert chosen <= kept


def test_what_follows_an_echo_of_the_question_is_kept():
    query, key, value = inputs(seed=4)
    asked = torch.randn(2, 2, 2, 4, 16, generator=torch.Generator().manual_seed(6))
    value[:, :, :, -4:] = value[:, :, :, 60:64] = 3 * asked[0]  # the end, and the text before
    reach = {"question": 8, "reach": 20, "hops": 0}
    for settings, found in (({}, False), (reach, True)):
        settings = {"question": 0, "hops": 0, **settings}
        state = selected(Hops(keep=80, layer=1, **settings, **SETTINGS), query, key, value)
        for row in state.positions.tolist():
            assert (set(range(60, 80)) <= set(row)) == found


def test_a_question_before_the_text_is_followed():
    query, key, value = inputs(seed=5)
    asked = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(7))
    value[:, :, :, 10:15] = value[:, :, :, 120:125] = 3 * asked
    settings = {"question": 0, "hops": 1, "least": 8, "num_seeds": 32}
    for opening in (False, True):
        method = Hops(keep=60, layer=1, opening=opening, **settings, **SETTINGS)
        for row in selected(method, query, key, value).positions.tolist():
            assert (set(range(120, 125)) <= set(row)) == opening


def test_hidden_states_may_stand_for_values():
    query, key, value = inputs(seed=2)
    by_value = selected(Hops(keep=40, layer=1, **SETTINGS), query, key, value)
    by_hidden = selected(Hops(keep=40, layer=1, states="hidden", **SETTINGS), query, key, value)
    assert torch.equal(by_value.positions, by_hidden.positions)


def test_no_hop_and_no_question_is_peak():
    query, key, value = inputs(seed=3)
    plain = selected(Peak(keep=40, layer=1, **SETTINGS), query, key, value)
    none = selected(Hops(keep=40, layer=1, hops=0, question=0, **SETTINGS), query, key, value)
    assert torch.equal(plain.importance, none.importance)


def test_values_of_a_part_of_the_heads_are_refused():
    with pytest.raises(ValueError, match=r"states must be 'hidden' where .* several devices"):
        prefill.begin(
            Hops(layer=1), num_layers=4, prompt_length=100, reduce=lambda scores, how: scores
        )


@given(reach=st.integers(0, 30), tokens=st.integers(1, 60), seed=st.integers(0, 99))
def test_an_echo_reaches_what_follows_it(reach, tokens, seed):
    echo = torch.rand(1, tokens, generator=torch.Generator().manual_seed(seed))
    reached = Hops(reach=2 * reach)._reached(echo)
    expected = [echo[0, max(0, j - 2 * reach) : j + 9].max() for j in range(tokens)]
    assert reached[0].tolist() == torch.stack(expected).tolist()
