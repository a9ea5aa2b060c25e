"""Ranking systems inside a model: the functional API, and the Hugging Face adapter over it."""

from typing import TYPE_CHECKING, Any

from claa_ops.prefill.state import PrefillState, begin

if TYPE_CHECKING:
    from claa_ops.prefill.cache import ClaaCache
    from claa_ops.prefill.huggingface import attach

__all__ = ["ClaaCache", "PrefillState", "attach", "begin"]


def __getattr__(name: str) -> Any:
    # A model author who calls the functional API does not have to wait for transformers.
    if name == "attach":
        from claa_ops.prefill.huggingface import attach

        return attach
    if name == "ClaaCache":
        from claa_ops.prefill.cache import ClaaCache

        return ClaaCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
