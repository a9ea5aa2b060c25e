"""An op called on fake tensors: the same sizes, dtypes and strides, and no values."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

import claa_ops
from support.inputs import on_device

Replace = Callable[[Tensor], Tensor]


KINDS = ["meta", "fake", "symbolic"]


def on_meta(x: Tensor) -> Tensor:
    """The tensor without memory, as under ``torch.device("meta")``."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class Symbols:
    """Every size and stride a symbol, as in ``torch.compile(dynamic=True)``."""

    def __init__(self) -> None:
        self.shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shapes)

    def __call__(self, x: Tensor) -> Tensor:
        # No view: of a view its base is made as well, which takes most of the time.
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * x.dim())
        return self.mode.from_tensor(x, symbolic_context=sizes)


def way_to_trace(kind: str) -> tuple[contextlib.AbstractContextManager, Replace]:
    """The mode to enter, and the function that replaces each tensor before."""
    if kind == "meta":
        return contextlib.nullcontext(), on_meta
    if kind == "fake":
        numbers = FakeTensorMode()
        return numbers, numbers.from_tensor
    symbols = Symbols()
    return symbols.mode, symbols


def call_fake(op: str, args: tuple, options: dict, kind: str) -> object:
    mode, replace = way_to_trace(kind)

    def faked(x: object) -> object:
        return replace(x) if isinstance(x, Tensor) else x

    args, options = tuple(map(faked, args)), {n: faked(x) for n, x in options.items()}
    with mode:
        return getattr(claa_ops, op)(*args, **options)


def assert_refuses(op: str, arguments: dict, message: str, device: str) -> None:
    """The op refuses with this message, and each fake of it with the same to the letter."""
    arguments = on_device(arguments, device)
    with pytest.raises(RuntimeError, match=f"^{op}: {message}") as refusal:
        getattr(claa_ops, op)(**arguments)
    for kind in KINDS:
        with pytest.raises(RuntimeError) as of_fake:
            call_fake(op, (), arguments, kind)
        assert str(of_fake.value) == str(refusal.value), kind
