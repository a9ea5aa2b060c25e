import torch
from torch import Tensor

from claa_ops.ops._autograd import without_gradient
from claa_ops.ops._checks import (
    check,
    check_device_like,
    check_dtype,
    check_last_dim_contiguous,
    check_rank,
    check_size,
    shape_of,
)

_op = torch.ops.claa.aggregate_scores.default


def aggregate_scores(running: Tensor, scores: Tensor) -> Tensor:
    """Running maximum of token scores over layers, and over heads if ``scores`` still has them.

    ``out[b, j] = max(running[b, j], scores[b, j])``, or with the maximum of ``scores[b, :, j]``.
    The order of the layers does not matter.

    Args:
        running: ``[B, M]``, float32: the maximum so far. Begin with zeros (scores are not
            negative) or with ``-inf`` (z-scored ones are).
        scores: ``[B, M]`` or ``[B, G, M]``, float32: one more layer.
            Both may have any strides, last dimension contiguous.

    Returns:
        ``[B, M]``, float32, contiguous, a new tensor. NaN in either argument stays NaN.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above.

    Deterministic. Not differentiable: a backward pass through the result is an error.

    Source: cross-layer attention aggregation, CLAA (arXiv 2602.16054, section 4).

    Example:
        >>> scores = torch.tensor([[[1.0, 5.0], [4.0, 2.0]]])
        >>> aggregate_scores(torch.tensor([[3.0, 0.0]]), scores)
        tensor([[4., 5.]])
    """
    return without_gradient("aggregate_scores", _op(running, scores))


@torch.library.register_fake("claa::aggregate_scores")
def _aggregate_scores_fake(running: Tensor, scores: Tensor) -> Tensor:
    op = "aggregate_scores"
    check_rank(op, "running", running, 2, "[B, M]")
    has_heads = scores.dim() == 3
    check(
        op,
        has_heads or scores.dim() == 2,
        lambda: f"scores must have shape [B, M] or [B, G, M], got {shape_of(scores)}",
    )
    check_dtype(op, "running", running, torch.float32)
    check_dtype(op, "scores", scores, torch.float32)
    check_device_like(op, "scores", scores, running, "running")
    batch, context = running.shape
    check_size(op, "scores", scores, 0, "B", batch, "running")
    check_size(op, "scores", scores, -1, "M", context, "running")
    check(
        op,
        not has_heads or scores.shape[1] > 0,
        lambda: f"scores must have at least one head, got {shape_of(scores)}",
    )
    check_last_dim_contiguous(op, "running", running)
    check_last_dim_contiguous(op, "scores", scores)
    return running.new_empty((batch, context))
