"""What a setting keeps of full prefill's score, with intervals, and which one to choose."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from claa_ops.evaluate.grid.cells import Cell

_RESAMPLES = 1_000
_TAIL = 10  # per cent of the resamples beyond each end of an interval
_AS_ALL = 4  # prompts that each task is taken to have beside its own, which went as all did
_ALIKE = 0.02  # of full prefill's score
ENOUGH = 40  # prompts without which a setting is not said to reach the aim
SOME = 8  # and without which it is not said to be good

Prompt = tuple[str, str]  # task and name


class Score(NamedTuple):
    """How well one prompt was answered.

    Attributes:
        right: 1.0 if each token of the right answer is the model's first choice, else 0.0; where
            the words are open, the grade of what greedy decoding says.
        probability: of the right answer; where the words are open, the grade once more.
    """

    right: float
    probability: float

    @property
    def mean(self) -> float:
        """Of both: the first is what users get, the second tells more where prompts are few."""
        return (self.right + self.probability) / 2


@dataclass(frozen=True)
class Aim:
    """The least shares of full prefill's score: of all prompts together, and in each task."""

    mean: float
    worst: float


@dataclass(frozen=True)
class Verdict:
    """What a setting keeps of full prefill's score.

    A bound is one with 90 % confidence, by bootstrap over the prompts. For that of a task it is
    taken to have four more prompts, which went as all did, so that a single one does not decide.

    Attributes:
        cell: the setting.
        work: multiply-adds of its layers, by weights and in attention, as a share of full
            prefill's; the mean over the prompts.
        prompts: how many it was tried on.
        ratio: the sum of its scores by the sum of full prefill's; NaN if that has none.
        low, high: bounds of the ratio, from below and from above.
        worst_low: a bound of the least ratio of a task from below.
        worst_high: the least bound of a task's ratio from above, all of which hold at once.
        right: the ratio of right answers alone.
        tasks: the ratio by task, of the tasks that count.
    """

    cell: Cell
    work: float
    prompts: int
    ratio: float
    low: float
    high: float
    worst_low: float
    worst_high: float
    right: float
    tasks: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The task with the least ratio."""
        return min(self.tasks.items(), key=lambda pair: pair[1], default=("-", float("nan")))

    def fails(self, aim: Aim) -> bool:
        """Whether it clearly does not reach the aim."""
        return self.high < aim.mean or self.worst_high < aim.worst

    def holds(self, aim: Aim) -> bool:
        """Whether it reaches the aim on the prompts that it was tried on, which are some."""
        reached = self.ratio >= aim.mean and self.worst[1] >= aim.worst
        return self.prompts >= SOME and reached and self.right >= aim.mean

    def reaches(self, aim: Aim) -> bool:
        """Whether it was shown to reach the aim, and each task its own."""
        return self.prompts >= ENOUGH and self.holds(aim) and self.low >= aim.mean

    def floor(self, aim: Aim) -> float:
        """How near it is to the aim for sure, where that is farthest: 1 for all of it."""
        return min(self.low / aim.mean, self.worst_low / aim.worst)


def judge(
    cell: Cell,
    work: float,
    own: Mapping[Prompt, Score],
    full: Mapping[Prompt, Score],
    tasks: Collection[str],
) -> Verdict:
    """Compare a setting's scores with full prefill's, or another setting's, on the same prompts.

    Args:
        cell: the setting.
        work: its share of full prefill's.
        own: its scores.
        full: full prefill's; of what either lacks, nothing counts.
        tasks: those that count; prompts of others are left out.
    """
    by_task: dict[str, list[Prompt]] = {}
    for prompt in own:
        if prompt[0] in tasks and prompt in full:
            by_task.setdefault(prompt[0], []).append(prompt)
    means = {
        task: np.array([[own[each].mean, full[each].mean] for each in prompts])
        for task, prompts in by_task.items()
    }
    right = [[own[x].right, full[x].right] for prompts in by_task.values() for x in prompts]
    pairs = np.concatenate([np.empty((0, 2)), *means.values()])
    ratios = {task: _ratio(rows) for task, rows in means.items() if rows[:, 1].sum() > 0}
    low, high, worst_low, worst_high = _bounds([means[task] for task in ratios])
    return Verdict(
        cell=cell,
        work=work,
        prompts=len(pairs),
        ratio=_ratio(pairs),
        low=low,
        high=high,
        worst_low=worst_low,
        worst_high=worst_high,
        right=_ratio(np.array(right).reshape(-1, 2)),
        tasks=ratios,
    )


def choose(verdicts: Sequence[Verdict], aim: Aim) -> tuple[Verdict, bool]:
    """The cheapest setting that was shown to reach the aim, else the best one found.

    The best one is that which is nearest to the aim for sure, in the mean and in the worst task,
    or a cheaper one that is hardly farther from it; of those that do not clearly fail and were
    tried on at least half as many prompts as any, if there are any.

    Args:
        verdicts: one or more with a ratio.
        aim: what is wanted.

    Returns:
        The choice, and whether it reaches the aim.
    """
    reaching = [one for one in verdicts if one.reaches(aim)]
    if reaching:
        return min(reaching, key=lambda one: one.work), True
    most = max(one.prompts for one in verdicts)
    tried = [one for one in verdicts if one.prompts >= max(min(SOME, most), most / 2)]
    candidates = [one for one in tried if not one.fails(aim)] or tried
    nearest = max(one.floor(aim) for one in candidates)
    alike = [one for one in candidates if one.floor(aim) >= nearest - _ALIKE]
    return min(alike, key=lambda one: one.work), False


def _bounds(tasks: Sequence[np.ndarray]) -> tuple[float, float, float, float]:
    """``low``, ``high``, ``worst_low`` and ``worst_high`` of pairs of scores ``[n, 2]`` by task."""
    if not tasks:
        return (float("nan"),) * 4
    prompts = sum(map(len, tasks))
    draw = np.random.default_rng(0)  # equal scores give equal bounds
    counts = draw.multinomial(prompts, np.full(prompts, 1 / prompts), size=_RESAMPLES)
    ends = np.cumsum([len(pairs) for pairs in tasks])
    of_tasks = np.split(counts, ends[:-1], axis=1)
    sums = np.stack([drawn @ pairs for drawn, pairs in zip(of_tasks, tasks, strict=True)])
    own, full = sums[:, sums[:, :, 1].sum(axis=0) > 0].transpose(2, 0, 1)  # [tasks, resamples]
    ratio = own.sum(axis=0) / full.sum(axis=0)
    more = _AS_ALL * np.array([pairs[:, 1].mean() for pairs in tasks])[:, None]
    by_task = (own + more * ratio) / (full + more)
    low, high = np.percentile(ratio, [_TAIL, 100 - _TAIL])
    worst_low = np.percentile(by_task.min(axis=0), _TAIL)
    # One of many tasks is below its bound by chance more often than one alone.
    worst_high = np.percentile(by_task, 100 - _TAIL / len(tasks), axis=1).min()
    return float(low), float(high), float(worst_low), float(worst_high)


def _ratio(pairs: np.ndarray) -> float:
    own, full = pairs.sum(axis=0) if len(pairs) else (0.0, 0.0)
    return float(own / full) if full > 0 else float("nan")
