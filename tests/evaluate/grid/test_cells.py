import json

import pytest

from claa_ops.evaluate.grid.cells import make_cells
from claa_ops.evaluate.parse import parse_budgets, parse_layers, parse_schedule
from claa_ops.evaluate.spec import MethodSpec
from claa_ops.huggingface.models import InputError
from claa_ops.methods import CLAA, FastKV, FullKV

DEPTH = 30


def cells(*methods, **grid):
    return make_cells([MethodSpec.parse(text) for text in methods], DEPTH, **grid)


def test_the_grid_is_full_prefill_and_every_combination():
    grid = cells("claa", "snapkv", "full", layers=[10, 20], keeps=[0.1, 0.2])
    assert isinstance(grid[0].method, FullKV)
    assert [(cell.label, cell.layer, cell.keep) for cell in grid[1:]] == [
        ("claa", 10, 0.1),
        ("claa", 10, 0.2),
        ("claa", 20, 0.1),
        ("claa", 20, 0.2),
        ("snapkv", None, 0.1),
        ("snapkv", None, 0.2),
    ]


def test_defaults_follow_the_depth():
    assert cells("claa")[1].method == CLAA(layer=DEPTH // 2 - 1)


def test_settings_belong_to_a_method():
    plain, scored = cells("claa", "claa:zscore=true:last_n=2:pool_mode=max", layers=[9])[1:]
    assert not plain.method.zscore
    assert scored.method == CLAA(layer=9, zscore=True, last_n=2, pool_mode="max")
    assert plain.key() != scored.key()


def test_a_stated_layer_or_rate_stands():
    stated, open_layer, bytes_of = cells(
        "claa:layer=9:keep=0.3", "claa:keep=0.3", "fastkv@claa:keep=0.3", layers=[10], keeps=[0.1]
    )[1:]
    assert (stated.layer, stated.keep) == (9, 0.3)
    assert (open_layer.layer, open_layer.keep) == (10, 0.3)
    assert (bytes_of.keep, bytes_of.method.keep_kv) == (0.3, pytest.approx((4 + 26 * 0.3) / DEPTH))


def test_schedules_join_methods_that_can_select_in_stages():
    schedule = parse_schedule("7:50%,18:10%")
    assert schedule == ((7, 18), (0.5, 0.1))
    grid = cells("claa", "snapkv", keeps=[0.1], schedules=[schedule])
    assert [(cell.label, cell.layer, cell.keep) for cell in grid[1:]] == [
        ("claa", 14, 0.1),
        ("claa", (7, 18), (0.5, 0.1)),
        ("snapkv", None, 0.1),
    ]


def test_equal_bytes():
    cell = cells("fastkv@claa", keeps=[0.1])[1]
    # CLAA holds its first 4 of 30 layers whole and a tenth of the others.
    assert isinstance(cell.method, FastKV) and cell.method.equal_cache
    assert cell.method.keep_kv == pytest.approx((4 + 26 * 0.1) / DEPTH)
    with pytest.raises(InputError, match="equal bytes need a rate, got 100 tokens"):
        cells("fastkv@claa", keeps=[100])
    with pytest.raises(InputError, match="equal bytes need methods with caches of a set rate"):
        MethodSpec.parse("snapkv@full")


def test_a_budget_of_the_caches_is_for_those_that_have_one():
    grid = cells("claa", "claa:keep_kv=0.3", "snapkv", "fastkv@claa", keeps=[0.1], keep_kv=1.0)
    assert [getattr(cell.method, "keep_kv", None) for cell in grid[1:4]] == [1.0, 0.3, None]
    assert grid[4].method.keep_kv < 1.0


def test_keys_are_json():
    for cell in cells("claa", schedules=[parse_schedule("7:50%,18:10%")], keeps=[400]):
        assert json.loads(json.dumps(cell.key())) == cell.key()


def test_lists():
    assert parse_layers("4,10-12") == [4, 10, 11, 12]
    assert parse_budgets("0.1,20%,400") == [0.1, 0.2, 400]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MethodSpec.parse("clas"), "unknown method 'clas': did you mean 'claa'"),
        (lambda: MethodSpec.parse("fastkv@cla"), "unknown method 'cla': did you mean 'claa'"),
        (lambda: MethodSpec.parse("claa:zscore"), "NAME:SETTING=VALUE:..., got 'zscore'"),
        (lambda: cells("claa:zscores=true"), "a setting must be one of .*, got zscores"),
        (lambda: cells("claa", layers=[29]), r"layer must be in \[0, 28\], .* got 29"),
        (lambda: parse_layers("a"), "layer must be layers such as 10,15,20-22, got a"),
        (lambda: parse_layers("0-999999999999"), "layer must be layers"),
        (lambda: parse_layers("10-"), "layer must be layers"),
        (lambda: parse_layers("4,9-7"), "layer must have ranges that ascend, got 9-7"),
        (lambda: parse_budgets("1.5"), r"keep must be a rate in \(0, 1\]"),
        (lambda: parse_budgets("0"), r"keep must be a rate in \(0, 1\]"),
        (lambda: parse_schedule("7"), "schedule must be LAYER:KEEP"),
        (lambda: parse_schedule("7:2.5"), "schedule must be a rate in"),
        (lambda: cells("claa", schedules=[((9, 7), (0.5, 0.1))]), "in ascending order"),
    ],
)
def test_bad_grids_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
