"""A fake is what the op is, but for the values: it refuses the same calls in the same words."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

import claa_ops

from .fakes import KINDS, Symbols, call_fake
from .model_calls import MAKERS, Call, Maker

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]

# One call of each op for each set of arguments that it can be given.
CALLS = {
    (call.op, *call.options): make
    for make in (p.values[0] for p in MAKERS)
    for call in [make(2, 60, "cpu", 0)]
}
each_call = pytest.mark.parametrize(
    "make", [pytest.param(make, id="-".join(given)) for given, make in CALLS.items()]
)


def small_call(make: Maker, device: str) -> Call:
    """Its indices are all padding, so that none is out of range whatever else is changed."""
    call = make(2, 60, device, 0)

    def padding(x: object) -> object:
        is_index = isinstance(x, Tensor) and not x.is_floating_point()
        return torch.full_like(x, -1) if is_index else x

    options = {name: padding(x) for name, x in call.options.items()}
    return Call(call.op, tuple(map(padding, call.args)), options)


def tensors_instead(x: Tensor) -> dict[str, Tensor]:
    """Of another dtype, rank, size or layout."""
    instead = {str(dtype): x.to(dtype) for dtype in DTYPES}
    instead |= {"rank + 1": x[None], "rank - 1": x[0]}
    for dim, size in enumerate(x.shape):
        instead[f"size {dim} + 1"] = torch.cat([x, x.narrow(dim, 0, 1)], dim)
        instead[f"size {dim} = 0"] = x.narrow(dim, 0, 0)
        instead[f"size {dim} = 1"] = x.narrow(dim, 0, 1)
        instead[f"stride {dim} = 0"] = x.narrow(dim, 0, 1).expand_as(x)
        if size > 1:
            instead[f"every second of {dim}"] = x.repeat_interleave(2, dim)[
                tuple(slice(None, None, 2 if d == dim else 1) for d in range(x.dim()))
            ]
    if x.dim() > 1:
        instead["transposed"] = x.mT.contiguous().mT
    return instead


def others(x: object) -> dict[str, object]:
    """What a caller may give in place of one argument."""
    if isinstance(x, Tensor):
        return tensors_instead(x)
    if isinstance(x, float):
        return {str(value): value for value in (-0.25, 0.0, float("nan"))}
    if isinstance(x, int):
        return {str(value): value for value in (-3, -1, 0, 1, 2, 10**6)}
    return {}


def changed_calls(call: Call) -> Iterator[tuple[str, Call]]:
    yield "as it is", call
    for position, x in enumerate(call.args):
        for change, other in others(x).items():
            args = (*call.args[:position], other, *call.args[position + 1 :])
            yield f"argument {position}: {change}", call._replace(args=args)
    for name, x in call.options.items():
        for change, other in others(x).items():
            yield f"{name}: {change}", call._replace(options={**call.options, name: other})


def answer(run: Callable, *args: object) -> object:
    """Dtypes, sizes and strides of the result, or the refusal."""
    try:
        outputs = run(*args)
    except RuntimeError as error:
        return str(error)
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    return [(x.dtype, tuple(map(int, x.shape)), tuple(map(int, x.stride()))) for x in tensors]


@pytest.mark.parametrize("kind", KINDS)
@each_call
def test_a_fake_answers_as_the_op_does(make, kind, device):
    answers = set()
    for change, call in changed_calls(small_call(make, device)):
        if kind == "symbolic" and "torch." in change:
            continue  # dtypes are no symbols
        expected = answer(partial(getattr(claa_ops, call.op), *call.args, **call.options))
        actual = answer(call_fake, call.op, call.args, call.options, kind)
        assert actual == expected, change
        answers.add(str(expected))
    assert len(answers) > 5  # most changes were refused, each for its own reason


@each_call
def test_a_fake_leaves_no_guard(make, device):
    """No graph is made anew, and no size ruled out, for what the op checks itself."""
    call, symbols = small_call(make, device), Symbols()
    args = [symbols(x) if isinstance(x, Tensor) else x for x in call.args]
    options = {n: symbols(x) if isinstance(x, Tensor) else x for n, x in call.options.items()}
    with symbols.mode:
        getattr(claa_ops, call.op)(*args, **options)
    # PyTorch itself asks that the size N - W of a result is not negative.
    assert len(symbols.shapes.guards) <= call.op.startswith("score_")
