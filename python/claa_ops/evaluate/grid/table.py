"""Means, intervals and differences: rows of each cell, over all prompts and parts of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from claa_ops.evaluate.grid.cells import Cell
from claa_ops.evaluate.grid.records import Record
from claa_ops.evaluate.intervals import Interval, bootstrap
from claa_ops.evaluate.tasks import has_own_lengths

_Group = tuple[str, int | None]  # a task, and a length of its prompts
_Scores = dict[_Group, dict[str, float]]  # of each prompt


@dataclass(frozen=True)
class Row:
    """One cell of one model, over all prompts, those of a length, or those of a task and length.

    Attributes:
        model, label, layer, keep: of the cell.
        task: None for all tasks.
        length: tokens of the prompts; None for all lengths, or where a task has its own.
        groups, prompts: how many tasks and lengths there are, and how many prompts.
        accuracy: the mean over tasks and lengths.
        difference: to the baseline, over the prompts that both have; None for the baseline.
        relative: the mean over tasks and lengths of the accuracy as a share of full prefill's, for
            those where that is ``min_full`` or more; None if there is none.
        worst: the least of these shares.
        worst_task: the task and length where it is found, as text.
        work: multiply-adds by weights, as a share of full prefill's.
        cache: bytes of keys and values, as a share of full prefill's.
        cache_mib: their mean in MiB.
        time: seconds of the prefill as a share of full prefill's of the same prompt in the same
            run, the median.
        seconds: of the prefill of a prompt, the median.
        facts: the mean share of a fact's tokens that reached the last layer; None without facts.
        whole_facts: the share of facts of which all tokens did.
        logprob: mean log-probability of a token of the right answer; None without such tasks.
    """

    model: str
    label: str
    layer: int | tuple[int, ...] | None
    keep: float | int | tuple[float | int, ...] | None
    task: str | None
    length: int | None
    groups: int
    prompts: int
    accuracy: Interval
    difference: Interval | None
    relative: Interval | None
    worst: float | None
    worst_task: str | None
    work: float
    cache: float
    cache_mib: float
    time: float
    seconds: float
    facts: float | None
    whole_facts: float | None
    logprob: float | None

    @property
    def is_total(self) -> bool:
        """Whether it is over all prompts."""
        return self.task is None and self.length is None


def summarise(
    records: Sequence[Record], baseline: str = "full", min_full: float = 0.3
) -> list[Row]:
    """For each model the rows of its cells: over all prompts, for each length, for each task.

    Rows of lengths are left out where there is one, and rows of tasks where there is one task and
    length.

    Args:
        records: of one or more models, with those of full prefill.
        baseline: the label of the method that differences are taken to: its cell of the same
            layers and budgets, or of the same budgets, or its only one.
        min_full: the accuracy of full prefill from which on a task counts for ``relative``.
    """
    return [
        row
        for model in dict.fromkeys(record.model for record in records)
        for row in _Model([r for r in records if r.model == model], baseline, min_full).rows()
    ]


class _Model:
    """The records of one model."""

    def __init__(self, records: Sequence[Record], baseline: str, min_full: float) -> None:
        self._cells: dict[Cell, list[Record]] = {}
        for record in records:
            self._cells.setdefault(record.cell, []).append(record)
        self._baseline, self._min_full = baseline, min_full
        self._groups = list(dict.fromkeys(map(_group, records)))

    def rows(self) -> Iterator[Row]:
        """All of them."""
        yield from self._parts(None, None, self._groups)
        lengths = {length for _, length in self._groups}
        if len(lengths) > 1:
            for length in sorted(length for length in lengths if length is not None):
                yield from self._parts(None, length, [g for g in self._groups if g[1] == length])
        if len(self._groups) > 1:
            for task, at in self._groups:
                yield from self._parts(task, at, [(task, at)])

    def _parts(
        self, task: str | None, length: int | None, groups: Sequence[_Group]
    ) -> Iterator[Row]:
        """A row of each cell, over its records in these groups."""
        for cell, records in self._cells.items():
            answered = [record for record in records if _group(record) in groups]
            if answered:
                yield self._row(cell, task, length, answered)

    def _row(self, cell: Cell, task: str | None, length: int | None, answered: list[Record]) -> Row:
        scores = _by_group(answered)
        other = _counterpart(cell, self._baseline, self._cells)
        whole = [record for each in self._full() for record in self._cells[each]]
        bytes_of = {(record.task, record.name): record.cache_bytes for record in whole}
        shares = [
            record.cache_bytes / bytes_of[record.task, record.name]
            for record in answered
            if (record.task, record.name) in bytes_of
        ]
        relative, worst, worst_task = self._relative(scores, whole)
        facts = [share for record in answered for share in record.facts]
        logprobs = [record.logprob for record in answered if record.logprob is not None]
        return Row(
            model=answered[0].model,
            label=cell.label,
            layer=cell.layer,
            keep=cell.keep,
            task=task,
            length=length,
            groups=len(scores),
            prompts=len(answered),
            accuracy=bootstrap([list(x.values()) for x in scores.values()]),
            difference=None if other is None else _difference(scores, self._cells[other]),
            relative=relative,
            worst=worst,
            worst_task=worst_task,
            work=float(np.mean([record.work for record in answered])),
            cache=float(np.mean(shares)) if shares else float("nan"),
            cache_mib=float(np.mean([record.cache_bytes for record in answered])) / 2**20,
            time=float(np.median([record.seconds / record.full_seconds for record in answered])),
            seconds=float(np.median([record.seconds for record in answered])),
            facts=float(np.mean(facts)) if facts else None,
            whole_facts=float(np.mean([share == 1 for share in facts])) if facts else None,
            logprob=float(np.mean(logprobs)) if logprobs else None,
        )

    def _full(self) -> list[Cell]:
        return [cell for cell in self._cells if cell.label == "full"]

    def _relative(
        self, scores: _Scores, full: Iterable[Record]
    ) -> tuple[Interval | None, float | None, str | None]:
        """The mean of the groups' shares of full prefill's accuracy, the least, and where it is."""
        ours, theirs, names = [], [], []
        whole = _by_group(full)
        for group, of_prompts in scores.items():
            others = whole.get(group, {})
            both = [name for name in of_prompts if name in others]
            known = [others[name] for name in both]
            if any(known) and np.mean(known) >= self._min_full:
                ours.append([of_prompts[name] for name in both])
                theirs.append(known)
                names.append(_name(*group))
        if not ours:
            return None, None, None
        shares = [np.mean(mine) / np.mean(known) for mine, known in zip(ours, theirs, strict=True)]
        least = int(np.argmin(shares))
        return bootstrap(ours, theirs), float(shares[least]), names[least]


def as_table(rows: Sequence[Row], baseline: str) -> Group:
    """The rows for a terminal: tasks first, and the totals below them."""
    tables = []
    for header, body in reversed(_tables(rows, baseline)):
        tables.append(table := Table(*header, show_edge=False, pad_edge=False))
        for line in body:
            table.add_row(*line)
        table.add_section()
    return Group(*tables)


def as_markdown(rows: Sequence[Row], baseline: str) -> str:
    """The rows as tables of a document: all prompts, then lengths, then tasks."""
    return "\n".join(
        "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *body])
        for header, body in _tables(rows, baseline)
    )


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows for programs."""
    return [asdict(row) for row in rows]


