"""Checks of packed prompts and of an engine's pages: ``src/claa_ops/pages.h``, word for word."""

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
    strides_of,
)


def check_integers(
    op: str, name: str, t: Tensor, symbol: str, size: int, like: Tensor, source: str
) -> None:
    check_rank(op, name, t, 1, f"[{symbol}]")
    check_size(op, name, t, 0, symbol, size, source)
    check_device_like(op, name, t, like, source)
    check_indices(op, name, t)


def check_starts(op: str, starts: Tensor, requests: int, like: Tensor, source: str) -> None:
    check_integers(op, "starts", starts, "R + 1", requests + 1, like, source)


def check_packed_rows(op: str, name: str, t: Tensor) -> None:
    check(
        op,
        (t.shape[0] <= 1) | (t.shape[1] == 0) | (t.stride(0) == t.shape[1]),
        lambda: f"{name} must be contiguous, got strides {strides_of(t)}",
    )


def check_rows_apart(op: str, name: str, t: Tensor) -> None:
    for dim in range(t.dim() - 1):
        check(
            op,
            (t.shape[dim] <= 1) | (t.stride(dim) >= t.shape[-1]),
            lambda: f"{name} must have rows that do not overlap, got strides {strides_of(t)}",
        )


def check_pages(op: str, name: str, pages: Tensor) -> None:
    check(
        op,
        pages.shape[1] > 0,
        lambda: f"{name} must have a block of at least one row, got {shape_of(pages)}",
    )
    check_last_dim_contiguous(op, name, pages)
    check_item_bytes(op, name, pages)


def check_page_table(op: str, block_table: Tensor, like: Tensor, source: str) -> None:
    check_rank(op, "block_table", block_table, 2, "[R, blocks]")
    check_device_like(op, "block_table", block_table, like, source)
    check_indices(op, "block_table", block_table)
