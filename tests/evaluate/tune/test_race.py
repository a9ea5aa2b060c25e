"""The search by budget, on budgets whose worth is known, and what is searched."""

from dataclasses import replace

import pytest

from claa_ops.evaluate.grid.cells import make_cells
from claa_ops.evaluate.spec import MethodSpec
from claa_ops.evaluate.tune.race import Chain, _steps, make_chains
from claa_ops.evaluate.tune.settings import KEEPS, Settings
from claa_ops.methods import Coarse, Hops
from claa_ops.prefill import attach, prefill
from support.tiny_models import build, prompt

KEPT, LAYERS = list(KEEPS), 6


def chains(*methods, layers=(1, 3), keeps=KEPT):
    specs = [MethodSpec.parse(text) for text in methods]
    return make_chains(make_cells(specs, LAYERS, layers, keeps)[1:])


def test_a_chain_is_a_method_at_a_layer():
    found = chains("peak", "claa", keeps=[0.4, 0.1, 0.2])
    assert [(c.cells[0].label, c.cells[0].layer) for c in found] == [
        ("peak", 1), ("peak", 3), ("claa", 1), ("claa", 3),
    ]  # fmt: skip
    assert all([cell.keep for cell in chain.cells] == [0.1, 0.2, 0.4] for chain in found)
    assert len(chains("snapkv", keeps=[])) == 1  # without layers and rates


def tried(chain, good, bad=frozenset(), most=20):
    """The budgets that a chain tries, one set after the other, if these hold and these fail."""
    found = []
    for _ in range(most):
        active = chain.active(lambda cell: cell.keep in good)
        if [cell.keep for cell in active] in found[-1:]:
            break
        found.append([cell.keep for cell in active])
        chain.take(lambda cell: cell.keep in bad, lambda cell: cell.keep in good)
    return found


def test_a_chain_goes_down_while_budgets_hold():
    (chain,) = chains("peak", layers=[1], keeps=[0.1, 0.2, 0.3, 0.4])
    assert tried(chain, good={0.2, 0.3, 0.4}) == [[0.4, 0.3], [0.3, 0.2], [0.2, 0.1]]
    (chain,) = chains("peak", layers=[1], keeps=[0.1, 0.2, 0.3, 0.4])
    assert tried(chain, good={0.3, 0.4}, bad={0.2}) == [[0.4, 0.3], [0.3, 0.2], [0.3]]


def test_what_neither_holds_nor_fails_stays():
    (chain,) = chains("peak", layers=[1], keeps=[0.1, 0.2])
    assert tried(chain, good=set()) == [[0.2]]


def test_a_budget_that_fails_later_gives_way_to_the_larger_one():
    (chain,) = chains("peak", layers=[1], keeps=[0.1, 0.2, 0.4])
    assert tried(chain, good={0.2, 0.4}) == [[0.4, 0.2], [0.2, 0.1]]
    assert tried(chain, good={0.4}, bad={0.1, 0.2}) == [[0.2], [0.4]]
    assert tried(chain, good=set(), bad={0.4}) == [[0.4], []]


def test_a_chain_of_one_budget():
    chain = Chain(chains("peak", layers=[1], keeps=[0.2])[0].cells)
    assert tried(chain, good={0.2}) == [[0.2]]
    assert tried(chain, good=set(), bad={0.2}) == [[0.2], []]


@pytest.mark.parametrize("most", [1, 2, 3, 7, 40])
def test_steps_have_each_round_once(most):
    steps = _steps(most)
    assert [index for step in steps for index in step] == list(range(most))
    assert [len(step) for step in _steps(16)] == [1, 1, 2, 4, 4, 4]


def test_layers_lie_at_shares_of_the_depth():
    (hops, peak, coarse) = Settings().specs()
    assert Settings().layers(28, hops) == [3, 4, 6]
    assert Settings().layers(30, hops) == [3, 4, 7] and Settings().layers(30, peak) == [3, 7]
    assert Settings().layers(30, coarse) == [] and Settings().layers(2, hops) == [0]
    assert Settings(methods=["hops"]).layers(30, hops) == [2, 3, 4, 7, 9, 14]
    assert Settings(layer="4,2-3").layers(30, hops) == [2, 3, 4]


def test_the_settings_to_try_cost_no_more_than_most_work():
    full, *cells = Settings().cells(28)
    assert full.label == "full" and len(set(cells)) == len(cells)
    found = {(cell.label, cell.layer, cell.keep) for cell in cells}
    assert ("hops", (3, 12), (0.45, 0.2)) in found and ("hops", (3, 12), (0.5, 0.2)) not in found
    assert ("hops", 3, 0.3) in found and ("hops", 3, 0.4) not in found
    assert {label for label, _, _ in found} == {"hops", "peak", "coarse"}
    assert all(cell.method.expected_work(28) <= 0.4 + 1e-6 for cell in cells)
    some = Settings(layer="3", keep="0.3,1.0").cells(28)[1:]
    both = [(name, keep) for name in ("hops", "peak") for keep in (0.3, 1.0)]
    assert [(cell.label, cell.keep) for cell in some] == both
    staged = Settings(methods=["peak"], schedules=["3:40%,12:20%"], most_work=0.2).cells(28)[1:]
    assert all(cell.method.expected_work(28) <= 0.2 for cell in staged)
    assert len(Settings().cells(2)) == 1  # half of it is too much


@pytest.mark.parametrize("method", [Hops(layer=(1, 3), keep=(0.5, 0.2)), Coarse(layer=1, ahead=3)])
def test_the_expected_work_is_that_of_a_prefill(method):
    method = replace(method, keep_least=0, num_sinks=0)
    model = attach(build("llama", num_hidden_layers=LAYERS))
    share = prefill(model, prompt(200)[0], method).work_share
    assert method.expected_work(LAYERS) == pytest.approx(share, rel=0.03)
