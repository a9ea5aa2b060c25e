"""The public face of prefill: the functional API, and the Hugging Face adapter on top of it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from claa_ops._extras import require
from claa_ops.selection.packed import PackedPrefill, begin_packed
from claa_ops.selection.state import PrefillState, begin

if TYPE_CHECKING:
    from claa_ops.huggingface.attach import attach, attached, detach
    from claa_ops.huggingface.cache import ClaaCache
    from claa_ops.huggingface.chat_parts import ChatParts
    from claa_ops.huggingface.prefill import Prefilled, decode, generate, prefill
    from claa_ops.huggingface.static import StaticClaaCache
    from claa_ops.huggingface.tuned import tuned_method

__all__ = [
    "ChatParts",
    "ClaaCache",
    "PackedPrefill",
    "PrefillState",
    "Prefilled",
    "StaticClaaCache",
    "attach",
    "attached",
    "begin",
    "begin_packed",
    "decode",
    "detach",
    "generate",
    "prefill",
    "tuned_method",
]

# A model author who calls the functional API does not have to wait for transformers.
_MODULES = {
    "ChatParts": "chat_parts",
    "ClaaCache": "cache",
    "attach": "attach",
    "attached": "attach",
    "detach": "attach",
    "Prefilled": "prefill",
    "StaticClaaCache": "static",
    "decode": "prefill",
    "generate": "prefill",
    "prefill": "prefill",
    "tuned_method": "tuned",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        require("models", "transformers")
        return getattr(import_module(f"claa_ops.huggingface.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
