import torch
from torch import Tensor

from claa_ops.ops._checks import (
    check_device_like,
    check_dtype_like,
    check_item_bytes,
    check_last_dim_contiguous,
    check_rank,
    check_size,
)
from claa_ops.ops._pages import check_integers, check_packed_rows

_op = torch.ops.claa.gather_rows.default


def gather_rows(out: Tensor, x: Tensor, index: Tensor) -> None:
    """The kept rows of a packed batch: hidden states, residuals, position ids.

    ``out[i] = x[index[i]]``; rows are moved as bytes. :func:`gather_tokens` for an output that the
    caller owns, such as the static input of a captured graph.

    Args:
        out: ``[k, C]``, contiguous, dtype of ``x``: the result. It shares no memory with ``x``.
        x: ``[T, C]`` of any dtype of at most 8 bytes; any strides, last dimension contiguous.
        index: ``[k]``, int64 or int32. -1 is padding and gives a row of zeros.

    Returns:
        None; ``out`` is written.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above, or on the CPU an
            index outside [-1, T).

    Exact. Not differentiable: autograd does not see the update.

    Source: token-selective propagation, FastKV (arXiv 2502.01068) and CLAA (arXiv 2602.16054).

    Example:
        >>> hidden = torch.tensor([[1.0, 1.5], [2.0, 2.5], [3.0, 3.5]])
        >>> out = torch.empty(3, 2)
        >>> gather_rows(out, hidden, torch.tensor([0, 2, -1]))
        >>> out
        tensor([[1.0000, 1.5000],
                [3.0000, 3.5000],
                [0.0000, 0.0000]])
    """
    _op(out, x, index)


@torch.library.register_fake("claa::gather_rows")
def _gather_rows_fake(out: Tensor, x: Tensor, index: Tensor) -> None:
    op = "gather_rows"
    check_rank(op, "out", out, 2, "[k, C]")
    check_rank(op, "x", x, 2, "[T, C]")
    check_size(op, "x", x, 1, "C", out.shape[1], "out")
    check_dtype_like(op, "out", out, x, "x")
    check_device_like(op, "out", out, x, "x")
    check_last_dim_contiguous(op, "out", out)
    check_packed_rows(op, "out", out)
    check_last_dim_contiguous(op, "x", x)
    check_integers(op, "index", index, "k", out.shape[0], out, "out")
    check_item_bytes(op, "x", x)
