"""CLAA and FullKV: the published numbers, their settings, and when they act."""

import dataclasses
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import claa_ops
from claa_ops import prefill
from claa_ops.methods import CLAA, FullKV
from support.vectors import LAYERS, TOKENS, run, vector_key, vector_query

PLAIN = [
    0.372265, 0.555058, 0.567467, 0.570214, 0.566421, 0.554964,
    0.563886, 0.565009, 0.561608, 0.557342, 0.561730, 0.384934,
]  # fmt: skip
ZSCORED = [
    -2.154392, 0.398628, 0.566413, 0.609746, 0.594960, 0.458063,
    0.517993, 0.538096, 0.516545, 0.429506, 0.473477, -1.940821,
]  # fmt: skip
RANKING_SCRIPT = [
    -2.214110, 0.364746, 0.541585, 0.581521, 0.576948, 0.373725,
    0.496153, 0.523511, 0.504599, 0.405976, 0.470774, -1.965152,
]  # fmt: skip
KEPT = [2, 3, 4, 6, 7, 12, 13, 14, 15]
CACHED_IN_LAYER_2 = [[2, 6, 10, 12, 13, 14, 15], [2, 3, 6, 12, 13, 14, 15]]
FASTKV_KEPT = [2, 3, 6, 7, 10, 12, 13, 14, 15]
METHOD = CLAA(keep=9, keep_kv=7, layer=2, last_n=3, window=4, kernel_size=3, first_full=0)


def test_plain_importance_and_kept_tokens():
    state, _ = run(METHOD)
    assert state.importance[0].tolist() == pytest.approx(PLAIN, abs=2e-6)
    assert state.select(2)[0].tolist() == KEPT


def test_zscored_importance_and_kept_tokens():
    state, _ = run(dataclasses.replace(METHOD, zscore=True))
    assert state.importance[0].tolist() == pytest.approx(ZSCORED, abs=2e-5)
    assert state.select(2)[0].tolist() == KEPT


def test_the_ranking_script_sums_heads_before_it_standardises():
    state, _ = run(dataclasses.replace(METHOD, zscore=True, over_heads="sum"))
    assert state.importance[0].tolist() == pytest.approx(RANKING_SCRIPT, abs=2e-5)


def test_the_mean_over_layers_and_heads():
    state, _ = run(dataclasses.replace(METHOD, over_heads="sum", over_layers="mean"))
    rows = [
        claa_ops.score_tokens(vector_query(i)[:, :, -4:], vector_key(i), kernel_size=3).sum(1)
        for i in range(LAYERS)
    ]
    torch.testing.assert_close(state.importance, sum(rows))


def test_each_head_caches_the_tokens_that_its_own_layer_scores_best():
    for zscore in (False, True):
        _, cached = run(dataclasses.replace(METHOD, zscore=zscore))
        assert cached[0].tolist() == CACHED_IN_LAYER_2


def test_one_layer_and_one_head_is_fastkv():
    # FastKV sums over heads, CLAA takes their maximum: with one key/value head both are the sum
    # over its query heads.
    method = dataclasses.replace(METHOD, last_n=1)
    scores = claa_ops.score_tokens(vector_query(2)[:, :, -4:], vector_key(2), kernel_size=3)
    fastkv = scores.sum(dim=1)[0].topk(5).indices.sort().values.tolist() + [12, 13, 14, 15]
    assert fastkv == FASTKV_KEPT
    assert fastkv != KEPT  # two heads, three layers
    state = prefill.begin(method, num_layers=LAYERS + 1, prompt_length=TOKENS)
    query, key = torch.randn(1, 4, TOKENS, 4), torch.randn(1, 1, TOKENS, 4)
    state.observe(2, query, key)
    scores = claa_ops.score_window(query[:, :, -4:], key)
    summed = claa_ops.pool_heads(scores, 1, kernel_size=3).sum(dim=1)[0]
    expected = summed.topk(5).indices.sort().values.tolist() + [12, 13, 14, 15]
    assert state.select(2)[0].tolist() == expected


