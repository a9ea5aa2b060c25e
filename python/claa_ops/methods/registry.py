"""Methods by name: ours, those of other packages, and a user's own."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from claa_ops.methods.asl import ASL
from claa_ops.methods.claa import CLAA
from claa_ops.methods.coarse import Coarse
from claa_ops.methods.controls import FastKVDeferral, Random, SinksRandom
from claa_ops.methods.fastkv import FastKV
from claa_ops.methods.full import FullKV
from claa_ops.methods.gemfilter import GemFilter
from claa_ops.methods.hops import Hops
from claa_ops.methods.lazyllm import LazyLLM
from claa_ops.methods.oracle import Oracle
from claa_ops.methods.peak import Peak
from claa_ops.methods.promptdistill import PromptDistill
from claa_ops.methods.pyramidinfer import PyramidInfer
from claa_ops.methods.pyramidkv import PyramidKV
from claa_ops.methods.selective import SelectiveContext
from claa_ops.methods.snapkv import SnapKV
from claa_ops.methods.speculative import SpeculativePrefill
from claa_ops.methods.streaming import StreamingLLM
from claa_ops.methods.uniprefill import UniPrefill
from claa_ops.selection.method import Method

METHODS: dict[str, type[Method]] = {
    "full": FullKV,
    "snapkv": SnapKV,
    "fastkv": FastKV,
    "gemfilter": GemFilter,
    "claa": CLAA,
    "asl": ASL,
    "speculative": SpeculativePrefill,
    "oracle": Oracle,
    "streaming": StreamingLLM,
    "pyramidkv": PyramidKV,
    "pyramidinfer": PyramidInfer,
    "lazyllm": LazyLLM,
    "promptdistill": PromptDistill,
    "uniprefill": UniPrefill,
    "selective-context": SelectiveContext,
    "peak": Peak,
    "hops": Hops,
    "coarse": Coarse,
    "random": Random,
    "sinks-random": SinksRandom,
    "fastkv-deferral": FastKVDeferral,
}

ENTRY_POINTS = "claa_ops.methods"

M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """A class decorator that gives a user's own method a name.

    The name then works wherever the names of ``METHODS`` do: in :func:`make_method` and in the
    commands, if the module that registers it is imported. A package that is installed names its
    methods in the entry-point group ``claa_ops.methods`` instead, and need not be imported.

    Raises:
        ValueError: the name is taken, or could not be written on a command line.
        TypeError: the class is not a :class:`Method`.

    Example:
        >>> from dataclasses import dataclass
        >>> from claa_ops.methods import METHODS, Pruning, register
        >>> @register("key-norm")
        ... @dataclass(frozen=True)
        ... class KeyNorm(Pruning):
        ...     def score(self, layer):
        ...         return -layer.key[:, :, : layer.context].float().norm(dim=-1)
        >>> METHODS.pop("key-norm").__name__
        'KeyNorm'
    """
    if not name or any(character in ":=, \t\n" for character in name):
        raise ValueError(f"register: name must have no spaces, ':', '=' or ',', got {name!r}")

    def registered(method: M) -> M:
        known = METHODS.get(name)
        if known is not None and known is not method:
            raise ValueError(f"register: name must be a new one, got {name!r} of {known.__name__}")
        METHODS[name] = _checked(f"register: {name}", method)
        return method

    return registered


def find_method(name: str) -> type[Method]:
    """The method of this name.

    Args:
        name: a key of ``METHODS``, an entry point of the group ``claa_ops.methods``, or
            ``module:Class``.

    Raises:
        ValueError: there is none, or it cannot be imported.
        TypeError: the name is that of something else than a :class:`Method`.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" in name:
        module, _, attribute = name.partition(":")
        return _checked(name, _imported(name, lambda: _attribute(module, attribute)))
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in offered:
        return _checked(name, _imported(name, offered[name].load))
    names = [*METHODS, *offered]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    expected = f"expected one of {', '.join(names)}, or module:Class"
    raise ValueError(
        f"unknown method {name!r}: " + (f"did you mean {near[0]!r}?" if near else expected)
    )


def _attribute(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise ImportError(f"module {module!r} has no {name!r}")
    return getattr(found, name)


def _imported(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # whatever a module does while it is imported
        raise ValueError(f"method {name!r} must be importable, got {error}") from error


def _checked(name: str, found: Any) -> Any:
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise TypeError(f"{name}: a method must be a subclass of claa_ops.methods.Method")
    return found


def make_method(
    name: str,
    *,
    num_layers: int,
    layer: int | tuple[int, ...] | None = None,
    keep: float | int | tuple[float | int, ...] | None = None,
    **settings: Any,
) -> Method:
    """The method of this name for a model of this depth.

    Args:
        name: as :func:`find_method` takes it.
        num_layers: how many layers the model has; settings that depend on the depth are filled in.
        layer: the selection layer; left out for methods without one.
        keep: the budget, a rate or a number of tokens; left out for methods without one.
        settings: any other setting of the method.

    Raises:
        ValueError: no method has this name, the method has no such setting, a setting is out
            of its range, or the method does not fit the depth.

    Example:
        >>> make_method("claa", num_layers=30, keep=0.2).layer
        14
        >>> make_method("fastvk", num_layers=30)
        Traceback (most recent call last):
        ValueError: unknown method 'fastvk': did you mean 'fastkv'?
    """
    method = find_method(name)
    known = settings_of(method)
    for setting in settings:
        if setting not in known:
            raise ValueError(f"{name}: a setting must be one of {', '.join(known)}, got {setting}")
    given = {"layer": layer, "keep": keep}
    settings |= {key: value for key, value in given.items() if key in known and value is not None}
    return method(**settings).at_depth(num_layers)


def settings_of(method: type[Method]) -> list[str]:
    """The names of the settings of a method."""
    return [field.name for field in dataclasses.fields(method) if field.init]
