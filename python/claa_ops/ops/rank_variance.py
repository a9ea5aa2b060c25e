import torch
from torch import Tensor

from claa_ops.ops._autograd import without_gradient
from claa_ops.ops._checks import (
    check,
    check_dtype,
    check_in_range,
    check_last_dim_contiguous,
    check_rank,
    shape_of,
)

_op = torch.ops.claa.rank_variance.default


def rank_variance(scores: Tensor, k: int) -> Tensor:
    """How much the ranks of the important tokens still change between layers.

    Rank each layer's tokens from 1 (best) to M; a tie goes to the lower position. The result
    is the population variance over layers of a token's rank, averaged over the tokens that are
    among the k best of at least one layer.

    Args:
        scores: ``[L, B, M]``, float32: one row of token scores per layer; any strides, last
            dimension contiguous.
        k: number of best tokens of each layer; 0 <= k <= M.

    Returns:
        ``[B]``, float32; 0 where no token is taken.

    Raises:
        RuntimeError: a rank, size, dtype or stride is not as above, or k is out of range.

    Exact ranks, deterministic. Not differentiable: a backward pass through the result is an error.

    Source: adaptive layer selection, ASL (arXiv 2601.07667, section 3).

    Example:
        The best token is first in both layers, the other two swap ranks. With k = 2 each of the
        three is among the best of some layer: (0 + 0.25 + 0.25) / 3.

        >>> rank_variance(torch.tensor([[[9.0, 5.0, 4.0]], [[9.0, 4.0, 5.0]]]), 2)
        tensor([0.1667])
    """
    return without_gradient("rank_variance", _op(scores, k))


@torch.library.register_fake("claa::rank_variance")
def _rank_variance_fake(scores: Tensor, k: int) -> Tensor:
    op = "rank_variance"
    check_rank(op, "scores", scores, 3, "[L, B, M]")
    check_dtype(op, "scores", scores, torch.float32)
    check_last_dim_contiguous(op, "scores", scores)
    layers, batch, context = scores.shape
    check(op, layers > 0, lambda: f"scores must have at least one layer, got {shape_of(scores)}")
    check_in_range(op, "k", k, "M", context)
    return scores.new_empty((batch,))
