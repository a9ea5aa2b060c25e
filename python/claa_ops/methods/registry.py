"""Methods by name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from claa_ops.methods.asl import ASL
from claa_ops.methods.claa import CLAA
from claa_ops.methods.controls import FastKVDeferral, Random, SinksRandom
from claa_ops.methods.fastkv import FastKV
from claa_ops.methods.full import FullKV
from claa_ops.methods.gemfilter import GemFilter
from claa_ops.methods.oracle import Oracle
from claa_ops.methods.peak import Peak
from claa_ops.methods.pyramidinfer import PyramidInfer
from claa_ops.methods.pyramidkv import PyramidKV
from claa_ops.methods.snapkv import SnapKV
from claa_ops.methods.speculative import SpeculativePrefill
from claa_ops.methods.streaming import StreamingLLM
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
    "peak": Peak,
    "random": Random,
    "sinks-random": SinksRandom,
    "fastkv-deferral": FastKVDeferral,
}


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
        name: a key of ``METHODS``.
        num_layers: how many layers the model has; defaults that follow its depth are scaled.
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
    if name not in METHODS:
        near = difflib.get_close_matches(name.lower(), METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(METHODS)}"
        raise ValueError(f"unknown method {name!r}: {hint}")
    method = METHODS[name]
    known = [field.name for field in dataclasses.fields(method) if field.init]
    for setting in settings:
        if setting not in known:
            raise ValueError(f"{name}: a setting must be one of {', '.join(known)}, got {setting}")
    given = {"layer": layer, "keep": keep}
    settings |= {key: value for key, value in given.items() if key in known and value is not None}
    made = method(**{**method.defaults(num_layers), **settings})
    made.check(num_layers)
    return made
