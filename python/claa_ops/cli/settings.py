"""What ``claa-ops generate`` and ``claa-ops demo`` take, and what it means for a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from claa_ops.cli.options import (
    Chat,
    Device,
    Draft,
    Dtype,
    Keep,
    KeepKv,
    Layer,
    MaxNewTokens,
    Model,
    Runs,
    Threads,
    Window,
)
from claa_ops.evaluate.grid import (
    MethodSpec,
    give_draft,
    make_cells,
    parse_schedule,
    require_drafted,
)
from claa_ops.evaluate.inputs import check_plot_file, parse_budget
from claa_ops.huggingface.models import (
    InputError,
    find_checkpoint,
    resolve_device,
    resolve_dtype,
    smollm2_file,
)
from claa_ops.methods import METHODS, Method, find_method
from claa_ops.methods.pruning import Pruning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to compare a method with full prefill: each field is an option of that name."""

    model: Model = None
    method: Annotated[
        str,
        typer.Option(
            help=f"The ranking system: {', '.join(METHODS)}; with settings such as "
            "claa:zscore=true:last_n=2."
        ),
    ] = "claa"
    keep: Keep = "0.1"
    keep_kv: KeepKv = None
    layer: Layer = None
    schedule: Annotated[
        str | None,
        typer.Option(help="Selection in stages, LAYER:KEEP,..., such as 7:50%,15:20%,23:10%."),
    ] = None
    window: Window = None
    draft: Draft = None
    max_new_tokens: MaxNewTokens = 64
    dtype: Dtype = "auto"
    device: Device = "auto"
    threads: Threads = None
    runs: Runs = 3
    chat: Chat = None
    plot: Annotated[
        Path | None, typer.Option(help="Draw the token scores of all layers into this .png file.")
    ] = None

    @property
    def source(self) -> str:
        """The model, by a name that `load_model` takes."""
        return str(smollm2_file()) if self.model is None else self.model

    def check(self) -> None:
        """Refuse what can be refused before the model is there.

        Raises:
            InputError: a setting is none of those expected, or a file is missing.
        """
        spec = MethodSpec.parse(self.method)
        parse_budget("--keep", self.keep)
        if self.keep_kv is not None:
            parse_budget("--keep-kv", self.keep_kv)
        if self.schedule is not None:
            parse_schedule(self.schedule)
            if self.layer is not None:
                raise InputError("got both --layer and --schedule: expected one of them")
            staged = issubclass(METHODS[spec.name], Pruning)
            if not (staged and spec.has("layer") and spec.has("keep")):
                raise InputError(f"{spec.label} does not select in stages: expected no --schedule")
        resolve_dtype(self.dtype, resolve_device(self.device))
        find_checkpoint(self.source)
        if self.draft is not None:
            require_drafted([spec])
            find_checkpoint(self.draft)
        if self.plot is not None:
            check_plot_file(self.plot)

    def make_method(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        on_step: Callable[[str], None],
    ) -> tuple[Method, list[str]]:
        """The method for this model, and what is to be said about its settings.

        Raises:
            InputError: they do not fit the model, or the draft does not.
        """
        spec = MethodSpec.parse(self.method)
        keep = None if self.keep == Settings.keep else self.keep
        given = {
            "keep": keep,
            "layer": self.layer,
            "keep_kv": self.keep_kv,
            "window": self.window,
        }
        remarks = [
            f"{spec.label} takes no --{name.replace('_', '-')}: {value} was not used."
            for name, value in given.items()
            if value is not None and not spec.has(name)
        ]
        layers = model.config.get_text_config().num_hidden_layers
        if self.layer is None and self.schedule is None and spec.has("layer"):
            here, of_32 = (find_method(spec.name)().selection_layers(n)[0] for n in (layers, 32))
            remarks.append(
                f"The layer is {here} (of 0 to {layers - 1}) by default, as deep as {of_32} of 0 "
                "to 31; --layer chooses another."
            )
        if self.draft is not None:
            device = self.device
            (spec,) = give_draft([spec], self.draft, tokenizer, self.dtype, device, on_step)
        if self.window is not None and spec.has("window"):
            spec = spec.with_settings(window=self.window)
        cells = make_cells(
            [spec],
            layers,
            layers=[] if self.layer is None else [self.layer],
            keeps=[parse_budget("--keep", self.keep)],
            schedules=[] if self.schedule is None else [parse_schedule(self.schedule)],
            keep_kv=None if self.keep_kv is None else parse_budget("--keep-kv", self.keep_kv),
        )
        return cells[-1].method, remarks

    def check_window(self, tokens: int) -> None:
        """Refuse a window that is longer than a prompt of so many tokens, if it was asked for."""
        if self.window is not None and self.window > tokens:
            raise InputError(
                f"--window must be at most the {tokens:,} tokens of the prompt, got {self.window:,}"
            )

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return {**asdict(self), "plot": self.plot and str(self.plot)}