def _tables(rows: Sequence[Row], baseline: str) -> list[tuple[list[str], list[list[str]]]]:
    """Header and lines of the table of all prompts and lengths, and of that of tasks."""
    whole = [row for row in rows if row.task is None]
    of_tasks = [row for row in rows if row.task is not None]
    return [_text(part, baseline) for part in (whole, of_tasks) if part]


def _text(rows: Sequence[Row], baseline: str) -> tuple[list[str], list[list[str]]]:
    of_tasks = rows[0].task is not None
    several_models = len({row.model for row in rows}) > 1
    several_lengths = len({row.length for row in rows}) > 1
    has_facts = any(row.facts is not None for row in rows)
    # What stands in a column, for those that are shown.
    columns: list[tuple[bool, str, Callable[[Row], str]]] = [
        (several_models, "model", lambda row: row.model),
        (of_tasks, "task", lambda row: _name(row.task or "", row.length)),
        (several_lengths and not of_tasks, "length", lambda row: _length(row.length)),
        (True, "method", lambda row: row.label),
        (True, "layer", lambda row: _join(row.layer)),
        (True, "keep", lambda row: _join(row.keep)),
        (True, "work", lambda row: f"{row.work:.2f}"),
        (True, "time", lambda row: f"{row.time:.2f} ({_seconds(row.seconds)})"),
        (True, "cache", lambda row: f"{row.cache:.2f} ({row.cache_mib:,.1f} MiB)"),
        (has_facts, "facts", _facts),
        (True, "accuracy", lambda row: _interval(row.accuracy)),
        (True, f"against {baseline}", lambda row: _interval(row.difference, signed=True)),
        (not of_tasks, "share of full", lambda row: _interval(row.relative)),
        (not of_tasks, "worst task", _worst),
    ]
    shown = [(title, text) for is_shown, title, text in columns if is_shown]
    return [title for title, _ in shown], [[text(row) for _, text in shown] for row in rows]


def _facts(row: Row) -> str:
    if row.facts is None or row.whole_facts is None:
        return "-"
    return f"{row.facts:.2f} ({row.whole_facts:.2f} whole)"


def _worst(row: Row) -> str:
    return "-" if row.worst is None else f"{row.worst:.2f} ({row.worst_task})"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _length(length: int | None) -> str:
    return "all" if length is None else f"{length:,}"


def _name(task: str, length: int | None) -> str:
    return task if length is None else f"{task}, {length:,}"


def _group(record: Record) -> _Group:
    """The task of a record, and its length if that is one of those that were asked for."""
    length = record.place.get("length")
    return record.task, None if length is None or has_own_lengths(record.task) else int(length)


def _by_group(records: Iterable[Record]) -> _Scores:
    scores: _Scores = {}
    for record in records:
        scores.setdefault(_group(record), {})[record.name] = record.score
    return scores


def _counterpart(cell: Cell, baseline: str, cells: Iterable[Cell]) -> Cell | None:
    """The cell of the baseline that this one is compared with."""
    if cell.label == baseline:
        return None
    others = [other for other in cells if other.label == baseline]
    for same in (
        [other for other in others if (other.layer, other.keep) == (cell.layer, cell.keep)],
        [other for other in others if other.keep == cell.keep],
        others,
    ):
        if len(same) == 1:
            return same[0]
    return None


def _difference(scores: _Scores, baseline: Iterable[Record]) -> Interval | None:
    """The mean over tasks of the paired differences."""
    others = _by_group(baseline)
    groups = []
    for group, names in scores.items():
        other = others.get(group, {})
        pairs = [score - other[name] for name, score in names.items() if name in other]
        groups += [pairs] * bool(pairs)
    return bootstrap(groups) if groups else None


def _join(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _interval(interval: Interval | None, signed: bool = False) -> str:
    if interval is None:
        return "-"
    sign = "+" if signed else ""
    text = f"{interval.mean:{sign}.2f}"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} [{interval.low:{sign}.2f}, {interval.high:{sign}.2f}]"
