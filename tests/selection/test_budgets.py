"""Budgets: exact, staged, and shared out among layers."""

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from claa_ops import prefill
from claa_ops.methods import CLAA, FastKV, Pruning, PyramidKV, SnapKV
from claa_ops.selection.budget import Budget, equal_share

lengths = st.lists(st.integers(0, 300), min_size=1, max_size=12)


@given(lengths, st.integers(0, 4000))
def test_the_equal_share_is_the_largest_that_fits(lengths, total):
    lengths.sort(reverse=True)
    share = equal_share(total, lengths)
    assert equal_share(torch.tensor(total), [torch.tensor(n) for n in lengths]) == share
    assert sum(min(length, share) for length in lengths) <= total
    if share < max(lengths):
        assert sum(min(length, share + 1) for length in lengths) > total


def test_a_rate_of_what_another_rate_leaves():
    budget = Budget.of(0.1).within(Budget.of(0.2))
    assert [budget.tokens(length, 1) for length in (200, 201, 7)] == [100, 100, 3]
    assert Budget.of(0.4).within(Budget.of(0.2)).tokens(77, 1) == 77


def cache_lengths(method, num_layers, prompt_length):
    """What the layers' caches keep of random queries and keys."""
    torch.manual_seed(0)
    state = prefill.begin(method, num_layers=num_layers, prompt_length=prompt_length)
    held = []
    for layer in range(num_layers):
        rows = torch.randn(1, 2, state.length, 4)
        state.observe(layer, rows, rows)
        held.append(state.compress(layer, rows, rows)[0].shape[2])
        if layer < num_layers - 1:
            state.select(layer)
    return held


def test_claas_ten_percent_is_twice_fastkvs_and_can_be_made_equal():
    fastkv = cache_lengths(FastKV(keep=0.1, layer=15), 32, 1000)
    claa = cache_lengths(CLAA(keep=0.1, layer=15), 32, 1000)
    assert sum(fastkv) == 3200 and sum(claa) == 4 * 1000 + 28 * 100
    assert sum(claa) / 32_000 == 0.2125
    with pytest.raises(ValueError, match="first 4 layers alone hold 4000"):
        cache_lengths(CLAA(keep=0.1, layer=15, equal_cache=True), 32, 1000)
    equal = cache_lengths(CLAA(keep=0.2, layer=15, equal_cache=True), 32, 1000)
    assert equal == [1000] * 4 + [2400 // 28] * 28 and sum(equal) <= 6400


def test_layers_that_see_fewer_tokens_leave_the_rest_to_the_others():
    method = FastKV(keep=0.1, keep_kv=0.2, layer=3, equal_cache=True)
    assert cache_lengths(method, 8, 1000) == [300] * 4 + [100] * 4
    assert cache_lengths(FastKV(keep=0.1, keep_kv=0.2, layer=3), 8, 1000) == [200] * 4 + [100] * 4


def test_stages_are_of_the_whole_prompt():
    method = FastKV(keep=(0.5, 0.2, 0.1), layer=(1, 3, 5), keep_kv=1.0)
    assert cache_lengths(method, 8, 1000) == [1000, 1000, 500, 500, 200, 200, 100, 100]


def test_rates_of_the_layer_are_truncated_twice():
    # A fifth of 1005 is 201; but after the selection, two thirds of the 301 that are left.
    method = FastKV(keep=0.3, keep_kv=0.2, layer=1, rates_of="layer")
    assert cache_lengths(method, 4, 1005) == [201, 201, 200, 200]
    assert cache_lengths(FastKV(keep=0.3, keep_kv=0.2, layer=1), 4, 1005) == [201] * 4


def test_a_pyramid_holds_what_snapkv_holds():
    pyramid = cache_lengths(PyramidKV(keep=132, window=32, beta=20), 5, 1000)
    assert pyramid == [32 + 195, 32 + 148, 32 + 100, 32 + 52, 32 + 5]
    assert sum(pyramid) == sum(cache_lengths(SnapKV(keep=132), 5, 1000))
    # No layer can keep more than there is: the last ones take the rest.
    assert cache_lengths(PyramidKV(keep=800), 3, 1000) == [1000, 800, 600]
    assert cache_lengths(PyramidKV(keep=0.2, beta=1), 3, 1000) == [200] * 3


@pytest.mark.parametrize("length, kept", [(40, 40), (90, 60), (300, 60), (700, 70)])
def test_a_short_prompt_keeps_a_number_of_tokens_and_a_long_one_a_rate(length, kept):
    method = CLAA(keep=0.1, keep_least=60, layer=1, first_full=0)
    assert cache_lengths(method, 4, length) == [kept] * 4


@given(st.floats(0.05, 0.95), st.floats(0.05, 1.0), st.integers(1, 50), st.integers(0, 99))
def test_as_many_tokens_continue_as_hold_the_mass_within_the_bounds(mass, keep, least, seed):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, 2, 92, generator=draw) ** 6
    method = Given(keep=keep, mass=mass, keep_least=least, layer=0, window=8)
    state = prefill.begin(method, num_layers=2, prompt_length=100)
    state.notes["given"] = scores
    rows = torch.zeros(1, 2, 100, 4)
    state.observe(0, rows, rows)
    state.compress(0, rows, rows)
    index = state.select(0)
    kept = 100 if index is None else index.shape[1]
    most = max(8, least, int(Fraction(str(keep)) * 100))
    ranked = scores.sum(1)[0].double().sort(descending=True).values
    needed = int((ranked.cumsum(0) < mass * ranked.sum()).sum()) + 1
    assert kept == min(most, max(least, needed + 8))


@dataclass(frozen=True)
class Given(Pruning):
    """Scores that the test has chosen."""

    def score(self, layer):
        return layer.state.notes["given"]
