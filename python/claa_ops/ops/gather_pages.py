import torch
from torch import Tensor

from claa_ops.ops._checks import (
    check_device_like,
    check_dtype_like,
    check_last_dim_contiguous,
    check_rank,
    check_size,
)
from claa_ops.ops._pages import (
    check_integers,
    check_packed_rows,
    check_page_table,
    check_pages,
    check_starts,
)

_op = torch.ops.claa.gather_pages.default


def gather_pages(
    out: Tensor, pages: Tensor, block_table: Tensor, starts: Tensor, index: Tensor
) -> None:
    """The kept rows of each request from an engine's pages.

    For i in ``starts[r] .. starts[r + 1] - 1``, ``out[i]`` is token ``t = index[i]`` of request r:
    row ``t % block`` of page ``block_table[r, t // block]``. Rows are moved as bytes.

    Args:
        out: ``[k, C]``, contiguous, dtype of ``pages``: the result. What belongs to no request
            becomes zeros. It shares no memory with ``pages``.
        pages: ``[P, block, C]`` of any dtype of at most 8 bytes; any strides, last dimension
            contiguous.
        block_table: ``[R, blocks]``, int32 or int64: the pages of each request.
        starts: ``[R + 1]``, int32 or int64, ascending from 0 to at most k, as
            :func:`select_topk_packed` takes it.
        index: ``[k]``, int32 or int64: positions in the prompt, as :func:`select_topk_packed`
            gives them. -1 is padding and gives a row of zeros.

    Returns:
        None; ``out`` is written.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above, or on the CPU an
            index outside [-1, blocks * block) or a page outside [0, P).

    Exact. Not differentiable: autograd does not see the update.

    Source: the block tables of PagedAttention (arXiv 2309.06180).

    Example:
        Pages of two rows; the only request has its tokens 0 and 1 in page 1, 2 and 3 in page 0.

        >>> pages = torch.tensor([[[2.0], [3.0]], [[0.0], [1.0]]])
        >>> out, table = torch.empty(3, 1), torch.tensor([[1, 0]])
        >>> gather_pages(out, pages, table, torch.tensor([0, 2]), torch.tensor([1, 2, -1]))
        >>> out
        tensor([[1.],
                [2.],
                [0.]])
    """
    _op(out, pages, block_table, starts, index)


@torch.library.register_fake("claa::gather_pages")
def _gather_pages_fake(
    out: Tensor, pages: Tensor, block_table: Tensor, starts: Tensor, index: Tensor
) -> None:
    op = "gather_pages"
    check_rank(op, "out", out, 2, "[k, C]")
    check_rank(op, "pages", pages, 3, "[P, block, C]")
    check_size(op, "pages", pages, 2, "C", out.shape[1], "out")
    check_dtype_like(op, "out", out, pages, "pages")
    check_device_like(op, "out", out, pages, "pages")
    check_last_dim_contiguous(op, "out", out)
    check_packed_rows(op, "out", out)
    check_pages(op, "pages", pages)
    check_page_table(op, block_table, pages, "pages")
    check_starts(op, starts, block_table.shape[0], block_table, "block_table")
    check_integers(op, "index", index, "k", out.shape[0], out, "out")
