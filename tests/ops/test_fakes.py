"""A fake is the op without values: it refuses the same calls in the same words."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import claa_ops
from support.fakes import KINDS, Symbols, call_fake
from support.model_calls import MAKERS, Call, Maker

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
    """A call whose indices are all padding, so that none is out of range when others change."""
    call = make(2, 60, device, 0)

    def padding(x: object) -> object:
        is_index = isinstance(x, Tensor) and not x.is_floating_point()
        return torch.full_like(x, -1) if is_index else x

    options = {name: padding(x) for name, x in call.options.items()}
    return Call(call.op, tuple(map(padding, call.args)), options)


def tensors_instead(x: Tensor) -> dict[str, Tensor]:
    """Tensors of another dtype, rank, size or layout."""
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
    """What a caller may pass in place of one argument."""
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
    if outputs is None:
        return "it wrote into an argument"
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    return [(x.dtype, tuple(map(int, x.shape)), tuple(map(int, x.stride()))) for x in tensors]


@pytest.mark.parametrize("kind", KINDS)
@each_call
def test_a_fake_answers_as_the_op_does(make, kind, device):
    answers = set()
    for change, call in changed_calls(small_call(make, device)):
        if kind == "symbolic" and "torch." in change:
            continue  # dtypes are never symbolic
        expected = answer(partial(getattr(claa_ops, call.op), *call.args, **call.options))
        actual = answer(call_fake, call.op, call.args, call.options, kind)
        assert actual == expected, change
        answers.add(str(expected))
    assert len(answers) > 5  # most changes were refused, each for its own reason


@each_call
def test_a_fake_leaves_no_guard(make, device):
    """Nothing is recompiled, and no size excluded, for what the op checks itself."""
    call, symbols = small_call(make, device), Symbols()
    args = [symbols(x) if isinstance(x, Tensor) else x for x in call.args]
    options = {n: symbols(x) if isinstance(x, Tensor) else x for n, x in call.options.items()}
    with symbols.mode:
        getattr(claa_ops, call.op)(*args, **options)
    # PyTorch itself asks that the size N - W of a result is not negative.
    assert len(symbols.shapes.guards) <= call.op.startswith("score_")


def test_a_mix_of_devices_is_refused_where_there_is_one_device():
    with FakeTensorMode():
        query, key = torch.empty(1, 2, 3, 8, device="cuda"), torch.empty(1, 2, 9, 8)
        message = r"^score_tokens: key must be on the device of query \(cuda:0\), got cpu$"
        with pytest.raises(RuntimeError, match=message):
            claa_ops.score_tokens(query, key)


class Select(torch.nn.Module):
    """Selects as many tokens as it is asked for."""

    def forward(self, scores: Tensor, k: int | Tensor) -> Tensor:
        return claa_ops.select_topk(scores, k.item() if isinstance(k, Tensor) else k)


REFUSED = r"select_topk: k must be in \[0, M \+ window\] = \[0, 46\], got 500"


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_of_wrong_sizes_is_refused(strict):
    scores = torch.randn(2, 46)
    with pytest.raises(Exception, match=REFUSED):
        torch.export.export(Select(), (scores, 500), strict=strict)


def test_a_graph_of_wrong_sizes_is_refused():
    with pytest.raises(Exception, match=REFUSED):
        torch.compile(Select(), fullgraph=True, backend="eager")(torch.randn(2, 46), 500)


@pytest.mark.parametrize("length", [torch.export.Dim.AUTO, torch.export.Dim("length")])
def test_an_export_serves_every_length_and_refuses_the_others_when_it_runs(length):
    select = Select()
    program = torch.export.export(
        select, (torch.randn(2, 46), 20), dynamic_shapes={"scores": {1: length}, "k": None}
    ).module()
    for tokens in (20, 21, 300):
        scores = torch.randn(2, tokens)
        assert torch.equal(program(scores, 20), select(scores, 20))
    with pytest.raises(RuntimeError, match=r"^select_topk: k must be in .*\[0, 19\], got 20$"):
        program(torch.randn(2, 19), 20)


def test_an_export_takes_a_number_that_is_known_when_it_runs():
    scores, select = torch.randn(2, 46), Select()
    program = torch.export.export(select, (scores, torch.tensor(20))).module()
    for k in (0, 1, 7, 46):
        assert torch.equal(program(scores, torch.tensor(k)), select(scores, k))
    with pytest.raises(RuntimeError, match=REFUSED):
        program(scores, torch.tensor(500))
