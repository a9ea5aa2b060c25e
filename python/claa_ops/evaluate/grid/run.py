"""Carry out a plan: load each model, have its records made, write the files."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Group, RenderableType
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.grid.cells import Cell, make_cells
from claa_ops.evaluate.grid.journal import Journal
from claa_ops.evaluate.grid.records import End, Record, evaluate_model
from claa_ops.evaluate.grid.settings import Plan, load_name
from claa_ops.evaluate.grid.table import Row, as_json, as_markdown, as_table, summarise
from claa_ops.evaluate.inputs import make_folder
from claa_ops.evaluate.spec import MethodSpec, give_draft
from claa_ops.evaluate.tasks import TaskSettings, examples, has_needles
from claa_ops.evaluate.tasks.prompt import PromptCounter
from claa_ops.huggingface.models import InputError, load_model, resolve_device
from claa_ops.info import machine, versions
from claa_ops.methods import FullKV
from claa_ops.prefill import attach

JOURNAL = "records.jsonl"
_SHOWN = 20  # problems below a table


class Progress(Protocol):
    """What is told how far an evaluation is."""

    def step(self, text: str) -> None:
        """What is being done."""

    def say(self, text: str) -> None:
        """What the user should know from the beginning."""

    def total(self, records: int) -> None:
        """How many records are to be computed for this model."""

    def advance(self) -> None:
        """One of them is done."""


@dataclass(frozen=True)
class Results:
    """All that an evaluation found, and the files that it stands in.

    Attributes:
        plan: what was asked for.
        records, rows: what came of it, and the table of it.
        problems: what was left out, in sentences.
        remarks: what the table does not show, in sentences.
        machine: what it was measured on.
        files: the results and pictures written.
        end: whether all is done, or the time limit or an interrupt ended it.
    """

    plan: Plan
    records: list[Record]
    rows: list[Row]
    problems: list[str]
    remarks: list[str]
    machine: dict[str, Any]
    files: list[Path]
    end: End

    def check(self) -> None:
        """Raise InputError, with the first reason, if there is no record."""
        if not self.records:
            problems = self.problems[len(self.plan.left_out) :]
            raise InputError(f"nothing was evaluated: {problems[0] if problems else 'no prompts'}")

    def as_table(self) -> RenderableType:
        """The table, and what was left out."""
        parts: list[RenderableType] = [as_table(self.rows, self.plan.baseline)]
        parts += [Text(f"left out: {problem}") for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            more = len(self.problems) - _SHOWN
            parts.append(Text(f"left out: {more:,} more, which stand in results.json"))
        parts += [Text(f"note: {remark}") for remark in self.remarks]
        return Group(*parts)

    def as_json(self) -> dict[str, Any]:
        """Everything, with the settings and versions that it depends on."""
        return {
            "settings": _plain(asdict(self.plan)),
            "versions": versions(),
            "machine": self.machine,
            "finished": self.end == "all",
            "problems": self.problems,
            "remarks": self.remarks,
            "table": _plain(as_json(self.rows)),
            "records": [
                {
                    "model": record.model,
                    "task": record.task,
                    "name": record.name,
                    "place": record.place,
                    **record.cell.key(),
                    "score": record.score,
                    "scores": record.scores,
                    "logprob": record.logprob,
                    "work": record.work,
                    "operations": record.operations,
                    "cache_bytes": record.cache_bytes,
                    "seconds": record.seconds,
                    "full_seconds": record.full_seconds,
                    "tokens": record.tokens,
                    "kept": record.kept,
                    "facts": record.facts,
                    "answers": record.answers,
                }
                for record in self.records
            ],
        }


def run(plan: Plan, folder: Path, progress: Progress) -> Results:
    """Carry out a plan, or what is left of it, and write what came of it into a folder.

    The folder gets ``records.jsonl`` (the journal), ``results.json``, ``table.md``, and for each
    model a frontier and, for needles, heat maps; without any record it gets the journal alone.
    Where the time limit or an interrupt (Ctrl-C) ends the work, they show what there is by then.

    Raises:
        InputError: a model cannot be loaded or served, a layer or a setting does not fit it, the
            records or the filler cannot be read, another evaluation is writing into the folder,
            or the disk is full; finished records are safe.
    """
    make_folder(folder)
    with Journal(folder / JOURNAL) as journal:
        return _Run(plan, folder, journal, progress).results()


class _Run:
    def __init__(self, plan: Plan, folder: Path, journal: Journal, progress: Progress) -> None:
        self._plan, self._folder, self._journal, self._progress = plan, folder, journal, progress
        limit = math.inf if plan.time_limit is None else 60 * plan.time_limit
        self._deadline = time.monotonic() + limit
        self._problems: list[str] = []
        self._records: list[Record] = []

    def results(self) -> Results:
        """Evaluate all models, and write."""
        plan, progress = self._plan, self._progress
        for remark in plan.remarks:
            progress.say(f"note: {remark}")
        for method in plan.left_out:
            progress.say(f"left out: {method}")
        end: End = "all"
        for name in plan.models:
            try:
                end = self._evaluate(name)
            except KeyboardInterrupt:
                end = "interrupt"
            if end != "all":
                break
        progress.step("drawing")
        results = Results(
            plan,
            self._records,
            summarise(self._records, plan.baseline, plan.min_full),
            [*plan.left_out, *dict.fromkeys(self._problems)],
            [*plan.remarks, *_remarks(self._records)],
            machine(resolve_device(plan.device)),
            [],
            end,
        )
        try:
            results.files.extend(_write(results, self._folder) if results.records else [])
        except OSError as error:
            raise InputError(
                f"cannot write the results into {self._folder}: {error.strerror}; all "
                f"{len(self._journal)} finished records are safe in {self._journal.file}"
            ) from error
        return results

    def _evaluate(self, name: str) -> End:
        """Evaluate one model, as far as the time allows."""
        plan, progress = self._plan, self._progress
        if self._is_time_up():
            return "time"
        model, tokenizer = load_model(load_name(name), plan.dtype, plan.device, progress.step)
        try:
            attach(model)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        cells = _cells(plan, model, tokenizer, progress.step)
        progress.step("building prompts")
        prompts = list(
            examples(
                plan.tasks,
                _fitting(plan, model, name, self._problems.append),
                PromptCounter(tokenizer, plan.chat),
                self._problems.append,
            )
        )
        progress.say(f"{name}: {len(prompts):,} prompts, each prefilled in {len(cells)} ways")
        progress.step("prefilling")
        records = evaluate_model(
            model,
            tokenizer,
            name,
            prompts,
            cells,
            self._journal,
            chat=plan.chat,
            max_length=plan.max_length,
            batch_size=plan.batch_size,
            protect=plan.protect,
            is_time_up=self._is_time_up,
            on_total=progress.total,
            on_record=progress.advance,
            on_problem=self._problems.append,
        )
        self._records += records.found
        return records.end

    def _is_time_up(self) -> bool:
        return time.monotonic() > self._deadline


def _cells(
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    on_step: Callable[[str], None],
) -> list[Cell]:
    specs = [MethodSpec.parse(text) for text in plan.methods]
    if plan.draft is not None:
        draft = load_name(plan.draft)
        specs = give_draft(specs, draft, tokenizer, plan.dtype, plan.device, on_step)
    layers = model.config.get_text_config().num_hidden_layers
    return make_cells(specs, layers, plan.layers, plan.keeps, plan.schedules, plan.keep_kv)


def _fitting(
    plan: Plan, model: PreTrainedModel, name: str, on_problem: Callable[[str], None]
) -> TaskSettings:
    """The task settings with those lengths of needles that the model holds; the rest is told.

    Of a suite's lengths, which nobody chose one by one, those that fit, or half of what the
    model holds.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = plan.settings.lengths
    if plan.any_length and context is not None:
        fitting = [length for length in lengths if length < 0.98 * context]
        return replace(plan.settings, lengths=fitting or [context // 2])
    most = min(context or math.inf, plan.max_length or math.inf)
    for length in lengths if has_needles(plan.tasks) else ():
        if length > most:
            on_problem(
                f"needles of {length:,} tokens: the prompts of {name} may have {most:,}, the least "
                "of the model's context and of max_length"
            )
    return replace(plan.settings, lengths=[length for length in lengths if length <= most])


def _remarks(records: list[Record]) -> list[str]:
    """What the table does not show: a window that is no part of a prompt, but all of it."""
    prompts: dict[tuple[str, int], set[tuple[str, str]]] = {}
    for record in records:
        window = record.cell.method.window
        if record.tokens <= window and type(record.cell.method) is not FullKV:
            prompt = (record.task, record.name)
            prompts.setdefault((record.cell.label, window), set()).add(prompt)
    return [
        f"{label}: the window of {window:,} tokens is longer than {len(short):,} of the prompts, "
        "in which nothing was ranked"
        for (label, window), short in prompts.items()
    ]


def _write(results: Results, folder: Path) -> list[Path]:
    # matplotlib takes a second to import, which a refusal need not wait for.
    from claa_ops.evaluate.grid.picture import plot_frontier, plot_needles

    _replace(folder / "results.json", json.dumps(results.as_json(), indent=1) + "\n")
    _replace(folder / "table.md", as_markdown(results.rows, results.plan.baseline))
    files = [folder / "results.json", folder / "table.md"]
    models = list(dict.fromkeys(row.model for row in results.rows))
    for number, model in enumerate(models, start=1):
        # Pictures of one model lie beside the table, those of several in a folder for each.
        name = re.sub(r"\W+", "-", Path(model).name)
        place = folder / f"{number}-{name}" if len(models) > 1 else folder
        place.mkdir(exist_ok=True)
        plot_frontier([row for row in results.rows if row.model == model], place / "frontier.png")
        files.append(place / "frontier.png")
        files += plot_needles([r for r in results.records if r.model == model], place)
    return files


def _replace(file: Path, text: str) -> None:
    """Write a file as a whole or not at all; the journal's lock keeps others away."""
    aside = file.with_name(f".{file.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, file)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
