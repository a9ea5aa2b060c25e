import torch
from torch import Tensor

from claa_ops.ops._checks import (
    check_device_like,
    check_dtype,
    check_last_dim_contiguous,
    check_not_negative,
    check_rank,
)
from claa_ops.ops._pages import check_integers, check_starts

_op = torch.ops.claa.select_topk_packed.default


def select_topk_packed(
    index: Tensor,
    scores: Tensor,
    lengths: Tensor,
    starts: Tensor,
    *,
    window: int = 0,
    num_sinks: int = 0,
) -> None:
    """Positions to keep of prompts of several lengths, one prompt after the other.

    Request r has ``lengths[r]`` tokens, keeps ``starts[r + 1] - starts[r]`` of them and gets them
    in ``index[starts[r]:starts[r + 1]]``: what :func:`select_topk` keeps of its scores alone. Its
    last ``window`` tokens have no score and are always kept, as are its first ``num_sinks``. How
    many are kept is read on the device: nothing waits for it.

    A score of infinity protects a token: only NaN ranks above it.

    Args:
        index: ``[k]``, int32: the result, positions in the prompt, ascending within a request.
            What belongs to no request becomes -1, and so do the first entries of a request that
            is to keep more tokens than it has.
        scores: ``[R, M]``, float32; any strides, last dimension contiguous. Of row r the first
            ``lengths[r] - window`` are read.
        lengths: ``[R]``, int32 or int64: tokens of each prompt, window included, at most
            ``M + window``; 0 for none.
        starts: ``[R + 1]``, int32 or int64, ascending from 0 to at most k.
        window: number of last tokens, which have no score; a shorter prompt is all window.
        num_sinks: number of first tokens that are always kept.

    Returns:
        None; ``index`` is written.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above. A length or a limit
            out of range is taken for the nearest that is in range.

    Exact and deterministic. Not differentiable.

    Source: token propagation of CLAA (arXiv 2602.16054) for the packed batches of a serving engine.

    Example:
        Two prompts of five and three tokens keep three and two, a window of one included.

        >>> scores = torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.3, 0.6, 0.0, 0.0]])
        >>> index = torch.empty(6, dtype=torch.int32)
        >>> lengths, starts = torch.tensor([5, 3]), torch.tensor([0, 3, 5])
        >>> select_topk_packed(index, scores, lengths, starts, window=1)
        >>> index
        tensor([ 1,  3,  4,  1,  2, -1], dtype=torch.int32)
    """
    _op(index, scores, lengths, starts, window=window, num_sinks=num_sinks)


@torch.library.register_fake("claa::select_topk_packed")
def _select_topk_packed_fake(
    index: Tensor,
    scores: Tensor,
    lengths: Tensor,
    starts: Tensor,
    *,
    window: int = 0,
    num_sinks: int = 0,
) -> None:
    op = "select_topk_packed"
    check_rank(op, "index", index, 1, "[k]")
    check_rank(op, "scores", scores, 2, "[R, M]")
    check_dtype(op, "index", index, torch.int32)
    check_dtype(op, "scores", scores, torch.float32)
    check_device_like(op, "index", index, scores, "scores")
    check_last_dim_contiguous(op, "index", index)
    check_last_dim_contiguous(op, "scores", scores)
    check_not_negative(op, "window", window)
    check_not_negative(op, "num_sinks", num_sinks)
    requests = scores.shape[0]
    check_integers(op, "lengths", lengths, "R", requests, scores, "scores")
    check_starts(op, starts, requests, scores, "scores")
