"""Intervals of means: what the bootstrap must give whatever computes it."""

import numpy as np
import pytest
from scipy import stats

from claa_ops.evaluate.intervals import bootstrap


def test_the_interval_of_one_group_is_that_of_the_normal_law():
    values = np.random.default_rng(1).random(400)
    interval = bootstrap([values])
    error = values.std() / np.sqrt(len(values))
    low, high = stats.norm.interval(0.95, values.mean(), error)
    assert interval.mean == values.mean()
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.1 * error)


def test_few_right_answers_have_the_interval_of_the_binomial():
    interval = bootstrap([[1.0] * 3 + [0.0] * 17])
    low, high = stats.binom.interval(0.95, 20, 3 / 20)
    assert (interval.low, interval.high) == pytest.approx((low / 20, high / 20), abs=0.051)


def test_equal_values_have_equal_intervals_and_paired_ones_are_values_like_others():
    first, second = np.random.default_rng(3).integers(0, 2, (2, 30)).astype(float)
    assert bootstrap([first - second]) == bootstrap([first - second])
    paired, apart = bootstrap([first - first]), bootstrap([first])
    assert (paired.low, paired.high) == (0, 0) and apart.low < apart.high


def test_groups_count_alike_whatever_their_size():
    interval = bootstrap([[1.0] * 2, [0.0] * 98])
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_groups_are_resampled_apart():
    draw = np.random.default_rng(2)
    groups = [draw.normal(size=50), 10 + draw.normal(size=30)]
    interval = bootstrap(groups)
    error = np.sqrt(sum(group.var() / len(group) for group in groups)) / 2
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_one_prompt_has_no_interval():
    assert bootstrap([[0.25], [0.75, 0.5]]).low is None
    assert bootstrap([[0.25]]).mean == 0.25


def test_a_share_is_that_of_paired_means():
    draw = np.random.default_rng(4)
    full = [draw.integers(0, 2, size).astype(float) for size in (60, 40)]
    less = [values * draw.integers(0, 2, len(values)) for values in full]
    interval = bootstrap(less, full)
    shares = [a.mean() / b.mean() for a, b in zip(less, full, strict=True)]
    assert interval.mean == pytest.approx(np.mean(shares))
    # The error of a ratio: that of what is left when the share of the whole is taken off.
    variances = [
        (a - share * b).var() / len(a) / b.mean() ** 2
        for a, b, share in zip(less, full, shares, strict=True)
    ]
    width = 2 * 1.96 * np.sqrt(sum(variances)) / 2
    assert interval.high - interval.low == pytest.approx(width, rel=0.1)
    same = bootstrap(full, full)
    assert (same.mean, same.low, same.high) == (1.0, 1.0, 1.0)


def test_a_draw_without_a_right_answer_is_no_division_by_zero():
    interval = bootstrap([[1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]])
    assert interval.mean == 1.0 and 0.0 <= interval.low <= interval.high <= 1.0
