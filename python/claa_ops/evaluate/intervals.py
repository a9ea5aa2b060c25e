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


def bootstrap(
    groups: Sequence[Sequence[float]], over: Sequence[Sequence[float]] | None = None
) -> Interval:
    """The mean of the groups' means, with its percentile bootstrap interval.

    Prompts are drawn with replacement within each group, so that tasks of different numbers of
    prompts count alike. Paired differences, prompt by prompt, are values like others. The seed is
    fixed: equal values give equal intervals.

    Args:
        groups: one or more groups, such as tasks, of one or more values.
        over: for each value its counterpart, such as full prefill's; then it is the mean of the
            groups' means as shares of those of their counterparts, which are drawn in pairs. No
            group of counterparts has a mean of 0.

    Example:
        >>> bootstrap([[0.0, 1.0]])
        Interval(mean=0.5, low=0.0, high=1.0)
        >>> bootstrap([[0.5, 0.25]], over=[[1.0, 0.5]])
        Interval(mean=0.5, low=0.5, high=0.5)
    """
    above = [np.asarray(group, dtype=np.float64) for group in groups]
    below = [np.ones_like(values) for values in above]
    if over is not None:
        below = [np.asarray(group, dtype=np.float64) for group in over]

    def mean_of_shares(*drawn: np.ndarray, axis: int) -> np.ndarray:
        shares = []
        for places, values, others in zip(drawn, above, below, strict=True):
            places = places.astype(np.int64)
            part, whole = values[places].mean(axis=axis), others[places].mean(axis=axis)
            # A draw in which the whole is 0 says nothing of a share: it is what it is in all.
            share = np.full_like(part, values.mean() / others.mean())
            shares.append(np.divide(part, whole, out=share, where=whole != 0))
        return np.mean(shares, axis=0)

    every = [np.arange(len(values)) for values in above]
    mean = float(np.mean([a.mean() / b.mean() for a, b in zip(above, below, strict=True)]))
    if min(map(len, every)) < 2:
        return Interval(mean, None, None)
    found = stats.bootstrap(
        every,
        mean_of_shares,
        n_resamples=_RESAMPLES,
        method="percentile",
        vectorized=True,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))
