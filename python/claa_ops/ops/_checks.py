"""What the ops ask of their arguments, for the fakes: `src/claa_ops/checks.h`, word for word.

A fake runs while a graph is made, of tensors that have no values yet. It refuses there what the op
would refuse at the graph's first run. A condition on symbolic sizes is judged at the sizes at hand
and leaves no guard: no graph is made anew for it, and no range of sizes is ruled out, as the op
checks again whenever it runs. Sizes that nobody knows yet pass.
"""

from collections.abc import Callable

import torch
from torch import SymBool, SymInt, Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(op: str, condition: bool | SymBool, message: Callable[[], str]) -> None:
    """RuntimeError, as from the op itself, unless the condition holds."""
    if at_hand(condition) is False:
        raise RuntimeError(f"{op}: {message()}")


def at_hand(value: object) -> object:
    """A number as it is at the sizes at hand; what has no value yet stays a symbol."""
    if isinstance(value, (SymBool, SymInt)) and value.node.has_hint():
        return value.node.hint
    return value


def shape_of(t: Tensor) -> list[object]:
    return [at_hand(size) for size in t.shape]


def strides_of(t: Tensor) -> list[object]:
    return [at_hand(stride) for stride in t.stride()]


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
            f"{name} must have {symbol} = {at_hand(expected)} like {source}, "
            f"got {at_hand(t.shape[dim])} in {shape_of(t)}"
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
        lambda: f"kernel_size must be odd and positive, got {at_hand(kernel_size)}",
    )


def check_divides(op: str, symbol: str, heads: int, kv_heads: int) -> None:
    def message() -> str:
        return f"{symbol} must divide H = {at_hand(heads)}, got {at_hand(kv_heads)}"

    check(op, kv_heads > 0, message)
    check(op, heads % kv_heads == 0, message)


def check_not_negative(op: str, name: str, value: int) -> None:
    check(op, value >= 0, lambda: f"{name} must not be negative, got {at_hand(value)}")


def check_in_range(op: str, name: str, value: int, symbol: str, largest: int) -> None:
    check(
        op,
        (value >= 0) & (value <= largest),
        lambda: f"{name} must be in [0, {symbol}] = [0, {at_hand(largest)}], got {at_hand(value)}",
    )


# Of `src/claa_ops/window_attention.h`.


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


def check_window_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    start: Tensor | None,
    sliding_window: int,
    softcap: float,
    sink_logits: Tensor | None,
) -> None:
    check_query_key(op, query, key, "[B, H, W, D]")
    batch, heads, window, _ = query.shape
    total = key.shape[2]
    check(
        op,
        total >= window,
        lambda: f"N must be at least W = {at_hand(window)}, got {at_hand(total)}",
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
    if sink_logits is not None:
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
    check_row_integers(op, "start", start, batch, query, "query")
