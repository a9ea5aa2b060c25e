"""The argument checks of the ops, for the fakes: ``src/claa_ops/checks.h``, word for word.

A fake runs while a graph is traced, on tensors that have no values yet. It refuses there what the
op would refuse in the graph's first run. A condition on symbolic sizes is evaluated at their hints
and adds no guard: nothing is recompiled for it and no range of sizes is excluded, because the op
checks again whenever it runs. Sizes without a hint pass.
"""

from collections.abc import Callable

import torch
from torch import SymBool, SymInt, Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(op: str, condition: bool | SymBool, message: Callable[[], str]) -> None:
    """Raise the RuntimeError of the op itself unless the condition holds."""
    if hint_of(condition) is False:
        raise RuntimeError(f"{op}: {message()}")


def hint_of(value: object) -> object:
    """The number that a symbolic one stands for in this trace; without a hint it stays a symbol."""
    if isinstance(value, (SymBool, SymInt)) and value.node.has_hint():
        return value.node.hint
    return value


def shape_of(t: Tensor) -> list[object]:
    return [hint_of(size) for size in t.shape]


def strides_of(t: Tensor) -> list[object]:
    return [hint_of(stride) for stride in t.stride()]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_rank(op: str, name: str, t: Tensor, rank: int, shape: str) -> None:
    check(op, t.dim() == rank, lambda: f"{name} must have shape {shape}, got {shape_of(t)}")


def check_size(
    op: str, name: str, t: Tensor, dim: int, symbol: str, expected: int, source: str
) -> None:
    check(
        op,
        t.shape[dim] == expected,
        lambda: (
            f"{name} must have {symbol} = {hint_of(expected)} like {source}, "
            f"got {hint_of(t.shape[dim])} in {shape_of(t)}"
        ),
    )


def check_dtype(op: str, name: str, t: Tensor, dtype: torch.dtype) -> None:
    check(
        op,
        t.dtype == dtype,
        lambda: f"{name} must have dtype {name_of(dtype)}, got {name_of(t.dtype)}",
    )


def check_dtype_like(op: str, name: str, t: Tensor, like: Tensor, source: str) -> None:
    check(
        op,
        t.dtype == like.dtype,
        lambda: (
            f"{name} must have dtype {name_of(like.dtype)} like {source}, got {name_of(t.dtype)}"
        ),
    )


def check_device_like(op: str, name: str, t: Tensor, like: Tensor, source: str) -> None:
    check(
        op,
        t.device == like.device,
        lambda: f"{name} must be on the device of {source} ({like.device}), got {t.device}",
    )


def check_last_dim_contiguous(op: str, name: str, t: Tensor) -> None:
    check(
        op,
        (t.shape[-1] <= 1) | (t.stride(-1) == 1),
        lambda: f"{name} must be contiguous in its last dimension, got strides {strides_of(t)}",
    )


def check_item_bytes(op: str, name: str, t: Tensor) -> None:
    check(
        op,
        t.dtype.itemsize <= 8,
        lambda: f"{name} must have a dtype of at most 8 bytes, got {name_of(t.dtype)}",
    )


def check_float_dtype(op: str, name: str, t: Tensor) -> None:
    check(
        op,
        t.dtype in FLOATS,
        lambda: f"{name} must have dtype float32, bfloat16 or float16, got {name_of(t.dtype)}",
    )


def check_indices(op: str, name: str, t: Tensor) -> None:
    check(
        op,
        t.dtype in (torch.int32, torch.int64),
        lambda: f"{name} must have dtype int64 or int32, got {name_of(t.dtype)}",
    )
    check_last_dim_contiguous(op, name, t)


def check_row_integers(
    op: str, name: str, t: Tensor | None, batch: int, like: Tensor, source: str
) -> None:
    if t is None:
        return
    check_rank(op, name, t, 1, "[B]")
    check_size(op, name, t, 0, "B", batch, source)
    check_device_like(op, name, t, like, source)
    check_indices(op, name, t)


def check_pool_mode(op: str, pool_mode: int) -> None:
    check(op, pool_mode in (0, 1), lambda: f"pool_mode must be 0 (avg) or 1 (max), got {pool_mode}")


def check_kernel_size(op: str, kernel_size: int) -> None:
    check(
        op,
        (kernel_size > 0) & (kernel_size % 2 == 1),
        lambda: f"kernel_size must be odd and positive, got {hint_of(kernel_size)}",
    )


def check_divides(op: str, symbol: str, heads: int, kv_heads: int) -> None:
    def message() -> str:
        return f"{symbol} must divide H = {hint_of(heads)}, got {hint_of(kv_heads)}"

    check(op, kv_heads > 0, message)
    check(op, heads % kv_heads == 0, message)


def check_not_negative(op: str, name: str, value: int) -> None:
    check(op, value >= 0, lambda: f"{name} must not be negative, got {hint_of(value)}")


def check_in_range(op: str, name: str, value: int, symbol: str, largest: int) -> None:
    check(
        op,
        (value >= 0) & (value <= largest),
        lambda: f"{name} must be in [0, {symbol}] = [0, {hint_of(largest)}], got {hint_of(value)}",
    )


# The checks of src/claa_ops/window_attention.h.


