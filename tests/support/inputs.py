"""Inputs that the op tests share, and what "as exact as PyTorch" means."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import claa_ops
from claa_ops import reference

FLOATS = [
    pytest.param(dtype, id=str(dtype).removeprefix("torch."))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
INDEX_TYPES = [pytest.param(torch.int32, id="int32"), pytest.param(torch.int64, id="int64")]

# What a score can be: ties (few values), both zeros, subnormal, infinite; NaN of both signs.
AWKWARD = (0.0, -0.0, 1.0, 1.0, -1.0, 2.5, 1e-42, -1e-42, 3e38, torch.inf, -torch.inf)
NANS = (torch.nan, -torch.nan)


def normal(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def on_device(arguments: dict, device: str) -> dict:
    """Arguments of an op, with their strides, which ``Tensor.to`` does not always keep."""

    def moved(x: Tensor) -> Tensor:
        memory = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
        return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())

    return {name: moved(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def chosen_from(values: tuple[float, ...], *shape: int, device: str, seed: int) -> Tensor:
    """Each entry one of ``values``: few values give many ties."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(values), shape, generator=generator)
    return torch.tensor(values)[choice].to(device)


def queries_and_keys(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    total: int,
    dim: int,
    *,
    device: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    query = normal(batch, heads, queries, dim, device=device, dtype=dtype, seed=2 * seed)
    key = normal(batch, kv_heads, total, dim, device=device, dtype=dtype, seed=2 * seed + 1)
    return query, key


def assert_as_exact_as_eager(op: str, *args: object, **options: object) -> Tensor:
    """Against the reference in float64, the error is at most twice that of the eager reference.

    Where eager happens to be exact, four float32 steps of the largest value are allowed.
    """
    actual = getattr(claa_ops, op)(*args, **options)
    eager = getattr(reference, op)(*args, **options)
    exact = getattr(reference, op)(
        *map(_double, args), **{name: _double(value) for name, value in options.items()}
    )
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape
    assert actual.is_contiguous()
    assert_no_further(actual, eager, exact)
    return actual


def assert_no_further(actual: Tensor, eager: Tensor, exact: Tensor, steps: float = 4.0) -> None:
    if not exact.numel():
        return
    error = (actual.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    floor = steps * torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error <= 2 * eager_error + floor, f"error {error:.3g}, eager {eager_error:.3g}"


def _double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """As torch.equal, but NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_bits_on_any_run(call: Callable[[], Tensor]) -> None:
    """Neither a second run nor the number of threads changes a bit."""
    with threads(1):
        alone = call()
        assert_same_bits(call(), alone)
    for count in (2, 3, 5, 8):
        with threads(count):
            assert_same_bits(call(), alone)


def vector_query(layer: int, first: int, last: int) -> Tensor:
    """Queries ``first`` to ``last`` of the published check values: [1, 4, T, 4]."""
    head, position, channel = _grid(4, first, last)
    angle = 1 + 1.7 * head + 0.9 * position + 2.3 * channel + 0.6 * layer + 0.05 * position**2
    return (2 * angle.sin()).float()[None]


def vector_key(layer: int) -> Tensor:
    """Keys of the check values: [1, 2, 16, 4]."""
    head, position, channel = _grid(2, 0, 15)
    angle = 0.5 + 2.1 * head + 1.3 * position + 0.7 * channel + 0.4 * layer + 0.03 * position**2
    return (2 * angle.cos()).float()[None]


def _grid(heads: int, first: int, last: int) -> tuple[Tensor, ...]:
    axes = (torch.arange(heads), torch.arange(first, last + 1), torch.arange(4))
    return torch.meshgrid(*(axis.double() for axis in axes), indexing="ij")
