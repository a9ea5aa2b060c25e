"""Measures of agreement, in cases that can be worked out by hand."""

import numpy as np
import torch

from claa_ops.evaluate.oracle.measures import MEASURES, intervals, measure_ranking

NAN = float("nan")
ORACLE = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])


def measure(*rows, raw=ORACLE, pooled=ORACLE, layers=None, k=2, needle=None):
    ranking = torch.tensor([list(row) for row in rows], dtype=torch.float32)
    layers = range(len(rows)) if layers is None else layers
    values = measure_ranking(ranking, layers, raw, pooled, k, needle)
    assert ["answers", *values] == list(MEASURES)
    return {key: [round(float(value), 4) for value in row] for key, row in values.items()}


def test_spearman_counts_ranks_not_values():
    same, reverse = [800, 70, 60, 5, 4, 3, 2, -1e6], range(8)
    swapped = [7, 8, 6, 5, 4, 3, 2, 1]  # 1 - 6 * (1 + 1) / (8 * 63)
    values = measure(same, reverse, swapped, pooled=ORACLE.flip(0))
    assert values["spearman_raw"] == [1, -1, 0.9762]
    assert values["spearman_pooled"] == [-1, 1, -0.9762]


def test_spearman_gives_ties_their_mean_rank():
    # Ranks 4 4 4 4 and 2 2 2 2 around the means 6.5 and 2.5: 4 / sqrt(21) times the half-split.
    halves = [1, 1, 1, 1, 0, 0, 0, 0]
    assert measure(halves)["spearman_raw"] == [round(16 / (42 * 8) ** 0.5, 4)]


def test_a_constant_ranking_has_no_rank_correlation():
    values = measure([1] * 8, range(8))
    assert np.isnan(values["spearman_raw"][0]) and values["spearman_raw"][1] == -1
    assert np.isnan(values["stability_spearman"][1])


def test_overlap_is_the_share_of_the_best_k_in_common():
    first_two, first_and_last, last_two = (
        [9 if i in best else i / 10 for i in range(8)] for best in ((0, 1), (0, 7), (6, 7))
    )
    values = measure(first_two, first_and_last, last_two, pooled=ORACLE.flip(0))
    assert values["overlap_raw"] == [1, 0.5, 0]
    assert values["overlap_pooled"] == [0, 0.5, 1]


def test_equal_scores_go_to_the_lower_position():
    assert measure([0] * 8, k=3)["overlap_raw"] == [1]


def test_recall_is_the_share_of_the_needle_among_the_best_k():
    row = [0, 0, 5, 4, 3, 0, 0, 0]
    for needle, recall in [([2, 3], 1), ([3, 4], 0.5), ([5, 6], 0), ([0, 1, 2, 3], 0.5)]:
        assert measure(row, needle=torch.tensor(needle))["needle_recall"] == [recall]
    assert np.isnan(measure(row)["needle_recall"]).all()


def test_stability_compares_each_layer_with_the_one_before():
    best_01, best_12, best_56 = (
        [9 if i in best else 0 for i in range(8)] for best in ((0, 1), (1, 2), (5, 6))
    )
    jaccard = measure(best_01, best_01, best_12, best_56)["stability_jaccard"]
    assert jaccard[1:] == [1, 0.3333, 0] and np.isnan(jaccard[0])
    spearman = measure(range(8), range(8), ORACLE.tolist())["stability_spearman"]
    assert spearman[1:] == [1, -1] and np.isnan(spearman[0])


def test_layers_that_are_no_neighbours_have_no_stability():
    values = measure(*[range(8)] * 4, layers=[3, 4, 8, 9])
    for key in ("stability_jaccard", "stability_spearman"):
        assert np.isnan(values[key]).tolist() == [True, False, True, False]


def test_each_layer_is_averaged_over_the_prompts_that_have_it():
    values = np.array([[1.0, NAN, NAN], [3.0, NAN, 5.0], [NAN, NAN, 5.0]])
    first, second, third = intervals(values)
    assert first.mean == 2 and 1 <= first.low < first.high <= 3
    assert second is None
    assert third.mean == third.low == third.high == 5


def test_one_prompt_has_a_mean_and_no_interval():
    (value,) = intervals(np.array([[0.5]]))
    assert (value.mean, value.low, value.high) == (0.5, None, None)