def check_query_key(op: str, query: Tensor, key: Tensor, query_shape: str) -> None:
    check_rank(op, "query", query, 4, query_shape)
    check_rank(op, "key", key, 4, "[B, G, N, D]")
    check_float_dtype(op, "query", query)
    check_dtype_like(op, "key", key, query, "query")
    check_device_like(op, "key", key, query, "query")
    check_size(op, "key", key, 0, "B", query.shape[0], "query")
    check_size(op, "key", key, 3, "D", query.shape[3], "query")
    check(op, query.shape[3] > 0, lambda: "D must be at least 1, got 0")
    check_divides(op, "G", query.shape[1], key.shape[1])
    check_last_dim_contiguous(op, "query", query)
    check_last_dim_contiguous(op, "key", key)


def check_sink_logits(op: str, sink_logits: Tensor | None, query: Tensor, heads: int) -> None:
    if sink_logits is None:
        return
    check_rank(op, "sink_logits", sink_logits, 1, "[H]")
    check_size(op, "sink_logits", sink_logits, 0, "H", heads, "query")
    check(
        op,
        sink_logits.dtype in (torch.float32, query.dtype),
        lambda: (
            f"sink_logits must have dtype float32 or that of query ({name_of(query.dtype)}), "
            f"got {name_of(sink_logits.dtype)}"
        ),
    )
    check_device_like(op, "sink_logits", sink_logits, query, "query")
    check_last_dim_contiguous(op, "sink_logits", sink_logits)


def check_window_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,  # any will do
    lse: Tensor | None = None,
    start: Tensor | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> None:
    """Check the arguments that every score of a window takes, with the defaults of the schema."""
    check_query_key(op, query, key, "[B, H, W, D]")
    batch, heads, window, _ = query.shape
    total = key.shape[2]
    check(
        op,
        total >= window,
        lambda: f"N must be at least W = {hint_of(window)}, got {hint_of(total)}",
    )
    check_not_negative(op, "sliding_window", sliding_window)
    check(op, softcap >= 0, lambda: f"softcap must not be negative, got {softcap:g}")
    if lse is not None:
        check_rank(op, "lse", lse, 3, "[B, H, W]")
        check_size(op, "lse", lse, 0, "B", batch, "query")
        check_size(op, "lse", lse, 1, "H", heads, "query")
        check_size(op, "lse", lse, 2, "W", window, "query")
        check_dtype(op, "lse", lse, torch.float32)
        check_device_like(op, "lse", lse, query, "query")
        check_last_dim_contiguous(op, "lse", lse)
    check_sink_logits(op, sink_logits, query, heads)
    check_row_integers(op, "start", start, batch, query, "query")


# The checks of src/claa_ops/paged_attention.h.

PAGE_SIZES = (16, 32, 64, 128, 256)


def check_int32(op: str, name: str, t: Tensor, query: Tensor) -> None:
    check_dtype(op, name, t, torch.int32)
    check_device_like(op, name, t, query, "query")
    check_last_dim_contiguous(op, name, t)


def check_pages(
    op: str,
    query: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    k_scale: Tensor | None,
    query_shape: str,
) -> None:
    check_rank(op, "query", query, 4, query_shape)
    check_rank(op, "key_pages", key_pages, 4, "[P, L, G, D]")
    check_float_dtype(op, "query", query)
    check(
        op,
        key_pages.dtype in (query.dtype, torch.float8_e4m3fn),
        lambda: (
            f"key_pages must have dtype {name_of(query.dtype)} like query or float8_e4m3fn, "
            f"got {name_of(key_pages.dtype)}"
        ),
    )
    check_device_like(op, "key_pages", key_pages, query, "query")
    check_size(op, "key_pages", key_pages, 3, "D", query.shape[3], "query")
    prompts, queries, heads, dim = query.shape
    check(
        op,
        (queries > 0) & (heads > 0) & (dim > 0),
        lambda: f"query must have at least one query, head and channel, got {shape_of(query)}",
    )
    check_divides(op, "G", heads, key_pages.shape[2])
    check(
        op,
        hint_of(key_pages.shape[1]) in PAGE_SIZES,
        lambda: f"L must be 16, 32, 64, 128 or 256, got {hint_of(key_pages.shape[1])}",
    )
    check_last_dim_contiguous(op, "query", query)
    check_last_dim_contiguous(op, "key_pages", key_pages)

    check_rank(op, "block_table", block_table, 2, "[requests, blocks]")
    check_int32(op, "block_table", block_table, query)
    check_rank(op, "lengths", lengths, 1, "[R]")
    check_size(op, "lengths", lengths, 0, "R", prompts, "query")
    check_int32(op, "lengths", lengths, query)
    if rows is None:
        check_size(op, "block_table", block_table, 0, "R", prompts, "query")
    else:
        check_rank(op, "rows", rows, 1, "[R]")
        check_size(op, "rows", rows, 0, "R", prompts, "query")
        check_int32(op, "rows", rows, query)
    if k_scale is not None:
        check(
            op,
            key_pages.dtype == torch.float8_e4m3fn,
            lambda: (
                f"k_scale must come with key_pages of float8_e4m3fn, got {name_of(key_pages.dtype)}"
            ),
        )
        check(
            op, k_scale.numel() == 1, lambda: f"k_scale must have one item, got {shape_of(k_scale)}"
        )
        check_dtype(op, "k_scale", k_scale, torch.float32)
        check_device_like(op, "k_scale", k_scale, query, "query")
