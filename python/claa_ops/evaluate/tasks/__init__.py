"""Tasks by name: the prompts that they make, and how answers are graded."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from claa_ops.evaluate.tasks.beyond import BEYOND, SHORT
from claa_ops.evaluate.tasks.example import Example
from claa_ops.evaluate.tasks.fit import TokenCounter, drafted_examples
from claa_ops.evaluate.tasks.needle import KINDS, needle_examples
from claa_ops.evaluate.tasks.records import BENCHMARKS, check_records, record_examples
from claa_ops.evaluate.tasks.ruler import RULER
from claa_ops.huggingface.models import InputError

__all__ = ["Example", "TaskSettings", "check_task", "examples", "has_needles", "has_own_lengths"]

# All tasks that are made here, by a name for each group of them.
GROUPS = {
    "needle": [f"needle-{kind}" for kind in KINDS],
    "ruler": list(RULER),
    "beyond": list(BEYOND),
}
_MADE = [task for group in GROUPS.values() for task in group]
TASKS = tuple(dict.fromkeys([*GROUPS, *_MADE, *BENCHMARKS]))


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Which prompts of the tasks.

    Attributes:
        lengths, prompts, seed, filler: of the tasks that are made here, see `needle_examples` and
            `drafted_examples`.
        depths: of the needle tasks.
        limit: records taken of each file; None for all.
    """

    lengths: Sequence[int] = (1000,)
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    prompts: int = 2
    seed: int = 0
    filler: Path | None = None
    limit: int | None = None


def check_task(task: str) -> tuple[str, str | None, str | None]:
    """Split ``NAME``, ``NAME:SOURCE`` or ``NAME/TASK:SOURCE`` into its parts.

    Raises:
        InputError: a name is unknown, or it needs a source and has none, or one that is not
            there.
    """
    name, _, source = task.partition(":")
    name, _, subtask = name.partition("/")
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise InputError(
            f"unknown task {name!r}: expected {', '.join(TASKS)}; did you mean {near!r}?"
        )
    if name in BENCHMARKS and not source and (subtask or name not in GROUPS):
        raise InputError(
            f"the task {name} needs its records: {name}:FILE, {name}:FOLDER or "
            f"{name}:hf://datasets/OWNER/NAME/FILE"
        )
    if name not in BENCHMARKS and (source or subtask):
        raise InputError(f"the task {name} takes no records, got {task}")
    if source:
        check_records(name, subtask or None, source)
    return name, subtask or None, source or None


def has_needles(tasks: Sequence[str]) -> bool:
    """Whether one of the tasks is made here, with the lengths asked for, and not of records."""
    return any(check_task(task)[2] is None for task in tasks)


def has_own_lengths(task: str) -> bool:
    """Whether the prompts of a task made here have several lengths, whichever are asked for."""
    return task.startswith("beyond-short")


def examples(
    tasks: Sequence[str],
    settings: TaskSettings,
    count: TokenCounter,
    on_problem: Callable[[str], None],
) -> Iterator[Example]:
    """Yield the prompts of all tasks, in order; tell ``on_problem`` of what is left out.

    What is asked for twice comes once, and no two prompts of a task have the same name: the
    second of two files of one name has its records named by its folder too.

    Raises:
        InputError: a task is unknown, or its files or filler cannot be used.
    """
    places: dict[tuple[str, str], str] = {}
    for task in tasks:
        for example in _task_examples(task, settings, count, on_problem):
            if places.get((example.task, example.name), example.where) != example.where:
                example = replace(example, name=example.where)
            if (example.task, example.name) not in places:
                places[example.task, example.name] = example.where
                yield example


def _task_examples(
    task: str,
    settings: TaskSettings,
    count: TokenCounter,
    on_problem: Callable[[str], None],
) -> Iterator[Example]:
    name, subtask, source = check_task(task)
    if source is not None:
        yield from record_examples(
            name, subtask, source, limit=settings.limit, on_problem=on_problem
        )
        return
    for made in GROUPS.get(name, [name]):
        yield from _made_examples(made, settings, count, on_problem)


def _made_examples(
    task: str,
    settings: TaskSettings,
    count: TokenCounter,
    on_problem: Callable[[str], None],
) -> Iterator[Example]:
    if task in GROUPS["needle"]:
        yield from needle_examples(
            task.removeprefix("needle-"),
            count,
            lengths=settings.lengths,
            depths=settings.depths,
            prompts=settings.prompts,
            seed=settings.seed,
            filler=settings.filler,
            on_problem=on_problem,
        )
        return
    short = has_own_lengths(task)
    yield from drafted_examples(
        task,
        (RULER | BEYOND)[task],
        count,
        lengths=SHORT if short else settings.lengths,
        prompts=-(-settings.prompts // len(SHORT)) if short else settings.prompts,
        seed=settings.seed,
        filler=settings.filler,
        on_problem=on_problem,
    )
