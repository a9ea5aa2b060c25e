"""The search by budget, on budgets whose worth is known."""

import pytest

from claa_ops.evaluate.grid.cells import make_cells
from claa_ops.evaluate.spec import MethodSpec
from claa_ops.evaluate.tune.race import Chain, make_chains
from claa_ops.evaluate.tune.settings import KEEPS, Settings

KEPT = list(KEEPS)


def chains(*methods, layers=(1, 3), keeps=KEPT):
    specs = [MethodSpec.parse(text) for text in methods]
    return make_chains(make_cells(specs, 6, layers, keeps)[1:])


def test_a_chain_is_a_method_at_a_layer():
    found = chains("peak", "claa", keeps=[0.4, 0.1, 0.2])
    assert [(c.cells[0].label, c.cells[0].layer) for c in found] == [
        ("peak", 1), ("peak", 3), ("claa", 1), ("claa", 3),
    ]  # fmt: skip
    assert all([cell.keep for cell in chain.cells] == [0.1, 0.2, 0.4] for chain in found)
    assert len(chains("snapkv", keeps=[])) == 1  # without layers and rates


@pytest.mark.parametrize("enough", range(len(KEPT) + 1))
def test_bisection_finds_the_smallest_budget_that_does_not_fail(enough):
    (chain,) = chains("peak", layers=[1])
    tried = []
    while chain.active is not None and chain.active not in tried:
        tried.append(chain.active)
        chain.take(fails=KEPT.index(chain.active.keep) < enough)
    assert len(tried) <= 3
    assert (chain.active.keep if chain.active else None) == dict(enumerate(KEPT)).get(enough)


def test_a_budget_that_fails_later_gives_way_to_the_next():
    (chain,) = chains("peak", layers=[1])
    for _ in range(3):
        chain.take(fails=False)
    assert chain.active.keep == KEPT[0]
    for keep in KEPT[1:]:
        chain.take(fails=True)
        assert chain.active.keep == keep
        chain.take(fails=False)
        assert chain.active.keep == keep
    chain.take(fails=True)
    assert chain.active is None


def test_a_chain_of_one_budget():
    chain = Chain(chains("peak", layers=[1], keeps=[0.2])[0].cells)
    assert chain.active.keep == 0.2
    chain.take(fails=False)
    assert chain.active.keep == 0.2
    chain.take(fails=True)
    assert chain.active is None


def test_layers_lie_at_shares_of_the_depth():
    assert Settings().layers(30) == [2, 3, 4, 7, 9, 14]
    assert Settings().layers(2) == [0]
    assert Settings(layer="4,2-3").layers(30) == [2, 3, 4]
