"""What a setting keeps of full prefill's score, with an interval, and which one to choose."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from claa_ops.evaluate.grid.cells import Cell

_RESAMPLES = 1_000
_TAIL = 10  # per cent of the resamples beyond each end of an interval
ENOUGH = 40  # prompts without which a setting is not said to reach the aim
_ALIKE = 0.02  # of full prefill's score
SOME = 8  # and without which it is not said to be the best, if others have as many

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
class Verdict:
    """What a setting keeps of full prefill's score.

    Attributes:
        cell: the setting.
        work: multiply-adds of its layers, by weights and in attention, as a share of full
            prefill's.
        prompts: how many it was tried on.
        ratio: the sum of its scores by the sum of full prefill's; NaN if that has none.
        low, high: between them lie 80 % of the ratio's bootstrap resamples over prompts, so that
            each alone is a bound with 90 % confidence.
        right: the same ratio of right answers alone.
        tasks: the ratio by task, of the tasks that count.
    """

    cell: Cell
    work: float
    prompts: int
    ratio: float
    low: float
    high: float
    right: float
    tasks: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The task with the least ratio."""
        return min(self.tasks.items(), key=lambda pair: pair[1], default=("-", float("nan")))

    def fails(self, aim: float) -> bool:
        """Whether it clearly does not reach the aim."""
        return self.high < aim

    def reaches(self, aim: float, worst: float) -> bool:
        """Whether it was shown to reach the aim, and each task its own."""
        return (
            self.prompts >= ENOUGH
            and self.low >= aim
            and self.right >= aim
            and self.worst[1] >= worst
        )


def judge(
    cell: Cell,
    work: float,
    own: Mapping[Prompt, Score],
    full: Mapping[Prompt, Score],
    tasks: Collection[str],
) -> Verdict:
    """Compare a setting's scores with full prefill's on the same prompts.

    Args:
        cell: the setting.
        work: its share of full prefill's.
        own: its scores, of one prompt or more.
        full: full prefill's, of these prompts and maybe more.
        tasks: those that count; prompts of others are left out.
    """
    prompts = [prompt for prompt in own if prompt[0] in tasks]
    pairs = np.array([[own[prompt].mean, full[prompt].mean] for prompt in prompts]).reshape(-1, 2)
    right = np.array([[own[prompt].right, full[prompt].right] for prompt in prompts])
    low = high = float("nan")
    if len(pairs):
        draw = np.random.default_rng(0)  # equal scores give equal intervals
        counts = draw.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=_RESAMPLES)
        sums = counts @ pairs
        drawn = sums[sums[:, 1] > 0]
        if len(drawn):
            low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [_TAIL, 100 - _TAIL])
    by_task = {
        task: _ratio(pairs[[prompt[0] == task for prompt in prompts]])
        for task in dict.fromkeys(task for task, _ in prompts)
    }
    return Verdict(
        cell=cell,
        work=work,
        prompts=len(prompts),
        ratio=_ratio(pairs),
        low=float(low),
        high=float(high),
        right=_ratio(right.reshape(-1, 2)),
        tasks={task: ratio for task, ratio in by_task.items() if not np.isnan(ratio)},
    )


def choose(verdicts: Sequence[Verdict], aim: float, worst: float) -> tuple[Verdict, bool]:
    """The cheapest setting that was shown to reach the aim, else the best one found.

    The best one is that whose ratio is the highest with 90 % confidence, or a cheaper one that is
    hardly below it there; of those that do not clearly fail and were tried on some prompts, if
    there are any.

    Args:
        verdicts: one or more with a ratio.
        aim, worst: the least ratio over all prompts, and of each task.

    Returns:
        The choice, and whether it reaches the aim.
    """
    reaching = [one for one in verdicts if one.reaches(aim, worst)]
    if reaching:
        return min(reaching, key=lambda one: one.work), True
    some = min(SOME, max(one.prompts for one in verdicts))
    tried = [one for one in verdicts if one.prompts >= some]
    candidates = [one for one in tried if not one.fails(aim)] or tried
    highest = max(one.low for one in candidates)
    alike = [one for one in candidates if one.low >= highest - _ALIKE]
    return min(alike, key=lambda one: one.work), False


def _ratio(pairs: np.ndarray) -> float:
    own, full = pairs.sum(axis=0) if len(pairs) else (0.0, 0.0)
    return float(own / full) if full > 0 else float("nan")