def test_fewer_layers_than_asked_are_aggregated_near_the_bottom():
    query, key = vector_query(0), vector_key(0)
    for last_n in (1, 4):
        method = dataclasses.replace(METHOD, layer=0, last_n=last_n)
        state = prefill.begin(method, num_layers=2, prompt_length=TOKENS)
        state.observe(0, query, key)
        scores = claa_ops.score_tokens(query[:, :, -4:], key, kernel_size=3)
        assert torch.equal(state.importance, scores.amax(dim=1))


def test_max_pooling():
    state, _ = run(dataclasses.replace(METHOD, pool_mode="max", last_n=1))
    scores = claa_ops.score_tokens(
        vector_query(2)[:, :, -4:], vector_key(2), kernel_size=3, pool_mode="max"
    )
    assert torch.equal(state.importance, scores.amax(dim=1))


def test_zscores_leave_out_padding():
    padded, _ = run(dataclasses.replace(METHOD, zscore=True), start=torch.tensor([5]))
    method = dataclasses.replace(METHOD, zscore=True)
    alone = prefill.begin(method, num_layers=LAYERS + 1, prompt_length=TOKENS - 5)
    for layer in range(LAYERS):
        alone.observe(layer, vector_query(layer), vector_key(layer)[:, :, 5:])
    torch.testing.assert_close(padded.importance[:, 5:], alone.importance)
    # Constant scores have no deviation, and single ones no statistics: neither may give NaN.
    zeros = torch.zeros(1, 4, 5, 4)
    method = dataclasses.replace(method, keep=4, keep_kv=4, layer=0)
    state = prefill.begin(method, num_layers=2, prompt_length=5)
    state.observe(0, zeros, zeros[:, :2])
    assert state.importance.tolist() == [[0.0]]


# When it acts.


