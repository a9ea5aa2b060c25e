"""Ranking systems inside a model: the functional API, and the Hugging Face adapter over it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from claa_ops._extras import require
from claa_ops.prefill.state import PrefillState, begin

if TYPE_CHECKING:
    from claa_ops.prefill.cache import ClaaCache
    from claa_ops.prefill.huggingface import attach
    from claa_ops.prefill.passes import Prefilled, decode, generate, run
    from claa_ops.prefill.static import StaticClaaCache

__all__ = [
    "ClaaCache",
    "PrefillState",
    "Prefilled",
    "StaticClaaCache",
    "attach",
    "begin",
    "decode",
    "generate",
    "run",
]

# A model author who calls the functional API does not have to wait for transformers.
_MODULES = {
    "ClaaCache": "cache",
    "attach": "huggingface",
    "Prefilled": "passes",
    "StaticClaaCache": "static",
    "decode": "passes",
    "generate": "passes",
    "run": "passes",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        require("models", "transformers")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
