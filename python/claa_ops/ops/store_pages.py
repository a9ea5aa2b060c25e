import torch
from torch import Tensor

from claa_ops.ops._checks import (
    check,
    check_device_like,
    check_dtype_like,
    check_last_dim_contiguous,
    check_rank,
    check_size,
    hint_of,
)
from claa_ops.ops._pages import check_integers, check_pages, check_rows_apart

_op = torch.ops.claa.store_pages.default


def store_pages(pages: Tensor, x: Tensor, slots: Tensor) -> None:
    """Write rows into an engine's pages: the hidden states of a prompt that is not over yet.

    ``pages[slots[i] // block, slots[i] % block] = x[i]``; rows are moved as bytes.
    :func:`gather_pages` reads them back.

    Args:
        pages: ``[P, block, C]`` of any dtype of at most 8 bytes, fewer than 2^31 rows in all,
            updated in place. Any strides, last dimension contiguous; its rows must not overlap,
            nor share memory with another argument.
        x: ``[T, C]``, dtype of ``pages``; any strides, last dimension contiguous.
        slots: ``[T]``, int64 or int32: where each row goes, no two to the same place. -1 is
            stored nowhere.

    Returns:
        None; ``pages`` is written.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above, or on the CPU a slot
            outside [-1, P * block).

    Exact. Not differentiable: autograd does not see the update.

    Source: the slot mapping of PagedAttention (arXiv 2309.06180).

    Example:
        Pages of two rows; the second row of ``x`` is padding.

        >>> pages, x = torch.zeros(2, 2, 1), torch.tensor([[1.0], [2.0], [3.0]])
        >>> store_pages(pages, x, torch.tensor([3, -1, 0]))
        >>> pages
        tensor([[[3.],
                 [0.]],
        <BLANKLINE>
                [[0.],
                 [1.]]])
    """
    _op(pages, x, slots)


@torch.library.register_fake("claa::store_pages")
def _store_pages_fake(pages: Tensor, x: Tensor, slots: Tensor) -> None:
    op = "store_pages"
    check_rank(op, "pages", pages, 3, "[P, block, C]")
    check_rank(op, "x", x, 2, "[T, C]")
    check_size(op, "x", x, 1, "C", pages.shape[2], "pages")
    check_dtype_like(op, "x", x, pages, "pages")
    check_device_like(op, "x", x, pages, "pages")
    check_pages(op, "pages", pages)
    check_rows_apart(op, "pages", pages)
    rows = pages.shape[0] * pages.shape[1]
    check(op, rows < 2**31, lambda: f"pages must have fewer than 2^31 rows, got {hint_of(rows)}")
    check_last_dim_contiguous(op, "x", x)
    check_integers(op, "slots", slots, "T", x.shape[0], x, "x")
