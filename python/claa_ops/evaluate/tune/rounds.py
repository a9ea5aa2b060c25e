"""Prompts with answers to force, in rounds of one prompt of each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from claa_ops.evaluate.tasks import Example, TaskSettings, check_task, examples
from claa_ops.evaluate.tasks.fit import TokenCounter

# Seeds of their own: what is chosen on these prompts is measured on others, whatever the seed.
_FIRST_SEED, _SEEDS = 1_000_000, 1_000
_DEPTHS = (0.5, 0.0, 0.75, 0.25, 1.0)  # of needles, one round after the other
_LONGEST = 64  # tokens of an answer of full prefill's own


@dataclass
class Rounds:
    """The prompts of each round, the same ones for the same seed.

    Attributes:
        tasks: as `check_task` reads them. Prompts are made here when a round is asked for; records
            are read once, and a round takes the next one of each file.
        length: tokens of the prompts that are made here.
        seed: decides the prompts; each seed has 1,000 rounds.
        filler: the text around the facts.
        count: how many tokens texts have.
        on_problem: told of what cannot be used.
    """

    tasks: Sequence[str]
    length: int
    seed: int
    filler: Path | None
    count: TokenCounter
    on_problem: Callable[[str], None]

    def __post_init__(self) -> None:
        self._records: dict[str, list[Example]] = {}

    def take(self, index: int) -> list[Example]:
        """One prompt of each task; fewer where a task has no more, or no room at this length."""
        taken = []
        for task in self.tasks:
            if check_task(task)[2] is None:
                found = self._make(task, index)
                # A group of tasks has its prompts all; short prompts are of several lengths.
                by_task: dict[str, list[Example]] = {}
                for example in found:
                    by_task.setdefault(example.task, []).append(example)
                taken += [group[index % len(group)] for group in by_task.values()]
            else:
                if task not in self._records:
                    self._records[task] = self._make(task, 0)
                taken += self._records[task][index : index + 1]
        return taken

    def _make(self, task: str, index: int) -> list[Example]:
        settings = TaskSettings(
            lengths=[self.length],
            depths=[_DEPTHS[index % len(_DEPTHS)]],
            prompts=1,
            seed=_FIRST_SEED + _SEEDS * self.seed + index,
            filler=self.filler,
        )
        # What has no room has none in any round.
        on_problem = (lambda problem: None) if index else self.on_problem
        return list(examples([task], settings, self.count, on_problem))


def has_known_answer(example: Example) -> bool:
    """Whether it is known, token by token, what a model that is right says."""
    return example.target is not None or bool(example.answer_prefix and len(example.answers) == 1)


def with_known_answer(example: Example) -> Example:
    """The prompt with its one answer as the target; a space divides it from its beginning."""
    if example.target is not None:
        return example
    return replace(example, target=f" {example.answers[0]}", grade=None)


def asked(example: Example) -> Example:
    """The prompt as it is put to full prefill, whose answer is looked at, in few tokens."""
    return replace(example, max_new_tokens=min(example.max_new_tokens, _LONGEST))


def with_answer(example: Example, answer: str) -> Example | None:
    """The prompt with full prefill's own answer as the target; None if that is not right.

    The answer ends where the last of the right answers, if they are known, ends for the first
    time: what a model says after that is not asked for.
    """
    if example.grade is None or example.grade(answer) < 1 or not answer:
        return None
    said = answer.lower()
    places = [(said.find(right.lower()), len(right)) for right in example.answers]
    end = max((place + length for place, length in places if place >= 0), default=len(answer))
    return replace(example, target=answer[:end], grade=None)
