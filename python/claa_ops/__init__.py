"""Fused ops that rank prompt tokens, keep the important ones and prefill the later layers on those.

Importing the package registers ``torch.ops.claa.*``; the functions here are the same ops with
docstrings. In both, arguments that have a default are keyword-only. ``pool_mode`` is a string here,
``"avg"`` or ``"max"``, and a number in ``torch.ops.claa``, 0 or 1.

``with claa_ops.attached(model, method):`` is all that a model of Hugging Face needs.
``claa_ops.reference`` has each op in plain PyTorch, ``claa_ops.methods`` the methods that decide
which tokens stay, and ``claa_ops.prefill`` runs them in a model.
"""

from typing import TYPE_CHECKING, Any

from claa_ops import _library as _library  # loads the ops; the modules below need them
from claa_ops import reference as reference
from claa_ops._build_info import version
from claa_ops.ops.aggregate_scores import aggregate_scores
from claa_ops.ops.compact_pages import compact_pages
from claa_ops.ops.gather_kv import gather_kv
from claa_ops.ops.gather_pages import gather_pages
from claa_ops.ops.gather_rows import gather_rows
from claa_ops.ops.gather_tokens import gather_tokens
from claa_ops.ops.hop_tokens import hop_tokens
from claa_ops.ops.kept_metadata import kept_metadata
from claa_ops.ops.peak_attention import peak_attention
from claa_ops.ops.peak_attention_paged import peak_attention_paged
from claa_ops.ops.pool_heads import pool_heads
from claa_ops.ops.rank_variance import rank_variance
from claa_ops.ops.score_layer import score_layer
from claa_ops.ops.score_layer_paged import score_layer_paged
from claa_ops.ops.score_tokens import score_tokens
from claa_ops.ops.score_window import score_window
from claa_ops.ops.select_topk import select_topk
from claa_ops.ops.select_topk_packed import select_topk_packed
from claa_ops.ops.store_pages import store_pages

if TYPE_CHECKING:
    from claa_ops.huggingface.attach import attached as attached

__version__ = version

__all__ = [
    "aggregate_scores",
    "compact_pages",
    "gather_kv",
    "gather_pages",
    "gather_rows",
    "gather_tokens",
    "hop_tokens",
    "kept_metadata",
    "peak_attention",
    "peak_attention_paged",
    "pool_heads",
    "rank_variance",
    "score_layer",
    "score_layer_paged",
    "score_tokens",
    "score_window",
    "select_topk",
    "select_topk_packed",
    "store_pages",
]


def __getattr__(name: str) -> Any:
    if name == "attached":  # needs transformers, for which the ops need not wait
        from claa_ops import prefill

        return prefill.attached
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
