"""Fused ops that rank prompt tokens, keep the important ones and prefill the rest on those alone.

Importing the package loads ``torch.ops.claa.*``; the functions here are the same ops with their
manual pages. In both, whatever has a default is given by name. A ``pool_mode`` is a number in
``torch.ops.claa``: 0 avg, 1 max (``pool_mode`` of ``score_layer``).

``claa_ops.reference`` has each op in plain PyTorch, ``claa_ops.methods`` has the ranking systems,
``claa_ops.prefill`` puts them into a model.
"""

from claa_ops import _library as _library  # loads the ops; the modules below need them
from claa_ops import reference as reference
from claa_ops._build_info import version
from claa_ops.ops.aggregate_scores import aggregate_scores
from claa_ops.ops.gather_kv import gather_kv
from claa_ops.ops.gather_tokens import gather_tokens
from claa_ops.ops.peak_attention import peak_attention
from claa_ops.ops.pool_heads import pool_heads
from claa_ops.ops.rank_variance import rank_variance
from claa_ops.ops.score_layer import score_layer
from claa_ops.ops.score_tokens import score_tokens
from claa_ops.ops.score_window import score_window
from claa_ops.ops.select_topk import select_topk

__version__ = version

__all__ = [
    "aggregate_scores",
    "gather_kv",
    "gather_tokens",
    "peak_attention",
    "pool_heads",
    "rank_variance",
    "score_layer",
    "score_tokens",
    "score_window",
    "select_topk",
]
