from typing import Any

import torch
from torch import Tensor

from claa_ops.ops._autograd import without_gradient
from claa_ops.ops._checks import (
    check,
    check_device_like,
    check_dtype,
    check_kernel_size,
    check_last_dim_contiguous,
    check_pool_mode,
    check_rank,
    check_size,
    check_window_attention,
    strides_of,
)
from claa_ops.ops._pool_mode import PoolMode, pool_mode_code

_op = torch.ops.claa.score_layer.default


def score_layer(
    running: Tensor,
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
    """Score one more layer and update the running maximum over layers and heads in place.

    ``scores = score_tokens(query, key, ...)`` and ``running.copy_(aggregate_scores(running,
    scores))`` in one op, with the same bits: on CUDA the maximum costs no kernel of its own. The
    order of the layers does not matter.

    Args:
        running: ``[B, M]`` with ``M = N - W``, float32: the maximum so far, updated in place.
            Begin with zeros: scores are not negative. Any strides, last dimension contiguous;
            its rows must not overlap, nor share memory with another argument.
        query, key: as in :func:`score_tokens`.
        kernel_size, pool_mode, scale, lse, start, sliding_window, softcap, sink_logits: as in
            :func:`score_tokens`.

    Returns:
        The scores, ``[B, G, M]``, float32, contiguous. A NaN among them, or one that was in
        ``running``, is NaN in ``running``. On CUDA a NaN already in ``running`` with its sign bit
        set, which no op writes, counts as less than every score.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above, or ``kernel_size``
            is even.
        ValueError: ``pool_mode`` is neither ``"avg"`` nor ``"max"``.

    Deterministic: the bits of a row depend neither on the rest of the batch nor on the number of
    threads. Not differentiable: a backward pass through the result is an error, and autograd does
    not see the update.

    Source: cross-layer attention aggregation, CLAA (arXiv 2602.16054, section 4).

    Example:
        Two equal heads of one group: each context token has 1/3 + 1/4 from each head.

        >>> running = torch.tensor([[2.0, 0.0]])
        >>> query, key = torch.zeros(1, 2, 2, 8), torch.zeros(1, 1, 4, 8)
        >>> score_layer(running, query, key, kernel_size=1)
        tensor([[[1.1667, 1.1667]]])
        >>> running
        tensor([[2.0000, 1.1667]])
    """
    scores = _op(
        running,
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
    return without_gradient("score_layer", scores)


@torch.library.register_fake("claa::score_layer")
def _score_layer_fake(
    running: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    kernel_size: int = 7,
    pool_mode: int = 0,
    **options: Any,
) -> Tensor:
    op = "score_layer"
    check_window_attention(op, query, key, **options)
    check_kernel_size(op, kernel_size)
    check_pool_mode(op, pool_mode)
    batch, kv_heads, total, _ = key.shape
    context = total - query.shape[2]
    check_rank(op, "running", running, 2, "[B, M]")
    check_size(op, "running", running, 0, "B", batch, "query")
    check_size(op, "running", running, 1, "M", context, "the context of key")
    check_dtype(op, "running", running, torch.float32)
    check_device_like(op, "running", running, query, "query")
    check_last_dim_contiguous(op, "running", running)
    check(
        op,
        (batch <= 1) | (running.stride(0) >= context),
        lambda: f"running must have rows that do not overlap, got strides {strides_of(running)}",
    )
    return query.new_empty((batch, kv_heads, context), dtype=torch.float32)
