"""Keys and values of one request, read from the pages of vLLM's caches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Views of keys and values, [blocks, block, G, D], of a layer's cache.
View = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def strided(cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Of the caches on GPUs, whatever the order in memory.

    vLLM 0.25 has ``[blocks, 2, block, G, D]``; later ``[blocks, G, block, 2 * D]``.
    """
    if cache.dim() == 5:
        key, value = cache.unbind(1)
    else:
        key, value = cache.transpose(1, 2).split(head_size, dim=-1)
    return key, value


def transposed(cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Of the CPU's caches in the form "vec": keys first, and transposed within a page of a head."""
    blocks, heads, block, _ = cache.shape
    pages = cache.view(blocks, heads, 2 * block, head_size)
    key = pages[:, :, :block].view(blocks, heads, head_size, block)
    return key.permute(0, 3, 1, 2), pages[:, :, block:].transpose(1, 2)


def write(pages: Tensor, block_table: Tensor, entries: Tensor) -> None:
    """Put ``entries``, ``[k, G, D]``, at the beginning of these blocks.

    Args:
        pages: ``[blocks, block, G, D]``, keys or values.
        block_table: ``[k / block or more]``, int32.
        entries: what is written.
    """
    place = torch.arange(len(entries), device=pages.device)
    block = pages.shape[1]
    pages[block_table[place // block].long(), place % block] = entries


def read(pages: Tensor, block_table: Tensor, length: int) -> Tensor:
    """The first entries ``[length, G, D]`` of a request, contiguous.

    Args:
        pages: ``[blocks, block, G, D]``, keys or values.
        block_table: ``[blocks of the request]``, int32.
        length: how many entries.
    """
    block = pages.shape[1]
    used = pages[block_table[: -(-length // block)].long()]
    return used.flatten(0, 1)[:length].contiguous()
