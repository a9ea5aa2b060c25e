"""The cells of an evaluation: which methods, after which layers, at which rates."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from claa_ops.evaluate.inputs import parse_budget
from claa_ops.huggingface.models import InputError, load_model, require_same_tokenizer
from claa_ops.methods import METHODS, Method, make_method
from claa_ops.methods.pruning import Pruning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HIGHEST_LAYER = 9_999  # no model has as many, and a range is a list

Budget = float | int
Layer = int | tuple[int, ...] | None
Keep = Budget | tuple[Budget, ...] | None


@dataclass(frozen=True)
class Cell:
    """One way to prefill.

    Attributes:
        label: the method as the user put it, the name that the tables show.
        layer: the selection layers; None for a method without any.
        keep: the rates or numbers of tokens; None for a method without any.
        method: the method with these settings.
    """

    label: str
    layer: Layer
    keep: Keep
    method: Method

    def key(self) -> dict[str, Any]:
        """All that the results of the cell depend on, besides model and prompt."""
        return {
            "label": self.label,
            "layer": _plain(self.layer),
            "keep": _plain(self.keep),
            "method": type(self.method).__name__,
            "settings": plain_settings(self.method),
        }


@dataclass(frozen=True)
class MethodSpec:
    """A method and settings of it, from ``NAME`` or ``NAME:SETTING=VALUE:...``.

    ``NAME@OTHER`` is the method with as many bytes of cache as another one has at the same rate:
    a "10 %" with whole caches in the first layers stores more than a "10 %" without.
    """

    label: str
    name: str
    settings: dict[str, Any]
    bytes_of: str | None = None

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """Read a specification; InputError if there is no such method or it is not of the form."""
        name, *parts = text.split(":")
        name, at, other = name.partition("@")
        for known in [name, other] if at else [name]:
            if known not in METHODS:
                near = difflib.get_close_matches(known.lower(), METHODS, n=1, cutoff=0.0)[0]
                raise InputError(
                    f"unknown method {known!r}: expected {', '.join(METHODS)}; "
                    f"did you mean {near!r}?"
                )
        if at and not all(issubclass(METHODS[known], Pruning) for known in (name, other)):
            raise InputError(f"equal bytes need methods with caches of a set rate, got {text}")
        settings = {}
        for part in parts:
            setting, equals, value = part.partition("=")
            if not equals:
                raise InputError(
                    f"a method is NAME or NAME:SETTING=VALUE:..., got {part!r} in {text}"
                )
            fields = [field for field in _settings(name) if field != "draft"]  # has an option
            if setting not in fields:
                raise InputError(
                    f"{name}: a setting must be one of {', '.join(fields)}, got {setting}"
                )
            if setting in settings:
                raise InputError(f"{name}: {setting} must be set once, got it twice in {text}")
            settings[setting] = _value(value)
        return cls(text, name, settings, other or None)

    def has(self, setting: str) -> bool:
        """Whether the method has a setting of this name that the specification leaves open."""
        return setting in _settings(self.name) and setting not in self.settings

    def with_settings(self, **settings: Any) -> MethodSpec:
        """The same method with more settings."""
        return replace(self, settings={**self.settings, **settings})

    def cell(self, num_layers: int, layer: Layer, keep: Keep) -> Cell:
        """The cell for a model of this depth; None leaves a setting at its default.

        What the specification states stands, whatever is asked for here.
        """
        settings = {"layer": layer, "keep": keep, **self.settings}
        try:
            if self.bytes_of is not None:
                settings |= _bytes_of(
                    self.bytes_of, num_layers, settings["layer"], settings["keep"]
                )
            method = make_method(self.name, num_layers=num_layers, **settings)
        except ValueError as error:
            raise InputError(str(error)) from error
        return Cell(
            self.label, getattr(method, "layer", None), getattr(method, "keep", None), method
        )


def require_drafted(specs: Sequence[MethodSpec]) -> None:
    """Raise InputError unless one of the methods has a draft."""
    if not any(spec.has("draft") for spec in specs):
        raise InputError(
            "--draft is for the method speculative, got " + ", ".join(spec.label for spec in specs)
        )


def give_draft(
    specs: Sequence[MethodSpec],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    device: str,
    on_step: Callable[[str], None],
) -> list[MethodSpec]:
    """Load the model ``name`` as the draft of all methods that have one and name none.

    Raises:
        InputError: it cannot be loaded, or has another tokenizer than the model's.
    """
    draft, its_tokenizer = load_model(name, dtype, device, on_step)
    try:
        require_same_tokenizer(tokenizer, its_tokenizer)
    except ValueError as error:
        raise InputError(f"--draft {name}: {error}") from error
    return [spec.with_settings(draft=draft) if spec.has("draft") else spec for spec in specs]


def plain_settings(method: Method) -> dict[str, Any]:
    """The settings of a method as JSON has them; a draft is its name."""
    return {name: _plain(getattr(method, name)) for name in _settings_of(type(method))}


def _is_layer(text: str) -> bool:
    """Whether the text is a layer of some model: no model has as many as 10,000."""
    return text.isdecimal() and len(text) <= 4


def parse_layers(text: str) -> list[int]:
    """Read layers and ranges of layers: ``10,15,20-22``."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not _is_layer(first) or (dash and not _is_layer(last)):
            raise InputError(f"--layer must be layers such as 10,15,20-22, got {text}")
        between = range(int(first), int(last or first) + 1)
        if int(last or first) > _HIGHEST_LAYER:
            raise InputError(f"--layer must be at most {_HIGHEST_LAYER:,}, got {part}")
        if not between:
            raise InputError(f"--layer must have ranges that ascend, got {part}")
        layers.extend(between)
    return layers


