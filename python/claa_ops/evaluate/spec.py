"""A method as a user writes it, ``claa:zscore=true:last_n=2``, and what becomes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from claa_ops.evaluate.parse import Budget
from claa_ops.huggingface.models import InputError, load_model, require_same_tokenizer
from claa_ops.methods import METHODS, Method, find_method, make_method
from claa_ops.methods.pruning import Pruning
from claa_ops.methods.registry import settings_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Layer = int | tuple[int, ...] | None
Keep = Budget | tuple[Budget, ...] | None


@dataclass(frozen=True)
class MethodSpec:
    """A method and settings of it, from ``NAME`` or ``NAME:SETTING=VALUE:...``.

    ``NAME`` is what :func:`claa_ops.methods.find_method` takes: a user's own is ``module:Class``.

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
        if parts and "=" not in parts[0] and name.rpartition("@")[2] not in METHODS:
            name = f"{name}:{parts.pop(0)}"  # module:Class
        name, at, other = name.partition("@")
        kinds = [_find(each) for each in ([name, other] if at else [name])]
        if at and not all(issubclass(kind, Pruning) for kind in kinds):
            raise InputError(f"equal bytes need methods with caches of a set rate, got {text}")
        settings = {}
        for part in parts:
            setting, equals, value = part.partition("=")
            if not equals:
                raise InputError(
                    f"a method is NAME or NAME:SETTING=VALUE:..., got {part!r} in {text}"
                )
            fields = [field for field in _settings(name) if field != "draft"]  # given apart
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

    @property
    def has_stages(self) -> bool:
        """Whether it can select after several layers, and the specification leaves open which."""
        return issubclass(_find(self.name), Pruning) and self.has("layer") and self.has("keep")

    def default_layer(self, num_layers: int) -> int:
        """The layer after which the method selects, in a model of this depth, unless told."""
        return self.make(num_layers).selection_layers(num_layers)[0]

    @property
    def default_rate(self) -> float:
        """The method's own ``keep`` if that is a rate, else a tenth."""
        (own,) = (field.default for field in fields(_find(self.name)) if field.name == "keep")
        return own if isinstance(own, float) else 0.1

    def with_settings(self, **settings: Any) -> MethodSpec:
        """The same method with more settings."""
        return replace(self, settings={**self.settings, **settings})

    def make(self, num_layers: int, layer: Layer = None, keep: Keep = None) -> Method:
        """The method for a model of this depth; None leaves a setting at its default.

        What the specification states stands, whatever is asked for here.

        Raises:
            InputError: the method does not take its settings, or does not fit the depth.
        """
        settings = {"layer": layer, "keep": keep, **self.settings}
        try:
            if self.bytes_of is not None:
                settings |= _bytes_of(
                    self.bytes_of, num_layers, settings["layer"], settings["keep"]
                )
            return make_method(self.name, num_layers=num_layers, **settings)
        except ValueError as error:
            raise InputError(str(error)) from error


def require_drafted(specs: Sequence[MethodSpec]) -> None:
    """Raise InputError unless one of the methods has a draft."""
    if not any(spec.has("draft") for spec in specs):
        raise InputError(
            "a draft is for the methods speculative and selective-context, got "
            + ", ".join(spec.label for spec in specs)
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
    draft, draft_tokenizer = load_model(name, dtype, device, on_step)
    try:
        require_same_tokenizer(tokenizer, draft_tokenizer)
    except ValueError as error:
        raise InputError(f"draft {name}: {error}") from error
    return [spec.with_settings(draft=draft) if spec.has("draft") else spec for spec in specs]


def plain_settings(method: Method) -> dict[str, Any]:
    """The settings of a method as JSON has them; a draft is its name."""
    return {name: plain(getattr(method, name)) for name in settings_of(type(method))}


def plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    if isinstance(value, int | float | str | None):
        return value
    return getattr(value, "name_or_path", None) or str(value)


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


def _find(name: str) -> type[Method]:
    try:
        return find_method(name)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def _settings(name: str) -> list[str]:
    return settings_of(_find(name))


def _value(text: str) -> Any:
    """A setting's value: a number, true or false, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
