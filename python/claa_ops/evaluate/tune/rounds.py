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
_LONGEST = 64  # tokens of an answer
_MORE = 8  # those of a right one beyond full prefill's


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


def known(example: Example) -> Example | None:
    """The prompt with its right answer as the target, if that can be said in one way alone.

    It can where the answer's beginning is given and one answer is right; a space divides them.
    """
    if example.target is not None:
        return example
    if example.answer_prefix and len(example.answers) == 1:
        return replace(example, target=f" {example.answers[0]}", grade=None, then=None)
    return None


def asked(example: Example) -> Example:
    """The prompt as it is put to full prefill, which answers in a few tokens."""
    return replace(example, max_new_tokens=min(example.max_new_tokens, _LONGEST))


def answered(example: Example, said: str, count: TokenCounter) -> Example | None:
    """The prompt as it is put to a setting, now that full prefill has answered it.

    Where the answer's beginning is given, full prefill's own answer is the target, up to the end
    of what is right in it; None if it is not right. Elsewhere the words are open: a setting's
    answer is graded, and need not be much longer than that.

    Args:
        example: the prompt.
        said: full prefill's answer.
        count: how many tokens texts have.
    """
    assert example.grade is not None  # it has no target
    found = [(said.lower().find(right.lower()), len(right)) for right in example.answers]
    is_right = bool(said) and example.grade(said) == 1
    said = said[: max((place + length for place, length in found if place >= 0), default=None)]
    if example.answer_prefix:
        return replace(example, target=said, grade=None, then=None) if is_right else None
    longest = asked(example).max_new_tokens
    return replace(
        example, max_new_tokens=min(longest, count(said) + _MORE) if is_right else longest
    )
