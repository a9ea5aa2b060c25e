import torch
from torch import Tensor

from claa_ops.ops._autograd import without_gradient
from claa_ops.ops._checks import (
    check_divides,
    check_dtype,
    check_kernel_size,
    check_last_dim_contiguous,
    check_pool_mode,
    check_rank,
)
from claa_ops.ops._pool_mode import PoolMode, pool_mode_code

_op = torch.ops.claa.pool_heads.default


def pool_heads(
    scores: Tensor, num_kv_heads: int, *, kernel_size: int = 7, pool_mode: PoolMode = "avg"
) -> Tensor:
    """Smooth each query head's scores over neighbouring tokens, then sum each head group.

    Pooling has stride 1 and keeps the length. ``"avg"`` divides by ``kernel_size`` at the
    edges too, as if the row were padded with zeros, so the first and the last tokens are damped;
    ``"max"`` ignores the padding.

    Args:
        scores: ``[B, H, M]``, float32; any strides, last dimension contiguous.
        num_kv_heads: G, the number of groups of ``H // G`` consecutive heads; divides H.
        kernel_size: odd number of neighbouring tokens to pool over.
        pool_mode: ``"avg"`` or ``"max"``.

    Returns:
        ``[B, G, M]``, float32, contiguous.

    Raises:
        RuntimeError: a rank, size, dtype or stride is not as above, or ``kernel_size`` is even.
        ValueError: ``pool_mode`` is neither ``"avg"`` nor ``"max"``.

    Deterministic; heads are added in index order. Not differentiable: a backward pass through
    the result is an error.

    Source: SnapKV (arXiv 2404.14469, section 4.2) pools; the sum over the group is FastKV's
    (arXiv 2502.01068) and CLAA's (arXiv 2602.16054).

    Example:
        >>> pool_heads(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, 6.0]]]), 1, kernel_size=3)
        tensor([[[1., 3., 2.]]])
    """
    pooled = _op(scores, num_kv_heads, kernel_size=kernel_size, pool_mode=pool_mode_code(pool_mode))
    return without_gradient("pool_heads", pooled)


@torch.library.register_fake("claa::pool_heads")
def _pool_heads_fake(
    scores: Tensor, num_kv_heads: int, *, kernel_size: int = 7, pool_mode: int = 0
) -> Tensor:
    op = "pool_heads"
    check_rank(op, "scores", scores, 3, "[B, H, M]")
    check_dtype(op, "scores", scores, torch.float32)
    check_last_dim_contiguous(op, "scores", scores)
    batch, heads, context = scores.shape
    check_divides(op, "num_kv_heads", heads, num_kv_heads)
    check_kernel_size(op, kernel_size)
    check_pool_mode(op, pool_mode)
    return scores.new_empty((batch, num_kv_heads, context))
