import torch
from torch import Tensor

_op = torch.ops.claa.aggregate_scores.default


def aggregate_scores(running: Tensor, scores: Tensor) -> Tensor:
    """Running maximum of token scores over layers, and over heads where they are still apart.

    ``out[b, j] = max(running[b, j], scores[b, j])``, or with the maximum of ``scores[b, :, j]``.
    The order in which layers arrive does not matter.

    Args:
        running: ``[B, M]``, float32: the maximum so far. Begin with zeros (scores are not
            negative) or with ``-inf`` (z-scored ones are).
        scores: ``[B, M]`` or ``[B, G, M]``, float32: one more layer.
            Both may have any strides, last dimension contiguous.

    Returns:
        ``[B, M]``, float32, contiguous, a new tensor. NaN in either argument stays NaN.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above.

    Deterministic. Not differentiable.

    Source: cross-layer attention aggregation, CLAA (arXiv 2602.16054, section 4).

    Example:
        >>> scores = torch.tensor([[[1.0, 5.0], [4.0, 2.0]]])
        >>> aggregate_scores(torch.tensor([[3.0, 0.0]]), scores)
        tensor([[4., 5.]])
    """
    return _op(running, scores)


@torch.library.register_fake("claa::aggregate_scores")
def _aggregate_scores_fake(running: Tensor, scores: Tensor) -> Tensor:
    return running.new_empty(running.shape)
