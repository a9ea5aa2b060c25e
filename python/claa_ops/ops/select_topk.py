import torch
from torch import Tensor

from claa_ops.ops._checks import (
    check,
    check_dtype,
    check_in_range,
    check_last_dim_contiguous,
    check_not_negative,
    check_row_integers,
    shape_of,
    strides_of,
)

_op = torch.ops.claa.select_topk.default


def select_topk(
    scores: Tensor,
    k: int,
    *,
    window: int = 0,
    num_sinks: int = 0,
    start: Tensor | None = None,
    counts: Tensor | None = None,
    int32: bool = False,
) -> Tensor:
    """Positions of the k tokens to keep, in ascending order.

    The tokens are the M that have a score, followed by the last ``window`` ones, which have none.
    The window (positions M .. M + window - 1) and the first ``num_sinks`` valid tokens are always
    kept; the rest of k goes to the best scores. A tie goes to the lower position, and NaN ranks
    above every number, as in ``torch.topk``. Padding is kept only when nothing else is left. If k
    is smaller than the window, its last k positions are kept.

    Args:
        scores: ``[..., M]``, float32; any strides, last dimension contiguous.
        k: how many tokens to keep, window and sinks included; 0 <= k <= M + window.
        window: number of tokens after the scored ones.
        num_sinks: number of first valid tokens that are always kept.
        start: ``[B]``, int64 or int32, for scores ``[B, ..., M]``: the first valid token of
            each row (left padding).
        counts: ``[B]``, int64 or int32, for scores ``[B, ..., M]``: how many tokens each row
            keeps, if that is less than k; the row then begins with entries of -1, which
            :func:`claa_ops.gather_kv` and :func:`claa_ops.gather_tokens` turn into zeros.
        int32: return int32 instead of int64.

    Returns:
        ``[..., k]``, int64 (or int32), contiguous; strictly ascending along the last dimension,
        after any entries of -1.

    Raises:
        RuntimeError: a rank, size, dtype or stride is not as above, or k is out of range.

    Exact and deterministic. Not differentiable.

    Source: token propagation of CLAA (arXiv 2602.16054) and FastKV (arXiv 2502.01068), and the
    KV budget of SnapKV (arXiv 2404.14469).

    Example:
        Of five scored tokens and a window of two, keep four: the window and the two best.

        >>> select_topk(torch.tensor([0.1, 0.7, 0.2, 0.9, 0.3]), 4, window=2)
        tensor([1, 3, 5, 6])
    """
    return _op(
        scores, k, window=window, num_sinks=num_sinks, start=start, counts=counts, int32=int32
    )


@torch.library.register_fake("claa::select_topk")
def _select_topk_fake(
    scores: Tensor,
    k: int,
    *,
    window: int = 0,
    num_sinks: int = 0,
    start: Tensor | None = None,
    counts: Tensor | None = None,
    int32: bool = False,
) -> Tensor:
    op = "select_topk"
    rank = scores.dim()
    check(op, rank >= 1, lambda: f"scores must have shape [..., M], got {shape_of(scores)}")
    check_dtype(op, "scores", scores, torch.float32)
    check_last_dim_contiguous(op, "scores", scores)
    check_not_negative(op, "window", window)
    check_not_negative(op, "num_sinks", num_sinks)
    check_in_range(op, "k", k, "M + window", scores.shape[-1] + window)
    check(
        op,
        start is None or rank > 1,
        lambda: f"start needs scores of shape [B, ..., M], got {shape_of(scores)}",
    )
    check(
        op,
        counts is None or rank > 1,
        lambda: f"counts needs scores of shape [B, ..., M], got {shape_of(scores)}",
    )
    for dim in range(2, rank - 1):  # the rows of a batch entry must be a constant stride apart
        check(
            op,
            (scores.shape[dim - 1] <= 1)
            | (scores.stride(dim - 1) == scores.shape[dim] * scores.stride(dim)),
            lambda: (
                "scores must be contiguous between its first and its last dimension, "
                f"got strides {strides_of(scores)}"
            ),
        )
    check_row_integers(op, "start", start, scores.shape[0], scores, "scores")
    check_row_integers(op, "counts", counts, scores.shape[0], scores, "scores")
    dtype = torch.int32 if int32 else torch.int64
    return scores.new_empty((*scores.shape[:-1], k), dtype=dtype)
