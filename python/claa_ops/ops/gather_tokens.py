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
    hint_of,
    shape_of,
)

_op = torch.ops.claa.gather_tokens.default


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The rows of the kept tokens: hidden states, position embeddings, position ids.

    ``out[b, i] = x[b, index[b, i]]``; rows are moved as bytes.

    Args:
        x: ``[B, N, C]``, or ``[1, N, C]`` for all rows of the batch, of any dtype of at most
            8 bytes; any strides, last dimension contiguous.
        index: ``[B, k]``, int64 or int32, contiguous in the last dimension. -1 is padding and
            gives a row of zeros.

    Returns:
        ``[B, k, C]``, contiguous, dtype of ``x``.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above, or on the CPU an
            index outside [-1, N).

    Exact. Differentiable in ``x``.

    Source: token-selective propagation, FastKV (arXiv 2502.01068) and CLAA (arXiv 2602.16054).

    Example:
        >>> hidden = torch.tensor([[[1.0, 1.5], [2.0, 2.5], [3.0, 3.5]]])
        >>> gather_tokens(hidden, torch.tensor([[0, 2]]))
        tensor([[[1.0000, 1.5000],
                 [3.0000, 3.5000]]])
    """
    return _op(x, index)


@torch.library.register_fake("claa::gather_tokens")
def _gather_tokens_fake(x: Tensor, index: Tensor) -> Tensor:
    op = "gather_tokens"
    check_rank(op, "x", x, 3, "[B, N, C] or [1, N, C]")
    check_rank(op, "index", index, 2, "[B, k]")
    batch, kept = index.shape
    check(
        op,
        (x.shape[0] == 1) | (x.shape[0] == batch),
        lambda: (
            f"x must have B = 1 or B = {hint_of(batch)} like index, "
            f"got {hint_of(x.shape[0])} in {shape_of(x)}"
        ),
    )
    check_device_like(op, "index", index, x, "x")
    check_last_dim_contiguous(op, "x", x)
    check_indices(op, "index", index)
    check_item_bytes(op, "x", x)
    return x.new_empty((batch, kept, x.shape[-1]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.rows, ctx.total = x.shape[:2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    grad = grad.masked_fill((index < 0)[..., None], 0)
    zeros = grad.new_zeros((grad.shape[0], ctx.total, grad.shape[-1]))
    row = index.long().clamp_min(0)[..., None].expand_as(grad)
    return zeros.scatter_add(1, row, grad).sum_to_size(ctx.rows, ctx.total, grad.shape[-1]), None


torch.library.register_autograd("claa::gather_tokens", _backward, setup_context=_setup_context)
