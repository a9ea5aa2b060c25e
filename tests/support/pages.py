"""Keys in the pages of an engine's cache, in the layouts that engines have."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from support.inputs import normal, on_device

Allocate = Callable[..., Tensor]  # (pages, size, kv_heads, dim), filled with NaN


def _memory(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    if dtype.itemsize == 1:  # e4m3: all ones is NaN
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(dtype)
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def _plain(pages: int, size: int, heads: int, dim: int, **kind) -> Tensor:
    return _memory(pages, size, heads, dim, **kind)


def _halves(pages: int, size: int, heads: int, dim: int, **kind) -> Tensor:
    """Keys, then values, of each page."""
    return _memory(pages, 2, size, heads, dim, **kind)[:, 0]


def _interleaved(pages: int, size: int, heads: int, dim: int, **kind) -> Tensor:
    """Key and value of each token side by side."""
    return _memory(pages, size, heads, 2 * dim, **kind)[..., :dim]


def _by_head(pages: int, size: int, heads: int, dim: int, **kind) -> Tensor:
    """The same, head by head."""
    return _memory(pages, heads, size, 2 * dim, **kind)[..., :dim].transpose(1, 2)


LAYOUTS = [
    pytest.param(_plain, id="plain"),
    pytest.param(_halves, id="halves"),
    pytest.param(_interleaved, id="interleaved"),
    pytest.param(_by_head, id="by-head"),
]


class Paged(NamedTuple):
    """The arguments that say where keys lie."""

    key_pages: Tensor
    block_table: Tensor
    lengths: Tensor


def in_pages(
    keys: Sequence[Tensor],  # of each prompt, [N, G, D]
    size: int,
    *,
    capacity: int = 0,  # tokens that a row of the table has room for; else the longest prompt's
    layout: Allocate = _plain,
    seed: int = 0,
) -> Paged:
    """The keys in pages in a random order; NaN in all that no prompt has, -1 behind its pages."""
    device, dtype = keys[0].device.type, keys[0].dtype
    lengths = [len(key) for key in keys]
    counts = [-(-length // size) for length in lengths]
    blocks = max(1, *counts, -(-capacity // size))
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    pages = layout(len(order), size, *keys[0].shape[1:], dtype=dtype, device=device)
    table = torch.full((len(keys), blocks), -1, dtype=torch.int32)
    for row, (key, count) in enumerate(zip(keys, counts, strict=True)):
        for block in range(count):
            table[row, block] = page = order.pop()
            part = key[block * size : (block + 1) * size]
            _bits(pages)[page, : len(part)] = _bits(part)
    return Paged(pages, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device))


def _bits(x: Tensor) -> Tensor:
    """Not every torch copies into a part of a float8 tensor."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def keys_of_lengths(
    lengths: Sequence[int], kv_heads: int, dim: int, *, device: str, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    longest = normal(len(lengths), max(lengths, default=0), kv_heads, dim, device=device, seed=seed)
    return [key[:length].to(dtype) for key, length in zip(longest, lengths, strict=True)]