@pytest.mark.parametrize(
    ("settings", "options", "layers"),
    [
        ({"keep": 9, "first_full": 9}, {}, [4, 5, 6]),  # the aggregated ones
        ({"keep": 9, "first_full": 2}, {}, [2, 3, 4, 5, 6]),  # after it T = C, nothing to do
        ({"keep": 9, "keep_kv": 6, "first_full": 7}, {}, [4, 5, 6, 7]),
        ({"keep": 1.0, "keep_kv": 6, "first_full": 5}, {}, [5, 6, 7]),
        ({"keep": 1.0}, {}, []),
        ({"keep": 9, "keep_kv": 17}, {}, []),  # a prompt below the capacity is left alone
        ({"keep": 9, "keep_kv": 16}, {}, [4, 5, 6]),
        ({"keep": 9, "first_full": 9}, {"keep_scores": True}, [0, 1, 2, 3, 4, 5, 6]),
        ({"keep": 1.0}, {"keep_scores": True}, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_only_layers_whose_scores_are_needed_are_scored(monkeypatch, settings, options, layers):
    counted = [Mock(wraps=op) for op in (claa_ops.score_layer, claa_ops.score_tokens)]
    monkeypatch.setattr("claa_ops.selection.layer.score_layer", counted[0])
    monkeypatch.setattr("claa_ops.selection.layer.score_tokens", counted[1])
    method = CLAA(layer=6, last_n=3, window=4, kernel_size=3, **settings)
    state = prefill.begin(method, num_layers=8, prompt_length=TOKENS, **options)
    scored = []
    for layer in range(8):
        before = sum(op.call_count for op in counted)
        rows = torch.randn(1, 4, state.length, 4)
        state.observe(layer, rows, rows[:, :2])
        state.compress(layer, rows[:, :2], rows[:, :2])
        state.select(layer)
        scored += [layer] * (sum(op.call_count for op in counted) - before)
    assert scored == layers
    assert state.length == (9 if 9 == method.keep and method.keep_kv != 17 else TOKENS)
    assert sorted(state.scores) == (list(range(7)) if options else [])


@pytest.mark.parametrize(
    ("keep", "length", "tokens"),
    [
        (0.1, 1000, 100), (0.1, 80, 8), (0.1, 50, 8), (0.1, 5, 5), (0.1, 1, 1), (1.0, 77, 77),
        (0.3, 10, 8), (0.29, 100, 29), (0.57, 100, 57), (1.0, 3, 3), (1, 100, 8), (64, 100, 64),
        (200, 100, 200), (200, 5, 5), (np.float64(0.29), 100, 29), (1e-9, 100, 8),
    ],
)  # fmt: skip
def test_budgets_are_exact_and_never_below_the_window(keep, length, tokens):
    # int(100 * 0.29) is 28 and int(100 * 0.57) is 56: the product of floats falls short.
    assert CLAA(keep=keep).budget("keep").tokens(length, 8) == tokens


def test_cache_budgets_follow_keep_unless_given():
    for method, cached in ((CLAA(keep=9, layer=1), 9), (CLAA(keep=9, keep_kv=12, layer=1), 12)):
        method = dataclasses.replace(method, first_full=0)
        state = prefill.begin(method, num_layers=3, prompt_length=40)
        rows = torch.randn(1, 2, 40, 4)
        state.observe(0, rows, rows)
        assert state.compress(0, rows, rows)[0].shape[2] == cached


# Settings.


def test_defaults_are_those_of_the_paper():
    method = CLAA()
    assert (method.keep, method.layer, method.keep_kv, method.last_n) == (0.1, None, None, 4)
    assert method.at_depth(32) == CLAA(layer=15) and CLAA(layer=9).at_depth(32) == CLAA(layer=9)
    assert (method.window, method.kernel_size, method.pool_mode) == (8, 7, "avg")
    assert (method.first_full, method.zscore) == (4, False)
    assert CLAA(0.2, 13) == CLAA(keep=0.2, layer=13) != CLAA(keep=0.2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.keep = 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1.5}, "CLAA: keep must be a rate in (0, 1] or a number of tokens, got 1.5"),
        ({"keep": 0.0}, "CLAA: keep must be a rate in (0, 1] or a number of tokens, got 0.0"),
        ({"keep": 0}, "CLAA: keep must be a rate in (0, 1] or a number of tokens, got 0"),
        ({"keep": -3}, "CLAA: keep must be a rate in (0, 1] or a number of tokens, got -3"),
        ({"keep": True}, "CLAA: keep must be a rate in (0, 1] or a number of tokens, got True"),
        ({"keep": "10%"}, "CLAA: keep must be a rate in (0, 1] or a number of tokens, got '10%'"),
        ({"keep": None}, "CLAA: keep must be a rate in (0, 1] or a number of tokens, got None"),
        ({"keep": float("nan")}, "CLAA: keep must be a rate in (0, 1] or a number of tokens, got"),
        ({"keep_kv": 2.0}, "CLAA: keep_kv must be a rate in (0, 1] or a number of tokens, got 2.0"),
        ({"layer": -1}, "CLAA: layer must be an integer of at least 0, got -1"),
        ({"layer": 1.0}, "CLAA: layer must be an integer of at least 0, got 1.0"),
        ({"last_n": 0}, "CLAA: last_n must be a positive integer, got 0"),
        ({"window": 0}, "CLAA: window must be a positive integer, got 0"),
        ({"kernel_size": 6}, "CLAA: kernel_size must be a positive odd integer, got 6"),
        ({"kernel_size": -1}, "CLAA: kernel_size must be a positive odd integer, got -1"),
        ({"pool_mode": "mean"}, "CLAA: pool_mode must be 'avg' or 'max', got 'mean'"),
        ({"first_full": -1}, "CLAA: first_full must be an integer of at least 0, got -1"),
        ({"over_heads": "mean"}, "CLAA: over_heads must be 'max' or 'sum', got 'mean'"),
        ({"over_layers": "sum"}, "CLAA: over_layers must be 'max' or 'mean', got 'sum'"),
        ({"zscore": 1}, "CLAA: zscore must be True or False, got 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        CLAA(**settings)
    assert str(error.value).startswith(message)


def test_full_kv_checks_what_it_has():
    with pytest.raises(ValueError, match="FullKV: window must be a positive integer, got 0"):
        FullKV(window=0)
