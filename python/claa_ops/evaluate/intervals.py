"""Means over prompts with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, which fewer than two prompts do not have."""

    mean: float
    low: float | None
    high: float | None


def bootstrap(groups: Sequence[Sequence[float]]) -> Interval:
    """The mean of the groups' means, with its percentile bootstrap interval.

    Prompts are drawn with replacement within each group, so that tasks of different numbers of
    prompts count alike. Paired differences, prompt by prompt, are values like others. The seed is
    fixed: equal values give equal intervals.

    Args:
        groups: one or more groups, such as tasks, of one or more values.

    Example:
        >>> bootstrap([[0.0, 1.0]])
        Interval(mean=0.5, low=0.0, high=1.0)
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    mean = float(np.mean([values.mean() for values in arrays]))
    if min(map(len, arrays)) < 2:
        return Interval(mean, None, None)

    def mean_of_means(*drawn: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([values.mean(axis=axis) for values in drawn], axis=0)

    found = stats.bootstrap(
        arrays,
        mean_of_means,
        n_resamples=_RESAMPLES,
        method="percentile",
        vectorized=True,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))
