"""Means, intervals and differences: a row for each cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from claa_ops.evaluate.grid.cells import Cell
from claa_ops.evaluate.grid.records import Record
from claa_ops.evaluate.intervals import Interval, bootstrap

_Scores = dict[str, dict[str, float]]  # task: prompt: score


@dataclass(frozen=True)
class Row:
    """One cell of one model, over all prompts.

    Attributes:
        model, label, layer, keep: of the cell.
        prompts: how many were answered.
        tasks: accuracy by task.
        accuracy: the mean over tasks.
        difference: to the baseline, over the prompts that both have; None for the baseline.
        work: multiply-adds by weights, as a share of full prefill's.
        cache: bytes of keys and values, as a share of full prefill's.
        cache_mib: their mean in MiB.
        logprob: mean log-probability of a token of the right answer; None without such tasks.
    """

    model: str
    label: str
    layer: int | tuple[int, ...] | None
    keep: float | int | tuple[float | int, ...] | None
    prompts: int
    tasks: dict[str, Interval]
    accuracy: Interval
    difference: Interval | None
    work: float
    cache: float
    cache_mib: float
    logprob: float | None

    @property
    def columns(self) -> list[str]:
        """Method, layers and budgets as text."""
        return [self.label, _join(self.layer), _join(self.keep)]


def summarise(records: Sequence[Record], baseline: str = "full") -> list[Row]:
    """One row for each model and cell, in the order of the records.

    Args:
        records: of one or more models, with those of full prefill.
        baseline: the label of the method that differences are taken to: its cell of the same
            layers and budgets, or of the same budgets, or its only one.
    """
    rows = []
    for model in dict.fromkeys(record.model for record in records):
        cells: dict[Cell, list[Record]] = {}
        for record in records:
            if record.model == model:
                cells.setdefault(record.cell, []).append(record)
        full = {
            (record.task, record.name): record.cache_bytes
            for cell, answered in cells.items()
            if cell.label == "full"
            for record in answered
        }
        for cell, answered in cells.items():
            other = _counterpart(cell, baseline, cells)
            shares = [
                record.cache_bytes / full[record.task, record.name]
                for record in answered
                if (record.task, record.name) in full
            ]
            logprobs = [record.logprob for record in answered if record.logprob is not None]
            scores = _by_task(answered)
            rows.append(
                Row(
                    model=model,
                    label=cell.label,
                    layer=cell.layer,
                    keep=cell.keep,
                    prompts=len(answered),
                    tasks={task: bootstrap([list(x.values())]) for task, x in scores.items()},
                    accuracy=bootstrap([list(x.values()) for x in scores.values()]),
                    difference=None if other is None else _difference(scores, cells[other]),
                    work=float(np.mean([record.work for record in answered])),
                    cache=float(np.mean(shares)) if shares else float("nan"),
                    cache_mib=float(np.mean([record.cache_bytes for record in answered])) / 2**20,
                    logprob=float(np.mean(logprobs)) if logprobs else None,
                )
            )
    return rows


def as_table(rows: Sequence[Row], baseline: str) -> Table:
    """The rows for a terminal."""
    header, body = _text(rows, baseline)
    table = Table(*header, show_edge=False, pad_edge=False)
    for line in body:
        table.add_row(*line)
    return table


def as_markdown(rows: Sequence[Row], baseline: str) -> str:
    """The rows as a table of a document."""
    header, body = _text(rows, baseline)
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows for programs."""
    return [asdict(row) for row in rows]


def _text(rows: Sequence[Row], baseline: str) -> tuple[list[str], list[list[str]]]:
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    several_models = len({row.model for row in rows}) > 1
    header = ["model"] * several_models + ["method", "layer", "keep", "work", "cache"]
    header += [*tasks, *["all tasks"] * (len(tasks) > 1), f"against {baseline}"]
    body = []
    for row in rows:
        line = [row.model] * several_models + row.columns
        line += [f"{row.work:.2f}", f"{row.cache:.2f} ({row.cache_mib:,.1f} MiB)"]
        line += [_interval(row.tasks.get(task)) for task in tasks]
        line += [_interval(row.accuracy)] * (len(tasks) > 1)
        body.append([*line, _interval(row.difference, signed=True)])
    return header, body


def _by_task(records: Iterable[Record]) -> _Scores:
    scores: _Scores = {}
    for record in records:
        scores.setdefault(record.task, {})[record.name] = record.score
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
    others = _by_task(baseline)
    groups = []
    for task, names in scores.items():
        other = others.get(task, {})
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
