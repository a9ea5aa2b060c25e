"""Prompts of several lengths, packed, and pages as engines lay them out."""

import torch
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = ["pairs", "side by side", "heads outside", "packed"]


def starts_of(counts: list[int], device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    """Where the entries of each request begin, and where all end."""
    return torch.tensor([0, *counts], device=device).cumsum(0).to(dtype)


def block_table(
    requests: int, blocks: int, *, device: str, seed: int = 0, dtype: torch.dtype = torch.int32
) -> Tensor:
    """Pages in any order, each of one request; the last page is nobody's."""
    pages = torch.randperm(requests * blocks, generator=torch.Generator().manual_seed(seed))
    return pages.view(requests, blocks).to(device, dtype)


def key_and_value_pages(layout: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Pages ``[P, block, G, D]`` of their own memory with the values of ``key`` and ``value``.

    ``"pairs"``: ``(P, 2, block, G, D)``, as FlashAttention's back end has them in vLLM 0.25;
    ``"side by side"``: ``(P, G, block, 2 * D)``, as all have them in 0.32; ``"heads outside"``:
    ``(P, G, block, D)`` each.
    """
    if layout == "pairs":
        return torch.stack([key, value], dim=1).unbind(1)
    if layout == "side by side":
        memory = torch.cat([key, value], dim=-1).transpose(1, 2).contiguous()
        return memory.transpose(1, 2).split([key.shape[-1], value.shape[-1]], dim=-1)
    if layout == "heads outside":
        by_head = (x.transpose(1, 2) for x in (key, value))
        copies = (x.clone(memory_format=torch.contiguous_format) for x in by_head)
        return tuple(x.transpose(1, 2) for x in copies)
    return key.clone(), value.clone()


def ascending(length: int, count: int, seed: int) -> Tensor:
    """``count`` of ``length`` positions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(length, generator=generator)[:count].sort().values


@st.composite
def requests(draw: st.DrawFn, longest: int) -> tuple[list[int], list[int]]:
    """Lengths of some prompts, and how many tokens each keeps."""
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=5), label="lengths")
    counts = [draw(st.integers(0, length), label="kept") for length in lengths]
    return lengths, counts
