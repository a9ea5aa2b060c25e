"""The registry: names, docstrings, defaults by depth, and refusals of wrong settings."""

import dataclasses
import doctest
import importlib
import inspect
import pickle
import pkgutil

import numpy as np
import pytest

from claa_ops import methods
from claa_ops.methods import METHODS, Method, make_method
from claa_ops.selection import Budget, Sizes, state

MODULES = [
    importlib.import_module(f"claa_ops.methods.{module.name}")
    for module in pkgutil.iter_modules(methods.__path__)
]


@pytest.mark.parametrize("module", [*MODULES, state], ids=lambda module: module.__name__)
def test_all_examples_in_the_docstrings_run(module):
    result = doctest.testmod(module, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.failed == 0
    assert result.attempted == inspect.getsource(module).count(">>> ")


def test_every_method_has_a_name_and_a_docstring_with_source_and_example():
    public = {
        value
        for value in vars(methods).values()
        if inspect.isclass(value) and issubclass(value, Method)
    }
    public -= {Method, methods.Pruning}
    assert public == set(METHODS.values()) and len(METHODS) == len(public)
    for method in public:
        assert ">>> " in method.__doc__, method
        assert "Source: " in method.__doc__ or method is methods.FullKV, method


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("num_layers", [2, 4, 28, 30, 32])
def test_defaults_fit_models_of_any_depth(name, num_layers):
    if name == "coarse" and num_layers == 2:
        with pytest.raises(ValueError, match="Coarse: the model must have at least 3 layers, got"):
            make_method(name, num_layers=num_layers)
        return
    method = make_method(name, num_layers=num_layers, keep=0.2)
    method.check(num_layers)
    assert pickle.loads(pickle.dumps(method)) == method and hash(method) == hash(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.window = 3


def test_defaults_scale_with_the_depth():
    layers = {name: getattr(make_method(name, num_layers=32), "layer", None) for name in METHODS}
    published = {"claa": 15, "fastkv": 15, "gemfilter": 13, "asl": 10}
    assert {name: layers[name] for name in published} == published
    assert make_method("claa", num_layers=30).layer == 14
    assert make_method("asl", num_layers=28).layer == 9
    # Ours: as docs/quality.md measures it.
    assert [make_method("hops", num_layers=depth).layer for depth in (2, 24, 28, 36)] == [
        0,
        2,
        3,
        4,
    ]
    assert (methods.Hops().keep, methods.Hops().keep_kv) == (0.3, 1.0)
    for name, layer in published.items():
        method = METHODS[name]()
        assert make_method(name, num_layers=32) == method.at_depth(32)
        assert method.selection_layers(32)[0] == layer


def test_several_layers_scale_with_the_depth():
    lazy = make_method("lazyllm", num_layers=32, keep=0.2)
    assert (lazy.layer, lazy.keep) == ((7, 15, 23), 0.2)
    for keep, kept in {0.2: (0.6, 0.4, 0.2), 500: (1500, 1000, 500), 0.4: (1.0, 0.8, 0.4)}.items():
        budgets = {layer: Budget.of(each) for layer, each in zip((7, 15, 23), kept, strict=True)}
        sizes = Sizes(2000, 2000, 32)
        for method in (
            methods.LazyLLM(keep=keep),
            make_method("lazyllm", num_layers=32, keep=keep),
        ):
            for layer, budget in method.stages(32).items():
                assert budget.tokens(2000, 1) == budgets[layer].tokens(2000, 1)
            assert method._seen(sizes)[-1] == budgets[23].tokens(2000, 1)
    assert make_method("lazyllm", num_layers=3, keep=0.2).layer == (0, 1)  # no more can select
    assert make_method("promptdistill", num_layers=32).layer == 13
    assert make_method("uniprefill", num_layers=32).layer == (7, 11, 15, 19, 23, 27)
    assert make_method("uniprefill", num_layers=30).layer == (6, 10, 14, 17, 21, 25)
    assert make_method("uniprefill", num_layers=32, layer=5).layer == 5


def test_settings_reach_the_methods_that_have_them():
    method = make_method("claa", num_layers=8, layer=(1, 3), keep=(0.5, 0.2), window=16)
    assert (method.layer, method.keep, method.window) == ((1, 3), (0.5, 0.2), 16)
    assert make_method("full", num_layers=8, layer=3, keep=0.1) == methods.FullKV()
    assert make_method("snapkv", num_layers=8, layer=3, keep=0.1) == methods.SnapKV(keep=0.1)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fastvk", {}, "unknown method 'fastvk': did you mean 'fastkv'?"),
        ("CLAA", {}, "unknown method 'CLAA': did you mean 'claa'?"),
        ("zzz", {}, "unknown method 'zzz': expected one of full, snapkv, fastkv"),
        (
            "claa",
            {"widow": 3},
            "claa: a setting must be one of window, kernel_size, pool_mode, keep",
        ),
        ("claa", {"_keep_kv": 3}, "claa: a setting must be one of window, kernel_size"),
        ("claa", {"layer": 7}, "CLAA: layer must be in [0, 6], before the last of the model's 8"),
        (
            "claa",
            {"layer": (3, 7), "keep": (0.5, 0.2)},
            "CLAA: layer must be in [0, 6], before the last of the model",
        ),
        ("claa", {"keep": (0.5, 0.2)}, "CLAA: keep must be one budget unless layer names several"),
        (
            "claa",
            {"layer": 3, "keep": (0.5, 0.2)},
            "CLAA: keep must be one for each selection layer of 3, got",
        ),
        ("fastkv", {"layer": (3, 1), "keep": (0.5, 0.2)}, "FastKV: layer must be in ascending ord"),
        ("fastkv", {"layer": (), "keep": ()}, "FastKV: layer must be one value or more, got ()"),
        ("fastkv", {"keep": (0.5, 2.0)}, "FastKV: keep must be a rate in (0, 1] or a number of t"),
        ("fastkv", {"num_sinks": -1}, "FastKV: num_sinks must be an integer of at least 0, got -1"),
        ("fastkv", {"equal_cache": 1}, "FastKV: equal_cache must be True or False, got 1"),
        ("fastkv", {"rates_of": "all"}, "FastKV: rates_of must be 'prompt' or 'layer', got 'all'"),
        ("fastkv", {"rates_of": "layer", "keep": 9}, "FastKV: rates_of must be 'prompt' unless ke"),
        ("claa", {"layer": (1, 3), "keep": (0.1, 0.5)}, "CLAA: keep must be no larger at a later"),
        ("claa", {"layer": (1, 3), "keep": (30, 31)}, "CLAA: keep must be no larger at a later la"),
        (
            "claa",
            {"num_sinks": 4, "keep": 11},
            "CLAA: keep must be at least window + num_sinks = 12 tokens",
        ),
        (
            "peak",
            {"keep": 0.1, "keep_kv": 19},
            "Peak: keep_kv must be at least window + num_sinks = 20",
        ),
        (
            "streaming",
            {"keep": 4},
            "StreamingLLM: keep must be more than the num_sinks of 4 tokens, go",
        ),
        ("snapkv", {"keep": 1.5}, "SnapKV: keep must be a rate in (0, 1] or a number of tokens"),
        ("gemfilter", {"keep": 0.0}, "GemFilter: keep must be a rate in (0, 1] or a number"),
        ("gemfilter", {"layer": 8}, "GemFilter: layer must be in [0, 7], got 8"),
        ("gemfilter", {"layer": -1}, "GemFilter: layer must be an integer of at least 0, got -1"),
        ("gemfilter", {"window": 8}, "GemFilter: window must be 1, got 8"),
        ("asl", {"layer": (1, 2), "keep": (9, 8)}, "ASL: layer must be one layer, got (1, 2)"),
        ("asl", {"last_n": 4}, "ASL: last_n must be at most layer + 1 = 3, got 4"),
        ("asl", {"last_n": 0}, "ASL: last_n must be a positive integer, got 0"),
        ("asl", {"tau": 0.0}, "ASL: tau must be above 0, or None, got 0.0"),
        ("asl", {"tau": "0.3"}, "ASL: tau must be above 0, or None, got '0.3'"),
        ("asl", {"passes": 3}, "ASL: passes must be 1 or 2, got 3"),
        ("asl", {"full_before": None}, "ASL: full_before must be True or False, got None"),
        ("asl", {"equal_cache": True}, "ASL: equal_cache must be False, got True"),
        ("asl", {"in_layer": True}, "ASL: in_layer must be False, got True"),
        ("speculative", {"look_ahead": 0}, "SpeculativePrefill: look_ahead must be a positive in"),
        ("speculative", {"chunk": 0}, "SpeculativePrefill: chunk must be a positive integer or No"),
        (
            "speculative",
            {"pool_mode": "max"},
            "SpeculativePrefill: pool_mode must be 'avg', got 'max'",
        ),
        ("speculative", {"keep": 2.0}, "SpeculativePrefill: keep must be a rate in (0, 1] or a"),
        ("oracle", {"max_new_tokens": 0}, "Oracle: max_new_tokens must be a positive integer"),
        ("oracle", {"pool_mode": "max"}, "Oracle: pool_mode must be 'avg', got 'max'"),
        (
            "streaming",
            {"num_sinks": -1},
            "StreamingLLM: num_sinks must be an integer of at least 0, got -1",
        ),
        ("streaming", {"keep": 0}, "StreamingLLM: keep must be a rate in (0, 1] or a number"),
        ("pyramidkv", {"beta": 0.5}, "PyramidKV: beta must be a number of at least 1, got 0.5"),
        ("pyramidinfer", {"rho": 0}, "PyramidInfer: rho must be in (0, 1], got 0"),
        ("pyramidinfer", {"rho": "0.3"}, "PyramidInfer: rho must be in (0, 1], got '0.3'"),
        ("pyramidinfer", {"recent": 1.0}, "PyramidInfer: recent must be in [0, 1), got 1.0"),
        ("pyramidinfer", {"distance_weight": 0}, "PyramidInfer: distance_weight must be above 0"),
        (
            "pyramidinfer",
            {"num_sinks": -1},
            "PyramidInfer: num_sinks must be an integer of at least 0",
        ),
        ("pyramidinfer", {"least": -1}, "PyramidInfer: least must be an integer of at least 0"),
        ("lazyllm", {"keep": 0}, "LazyLLM: keep must be a rate in (0, 1] or a number of tokens"),
        ("lazyllm", {"layer": 7}, "LazyLLM: layer must be in [0, 6], before the last of the mo"),
        ("promptdistill", {"window": 8}, "PromptDistill: window must be 1, got 8"),
        ("promptdistill", {"pool_mode": "max"}, "PromptDistill: pool_mode must be 'avg', got"),
        ("uniprefill", {"top_p": 0}, "UniPrefill: top_p must be in (0, 1], got 0"),
        ("uniprefill", {"top_p": "1"}, "UniPrefill: top_p must be in (0, 1], got '1'"),
        ("uniprefill", {"layer": 7}, "UniPrefill: layer must be in [0, 6], got 7"),
        ("uniprefill", {"layer": (3, 1)}, "UniPrefill: layer must be an integer of at least 0, or"),
        ("uniprefill", {"layer": ()}, "UniPrefill: layer must be an integer of at least 0, or"),
        ("uniprefill", {"block": 0}, "UniPrefill: block must be a positive integer, got 0"),
        ("uniprefill", {"num_sinks": -1}, "UniPrefill: num_sinks must be an integer of at least"),
        ("selective-context", {"keep": 0}, "SelectiveContext: keep must be a rate in (0, 1] or"),
        (
            "selective-context",
            {"shared_tokenizer": 1},
            "SelectiveContext: shared_tokenizer must be True or False, got 1",
        ),
        ("coarse", {"layer": (1, 3), "keep": (0.5, 0.1)}, "Coarse: layer must be one layer, got"),
        ("coarse", {"pool_mode": "max"}, "Coarse: pool_mode must be 'avg', got 'max'"),
        ("coarse", {"every": 0}, "Coarse: every must be a positive integer, got 0"),
        ("coarse", {"layer": 3, "ahead": 3}, "Coarse: ahead must be an integer of at least 4, aft"),
        ("coarse", {"layer": 3, "ahead": 7}, "Coarse: ahead must be in [4, 6], before the last of"),
        ("random", {"seed": -1}, "Random: seed must be an integer of at least 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError) as error:
        make_method(name, num_layers=8, **settings)
    assert str(error.value).startswith(message)


NUMPY = {int: [np.int8, np.int32, np.int64, np.uint16], float: [np.float16, np.float32, np.float64]}


@pytest.mark.parametrize("name", METHODS)
def test_numpys_numbers_are_the_numbers(name):
    plain = make_method(name, num_layers=8, keep=0.7)
    settings = [field.name for field in dataclasses.fields(plain) if field.init]
    for setting in settings:
        value = getattr(plain, setting)
        for kind in NUMPY.get(type(value), []):
            if kind is np.int8 and value > 127:  # which it cannot hold
                continue
            same = dataclasses.replace(plain, **{setting: kind(value)})
            assert same == plain and repr(same) == repr(plain)
            assert type(getattr(same, setting)) is type(value)


def test_numpys_rates_keep_as_many_tokens_as_their_digits_say():
    for rate in np.arange(1, 100, dtype=np.float32) / 100:
        spelt = methods.SnapKV(keep=float(str(rate)))
        assert methods.SnapKV(keep=rate).budget("keep") == spelt.budget("keep")


def test_lists_are_tuples():
    listed = methods.CLAA(layer=[0, np.int64(1)], keep=[np.float32(0.5), 0.3])
    assert listed == methods.CLAA(layer=(0, 1), keep=(0.5, 0.3)) and hash(listed)
    mixed = methods.CLAA(layer=[0, 1], keep=[0.1, 500])  # which is larger depends on the prompt
    assert mixed.keep == (0.1, 500)
