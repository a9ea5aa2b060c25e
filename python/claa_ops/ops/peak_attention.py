import torch
from torch import Tensor

from claa_ops.ops._autograd import without_gradient
from claa_ops.ops._checks import (
    check,
    check_device_like,
    check_dtype,
    check_last_dim_contiguous,
    check_query_key,
    check_rank,
    check_row_integers,
    check_size,
    shape_of,
)

_op = torch.ops.claa.peak_attention.default


def peak_attention(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    running: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """The largest attention, over heads, that each query pays to each key.

    ``out[b, t, j] = max_h softmax_j(query[b, h, t] . key[b, h // (H // G), j] * scale)``, and
    the maximum with ``running``. The softmax runs over all N keys, without a causal mask: the
    queries are those of the answer, the keys those of the prompt. The probabilities
    ``[B, H, T, N]`` are never written to memory.

    Args:
        query: ``[B, H, T, D]``, float32, bfloat16 or float16, after the rotary embedding. Any
            strides, last dimension contiguous.
        key: ``[B, G, N, D]``, dtype of ``query``; G divides H. Any strides, last dimension
            contiguous.
        scale: factor on the products; ``D ** -0.5`` if not given.
        running: ``[B, T, N]``, float32, last dimension contiguous: the peak over the layers so
            far.
        start: ``[B]``, int64 or int32: the first valid key of each row (left padding); earlier
            keys get 0.

    Returns:
        ``[B, T, N]``, float32, contiguous; entries of one layer are in [0, 1]. NaN propagates.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above.

    Accumulates in float32. Deterministic: the bits of a row depend neither on the rest of the
    batch nor on the number of threads. Not differentiable: a backward pass through the result is
    an error.

    Source: the Answer-Informed Oracle of CLAA (arXiv 2602.16054) and Speculative Prefill
    (arXiv 2502.02789).

    Example:
        Zero logits give every key the same share.

        >>> peak_attention(torch.zeros(1, 2, 1, 8), torch.zeros(1, 1, 4, 8))
        tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]])
    """
    peak = _op(query, key, scale=scale, running=running, start=start)
    return without_gradient("peak_attention", peak)


@torch.library.register_fake("claa::peak_attention")
def _peak_attention_fake(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    running: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    op = "peak_attention"
    check_query_key(op, query, key, "[B, H, T, D]")
    batch, heads, queries, _ = query.shape
    total = key.shape[2]
    check(op, heads > 0, lambda: f"query must have at least one head, got {shape_of(query)}")
    if running is not None:
        check_rank(op, "running", running, 3, "[B, T, N]")
        check_size(op, "running", running, 0, "B", batch, "query")
        check_size(op, "running", running, 1, "T", queries, "query")
        check_size(op, "running", running, 2, "N", total, "key")
        check_dtype(op, "running", running, torch.float32)
        check_device_like(op, "running", running, query, "query")
        check_last_dim_contiguous(op, "running", running)
    check_row_integers(op, "start", start, batch, query, "query")
    return query.new_empty((batch, queries, total), dtype=torch.float32)