def as_dense(key: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The keys of one prompt as the ops without pages take them: [1, G, N, D]."""
    return key.to(dtype or key.dtype).transpose(0, 1)[None]


def rejections(queries: str) -> list:
    """What to change in `valid_call`, and what a paged op says to that."""
    half, double = torch.float16, torch.float64
    zeros = torch.zeros
    return [
        pytest.param(
            {"query": zeros(2, 3)},
            rf"query must .*\[R, {queries}, H, D\], got \[2, 3\]",
            id="query-rank",
        ),
        pytest.param(
            {"key_pages": zeros(3, 16, 64)},
            r"key_pages must .*\[P, L, G, D\], got \[3, 16, 64\]",
            id="pages-rank",
        ),
        pytest.param(
            {"query": zeros(2, 4, 8, 64, dtype=double)}, "query must .*, got float64", id="dtype"
        ),
        pytest.param(
            {"key_pages": zeros(5, 16, 4, 64, dtype=half)},
            "key_pages must have dtype float32 like query or float8_e4m3fn, got float16",
            id="pages-dtype",
        ),
        pytest.param(
            {"key_pages": zeros(5, 16, 4, 32)}, "key_pages must .*64 like query, got 32", id="dim"
        ),
        pytest.param(
            {"query": zeros(2, 0, 8, 64)},
            r"query must have at least one query, .*got \[2, 0, 8, 64\]",
            id="no-queries",
        ),
        pytest.param({"key_pages": zeros(5, 16, 3, 64)}, "G must divide H = 8, got 3", id="group"),
        pytest.param(
            {"key_pages": zeros(5, 24, 4, 64)}, "L must be 16, 32, .*, got 24", id="page-size"
        ),
        pytest.param(
            {"query": zeros(2, 4, 64, 8).mT},
            r"query must be contiguous.*, got strides \[",
            id="query-strides",
        ),
        pytest.param(
            {"key_pages": zeros(5, 16, 64, 4).mT},
            r"key_pages must be contiguous.*, got strides \[",
            id="pages-strides",
        ),
        pytest.param(
            {"block_table": zeros(2).int()}, r"block_table must .*, got \[2\]", id="table-rank"
        ),
        pytest.param(
            {"block_table": zeros(2, 2).long()},
            "block_table must have dtype int32, got int64",
            id="table-dtype",
        ),
        pytest.param(
            {"block_table": zeros(3, 2).int()},
            "block_table must have R = 2 like query, got 3",
            id="table-rows",
        ),
        pytest.param(
            {"lengths": zeros(3).int()}, "lengths must have R = 2 like query, got 3", id="lengths"
        ),
        pytest.param(
            {"lengths": zeros(2).long()},
            "lengths must have dtype int32, got int64",
            id="lengths-dtype",
        ),
        pytest.param({"rows": zeros(3).int()}, "rows must have R = 2 like query, got 3", id="rows"),
        pytest.param(
            {"k_scale": zeros(1)},
            "k_scale must come with key_pages of float8_e4m3fn, got float32",
            id="scale-without-float8",
        ),
        pytest.param(
            {"k_scale": zeros(2), "key_pages": _memory(5, 16, 4, 64, **_E4M3)},
            r"k_scale must have one item, got \[2\]",
            id="two-scales",
        ),
        pytest.param(
            {"k_scale": zeros(1, dtype=half), "key_pages": _memory(5, 16, 4, 64, **_E4M3)},
            "k_scale must have dtype float32, got float16",
            id="scale-dtype",
        ),
        pytest.param(
            {"running": zeros(2, 2, 2, 2)}, "running must .*, got .2, 2, 2, 2.", id="running-rank"
        ),
    ]


_E4M3 = {"dtype": torch.float8_e4m3fn, "device": "cpu"}


def valid_call(running: Tensor, changes: dict, device: str) -> dict:
    """Valid arguments for two prompts of 20 and 0 tokens, except for ``changes``."""
    call = {
        "running": running,
        "query": torch.zeros(2, 4, 8, 64),
        "key_pages": torch.zeros(5, 16, 4, 64),
        "block_table": torch.tensor([[3, 1], [0, 0]], dtype=torch.int32),
        "lengths": torch.tensor([20, 0], dtype=torch.int32),
    } | changes
    return on_device(call, device)


# What only the CPU looks at: values.
OUT_OF_RANGE = [
    pytest.param(
        {"lengths": torch.tensor([33, 0]).int()}, "lengths must be at most 32, got 33", id="long"
    ),
    pytest.param(
        {"rows": torch.tensor([2, 0]).int()}, r"rows must be in \[0, 2\), got 2", id="row"
    ),
    pytest.param(
        {"block_table": torch.tensor([[3, 5], [0, 0]]).int()},
        r"block_table must name pages in \[0, 5\), got 5",
        id="page",
    ),
    pytest.param(
        {"block_table": torch.tensor([[3, -1], [0, 0]]).int()},
        r"block_table must name pages in \[0, 5\), got -1",
        id="no-page",
    ),
]