def parse_keeps(text: str) -> list[Budget]:
    """Read budgets: ``0.1,20%,400``."""
    return [parse_budget("--keep", part) for part in text.split(",")]


def parse_schedule(text: str) -> tuple[tuple[int, ...], tuple[Budget, ...]]:
    """Read a staged selection: ``7:50%,15:20%,23:10%``."""
    layers, keeps = [], []
    for part in text.split(","):
        layer, colon, keep = part.partition(":")
        if not colon or not _is_layer(layer):
            raise InputError(f"--schedule must be LAYER:KEEP,... such as 7:50%,23:10%, got {text}")
        layers.append(int(layer))
        keeps.append(parse_budget("--schedule", keep))
    for before, after in itertools.pairwise(keeps):  # rates and numbers cannot be compared
        if type(after) is type(before) and after > before:
            raise InputError(
                f"--schedule must keep no more at a stage than at the one before, got {after:g} "
                f"after {before:g}"
            )
    return tuple(layers), tuple(keeps)


def make_cells(
    specs: Sequence[MethodSpec],
    num_layers: int,
    layers: Sequence[int] = (),
    keeps: Sequence[Budget] = (),
    schedules: Sequence[tuple[tuple[int, ...], tuple[Budget, ...]]] = (),
    keep_kv: Budget | None = None,
) -> list[Cell]:
    """Full prefill, then every method with every layer, rate and schedule that it takes.

    Without layers or rates the methods' own defaults for the depth stand. ``keep_kv`` is for the
    methods that have a budget for their caches apart, unless their specification states it.

    Raises:
        InputError: a layer is outside the model, or a method does not take its settings.
    """
    cells = {"full": MethodSpec.parse("full").cell(num_layers, None, None)}
    for spec in specs:
        if keep_kv is not None and spec.has("keep_kv") and spec.bytes_of is None:
            spec = spec.with_settings(keep_kv=keep_kv)
        stages: list[tuple[Layer, Keep]] = [
            (layer, keep)
            for layer in (layers if layers and spec.has("layer") else [None])
            for keep in (keeps if keeps and spec.has("keep") else [None])
        ]
        if issubclass(METHODS[spec.name], Pruning) and spec.has("layer") and spec.has("keep"):
            stages.extend(schedules)
        for layer, keep in stages:
            cell = spec.cell(num_layers, layer, keep)
            cells.setdefault(f"{cell.label} {cell.layer} {cell.keep}", cell)
    full = cells.pop("full")
    return [full, *(cell for cell in cells.values() if cell.label != "full")]


def _bytes_of(name: str, num_layers: int, layer: Layer, keep: Keep) -> dict[str, Any]:
    """Settings that give a method the bytes of this one's caches at these rates."""
    method = make_method(name, num_layers=num_layers, layer=layer, keep=keep)
    assert isinstance(method, Pruning)  # parsing has seen to it
    rate = method.keep[-1] if isinstance(method.keep, tuple) else method.keep
    if not isinstance(rate, float):
        raise ValueError(f"equal bytes need a rate, got {rate} tokens")
    # Every layer holds its rate of the prompt, selections or not; the first ones hold it whole.
    whole = method.first_full / num_layers
    return {"equal_cache": True, "keep_kv": whole + (1 - whole) * rate}


def _settings(name: str) -> list[str]:
    return _settings_of(METHODS[name])


def _settings_of(method: type[Method]) -> list[str]:
    return [field.name for field in dataclasses.fields(method) if field.init]


def _value(text: str) -> Any:
    """A setting's value: a number, true or false, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value if isinstance(value, int | float | str | None) else value.name_or_path
