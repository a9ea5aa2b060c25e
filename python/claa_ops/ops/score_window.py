from typing import Any

import torch
from torch import Tensor

from claa_ops.ops._autograd import without_gradient
from claa_ops.ops._checks import check_window_attention

_op = torch.ops.claa.score_window.default


def score_window(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    start: Tensor | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention that the last W queries of a prompt pay to each of its context tokens.

    Query row ``i`` stands at position ``M + i`` and attends causally to all ``N = M + W`` keys.
    ``out[b, h, j] = sum_i softmax_j(query[b, h, i] . key[b, h // (H // G), j] * scale)`` for the
    M context keys; the W window keys count in the softmax and are then left out.

    Args:
        query: ``[B, H, W, D]``, float32, bfloat16 or float16, after the rotary embedding: the
            last W rows of the prompt's queries. Any strides, last dimension contiguous.
        key: ``[B, G, N, D]``, dtype of ``query``. G divides H; query head h reads key head
            ``h // (H // G)``. Any strides, last dimension contiguous. N >= W.
        scale: factor on the products; ``D ** -0.5`` if not given.
        lse: ``[B, H, W]``, float32: natural logarithm of the sum of exponentials of these rows'
            logits, as flash attention returns it. Then the keys are read once instead of twice.
        start: ``[B]``, int64 or int32: the first valid key of each row (left padding). Earlier
            keys score 0 and queries before it have no vote.
        sliding_window: s > 0 lets the query at position p see the keys p - s + 1 .. p only.
        softcap: c > 0 turns each logit z (already scaled) into ``c * tanh(z / c)``.
        sink_logits: ``[H]``, float32 or the dtype of ``query``: one more logit in each head's
            denominator, also where ``lse`` (of the keys alone) is given.

    Returns:
        ``[B, H, M]``, float32, contiguous. Each entry is in [0, W]; a row sums to at most W.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above.

    Accumulates in float32. Deterministic: the bits of a row depend neither on the rest of the
    batch nor on the number of threads. Not differentiable: a backward pass through the result is
    an error.

    Source: WINDOW-SCORE of SnapKV (arXiv 2404.14469, section 4), as CLAA (arXiv 2602.16054) and
    FastKV (arXiv 2502.01068) use it; they round the probabilities to the model's dtype, this op
    does not.

    Example:
        Zero logits spread each query evenly over the keys it sees. The first query sees three
        keys, the second four, so both context tokens score 1/3 + 1/4.

        >>> query, key = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 4, 8)
        >>> score_window(query, key)
        tensor([[[0.5833, 0.5833]]])
    """
    scores = _op(
        query,
        key,
        scale=scale,
        lse=lse,
        start=start,
        sliding_window=sliding_window,
        softcap=softcap,
        sink_logits=sink_logits,
    )
    return without_gradient("score_window", scores)


@torch.library.register_fake("claa::score_window")
def _score_window_fake(
    query: Tensor,
    key: Tensor,
    **options: Any,
) -> Tensor:
    op = "score_window"
    check_window_attention(op, query, key, **options)
    batch, heads, window, _ = query.shape
    return query.new_empty((batch, heads, key.shape[2] - window), dtype=torch.float32)
