from typing import Any

import torch
from torch import Tensor

from claa_ops.ops._autograd import without_gradient
from claa_ops.ops._checks import check_kernel_size, check_pool_mode, check_window_attention
from claa_ops.ops._pool_mode import PoolMode, pool_mode_code

_op = torch.ops.claa.score_tokens.default


def score_tokens(
    query: Tensor,
    key: Tensor,
    *,
    kernel_size: int = 7,
    pool_mode: PoolMode = "avg",
    scale: float | None = None,
    lse: Tensor | None = None,
    start: Tensor | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Importance of each context token to the last W queries, per key/value head.

    ``pool_heads(score_window(query, key, ...), G, kernel_size=..., pool_mode=...)`` in
    one op: neither the logits ``[B, H, W, N]`` nor the scores ``[B, H, M]`` are written to memory.

    Args:
        query: ``[B, H, W, D]``, float32, bfloat16 or float16, after the rotary embedding: the
            last W rows of the prompt's queries. Any strides, last dimension contiguous.
        key: ``[B, G, N, D]``, dtype of ``query``; G divides H. Any strides, last dimension
            contiguous. N >= W.
        kernel_size: odd number of neighbouring tokens to pool over.
        pool_mode: ``"avg"`` or ``"max"``.
        scale, lse, start, sliding_window, softcap, sink_logits: as in :func:`score_window`.

    Returns:
        ``[B, G, M]`` with ``M = N - W``, float32, contiguous.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above, or ``kernel_size``
            is even.
        ValueError: ``pool_mode`` is neither ``"avg"`` nor ``"max"``.

    Accumulates in float32. Deterministic: the bits of a row depend neither on the rest of the
    batch nor on the number of threads. Not differentiable: a backward pass through the result is
    an error.

    Source: CLAA (arXiv 2602.16054); steps 1 to 6 of WINDOW-SCORE in its public code.

    Example:
        Two equal heads of one group: each context token has 1/3 + 1/4 from each head, and the
        pool of 3 sees two of three tokens at both edges.

        >>> query, key = torch.zeros(1, 2, 2, 8), torch.zeros(1, 1, 4, 8)
        >>> score_tokens(query, key, kernel_size=3)
        tensor([[[0.7778, 0.7778]]])
    """
    scores = _op(
        query,
        key,
        kernel_size=kernel_size,
        pool_mode=pool_mode_code(pool_mode),
        scale=scale,
        lse=lse,
        start=start,
        sliding_window=sliding_window,
        softcap=softcap,
        sink_logits=sink_logits,
    )
    return without_gradient("score_tokens", scores)


@torch.library.register_fake("claa::score_tokens")
def _score_tokens_fake(
    query: Tensor,
    key: Tensor,
    *,
    kernel_size: int = 7,
    pool_mode: int = 0,
    **options: Any,
) -> Tensor:
    op = "score_tokens"
    check_window_attention(op, query, key, **options)
    check_kernel_size(op, kernel_size)
    check_pool_mode(op, pool_mode)
    batch, kv_heads, total, _ = key.shape
    context = total - query.shape[2]
    return query.new_empty((batch, kv_heads, context), dtype=torch.float32)
