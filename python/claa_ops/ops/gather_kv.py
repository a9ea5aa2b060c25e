from typing import Any

import torch
from torch import Tensor

from claa_ops.ops._checks import (
    check,
    check_device_like,
    check_indices,
    check_item_bytes,
    check_last_dim_contiguous,
    check_rank,
    check_size,
    shape_of,
)

_op = torch.ops.claa.gather_kv.default


def gather_kv(key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a layer's keys and values at the kept positions.

    ``key'[b, g, i] = key[b, g, index[b, g, i]]``, the same for value; rows are moved as bytes.

    Args:
        key: ``[B, G, N, D]`` of any dtype of at most 8 bytes (float8 included); any strides,
            last dimension contiguous.
        value: ``[B, G, N, Dv]``, likewise; its dtype may differ.
        index: ``[B, G, k]``, or ``[B, k]`` for all heads; int64 or int32, contiguous in
            the last dimension. -1 is padding and gives a row of zeros.

    Returns:
        ``[B, G, k, D]`` and ``[B, G, k, Dv]``, contiguous, dtypes of ``key`` and ``value``.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above, or on the CPU an
            index outside [-1, N).

    Exact. Differentiable in ``key`` and ``value``.

    Source: KV compression of SnapKV (arXiv 2404.14469) and FastKV (arXiv 2502.01068).

    Example:
        >>> key = torch.tensor([[[[1.0], [2.0], [3.0]]]])
        >>> gather_kv(key, -key, torch.tensor([[0, 2]]))
        (tensor([[[[1.],
                  [3.]]]]), tensor([[[[-1.],
                  [-3.]]]]))
    """
    return _op(key, value, index)


@torch.library.register_fake("claa::gather_kv")
def _gather_kv_fake(key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    op = "gather_kv"
    check_rank(op, "key", key, 4, "[B, G, N, D]")
    check_rank(op, "value", value, 4, "[B, G, N, Dv]")
    batch, kv_heads, total, dim = key.shape
    check_size(op, "value", value, 0, "B", batch, "key")
    check_size(op, "value", value, 1, "G", kv_heads, "key")
    check_size(op, "value", value, 2, "N", total, "key")
    check_device_like(op, "value", value, key, "key")
    check_last_dim_contiguous(op, "key", key)
    check_last_dim_contiguous(op, "value", value)

    has_heads = index.dim() == 3
    check(
        op,
        has_heads or index.dim() == 2,
        lambda: f"index must have shape [B, G, k] or [B, k], got {shape_of(index)}",
    )
    check_size(op, "index", index, 0, "B", batch, "key")
    if has_heads:
        check_size(op, "index", index, 1, "G", kv_heads, "key")
    check_device_like(op, "index", index, key, "key")
    check_indices(op, "index", index)
    check_item_bytes(op, "key", key)
    check_item_bytes(op, "value", value)
    kept = index.shape[-1]
    return (
        key.new_empty((batch, kv_heads, kept, dim)),
        value.new_empty((batch, kv_heads, kept, value.shape[-1])),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    key, _, index = inputs
    ctx.save_for_backward(index)
    ctx.total = key.shape[2]


def _backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, Tensor, None]:
    (index,) = ctx.saved_tensors
    if index.dim() == 2:
        index = index[:, None].expand(-1, grad_key.shape[1], -1)
    row = index.long().clamp_min(0)[..., None]

    def scatter(grad: Tensor) -> Tensor:
        grad = grad.masked_fill((index < 0)[..., None], 0)
        zeros = grad.new_zeros((*grad.shape[:2], ctx.total, grad.shape[-1]))
        return zeros.scatter_add(2, row.expand_as(grad), grad)

    return scatter(grad_key), scatter(grad_value), None


torch.library.register_autograd("claa::gather_kv", _backward, setup_context=_setup_context)
