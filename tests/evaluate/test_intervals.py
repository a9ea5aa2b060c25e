import numpy as np
import pytest
from scipy import stats

from claa_ops.evaluate.intervals import bootstrap


def test_one_group_agrees_with_scipy():
    values = np.random.default_rng(1).random(40)
    ours = bootstrap([values])
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000)
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(expected.confidence_interval.low, abs=5e-3)
    assert ours.high == pytest.approx(expected.confidence_interval.high, abs=5e-3)


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
