import torch
from torch import Tensor

from claa_ops.ops._checks import (
    check,
    check_device_like,
    check_indices,
    check_rank,
    check_size,
    shape_of,
)
from claa_ops.ops._pages import check_page_table, check_pages, check_rows_apart, check_starts

_op = torch.ops.claa.compact_pages.default


def compact_pages(
    key_pages: Tensor, value_pages: Tensor, block_table: Tensor, starts: Tensor, index: Tensor
) -> None:
    """Move the kept keys and values of each request to the front of its pages, in place.

    Entry i of request r becomes what its entry ``index[starts[r] + i]`` was, for i below
    ``starts[r + 1] - starts[r]``; entries behind those keep what they have. Token t is row
    ``t % block`` of page ``block_table[r, t // block]``. No row is copied anywhere else meanwhile.

    Args:
        key_pages: ``[P, block, G, D]`` of any dtype of at most 8 bytes, updated in place. Any
            strides, last dimension contiguous; its rows must not overlap, nor share memory with
            another argument.
        value_pages: ``[P, block, G, Dv]``, likewise; its dtype may differ.
        block_table: ``[R, blocks]``, int32 or int64: the pages of each request. A page from which
            or to which something moves belongs to one request.
        starts: ``[R + 1]``, int32 or int64, ascending from 0 to at most k, as
            :func:`select_topk_packed` takes it.
        index: ``[k]``, or ``[G, k]`` where each head keeps others; int32 or int64, last dimension
            contiguous: positions in the prompt, strictly ascending within a request.

    Returns:
        None; ``key_pages`` and ``value_pages`` are written.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above, or on the CPU an
            index that does not ascend or lies outside [0, blocks * block), or a page outside
            [0, P).

    Exact. Not differentiable: autograd does not see the update.

    Source: KV compression of SnapKV (arXiv 2404.14469), in the pages of PagedAttention
    (arXiv 2309.06180).

    Example:
        One request in two pages of two rows keeps its tokens 1 and 3.

        >>> key = torch.tensor([[[[0.0]], [[1.0]]], [[[2.0]], [[3.0]]]])
        >>> value, table = -key, torch.tensor([[0, 1]])
        >>> compact_pages(key, value, table, torch.tensor([0, 2]), torch.tensor([1, 3]))
        >>> key.flatten(), value.flatten()
        (tensor([1., 3., 2., 3.]), tensor([-1., -3., -2., -3.]))
    """
    _op(key_pages, value_pages, block_table, starts, index)


@torch.library.register_fake("claa::compact_pages")
def _compact_pages_fake(
    key_pages: Tensor, value_pages: Tensor, block_table: Tensor, starts: Tensor, index: Tensor
) -> None:
    op = "compact_pages"
    check_rank(op, "key_pages", key_pages, 4, "[P, block, G, D]")
    check_rank(op, "value_pages", value_pages, 4, "[P, block, G, Dv]")
    num_pages, block, kv_heads, _ = key_pages.shape
    check_size(op, "value_pages", value_pages, 0, "P", num_pages, "key_pages")
    check_size(op, "value_pages", value_pages, 1, "block", block, "key_pages")
    check_size(op, "value_pages", value_pages, 2, "G", kv_heads, "key_pages")
    check_device_like(op, "value_pages", value_pages, key_pages, "key_pages")
    check_pages(op, "key_pages", key_pages)
    check_pages(op, "value_pages", value_pages)
    check_rows_apart(op, "key_pages", key_pages)
    check_rows_apart(op, "value_pages", value_pages)
    check_page_table(op, block_table, key_pages, "key_pages")
    has_heads = index.dim() == 2
    check(
        op,
        has_heads or index.dim() == 1,
        lambda: f"index must have shape [k] or [G, k], got {shape_of(index)}",
    )
    if has_heads:
        check_size(op, "index", index, 0, "G", kv_heads, "key_pages")
    check_device_like(op, "index", index, key_pages, "key_pages")
    check_indices(op, "index", index)
    check_starts(op, starts, block_table.shape[0], block_table, "block_table")
