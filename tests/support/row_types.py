"""Dtypes whose rows the gathers move, and how to compare them bit for bit."""

import pytest
import torch
from torch import Tensor

ROW_TYPES = [
    pytest.param(dtype, id=str(dtype).removeprefix("torch."))
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int16,
        torch.bfloat16,
        torch.float16,
        torch.int32,
        torch.float32,
    )
]
ROW_TYPES_OF_8_BYTES = [
    pytest.param(dtype, id=str(dtype).removeprefix("torch."))
    for dtype in (torch.int64, torch.float64, torch.complex64)
]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_bytes(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Every bit pattern of the dtype, NaN and all."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).to(device, dtype)
    width = torch.empty(0, dtype=dtype).element_size()
    wide = (*shape[:-1], shape[-1] * width)
    drawn = torch.randint(256, wide, generator=generator, dtype=torch.uint8)
    return drawn.view(dtype).to(device)


def as_integers(x: Tensor) -> Tensor:
    """The same bits as integers: equal where the bits are, and torch can gather them."""
    return x if x.dtype == torch.bool else x.view(_INTEGERS[x.element_size()])
