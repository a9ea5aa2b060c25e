"""How every op is registered: schema, fake shapes, gradients, one graph for all sizes."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import claa_ops
from support.model_calls import UPDATED


class Sample(NamedTuple):
    """How a person calls the op in Python, for a batch and a context of some size."""

    args: tuple
    options: dict = {}


def scoring(batch: int, context: int, device: str) -> tuple[Tensor, Tensor]:
    query = torch.randn(batch, 4, 8, 16, device=device)
    # As Hugging Face lays them out: [B, G, N, D] views of [B, N, G, D] memory.
    return query, torch.randn(batch, context + 8, 2, 16, device=device).transpose(1, 2)


def window_options(batch: int, context: int, device: str) -> dict:
    return {
        "scale": 0.25,
        "lse": torch.full((batch, 4, 8), 5.0, device=device),
        "start": torch.arange(batch, device=device),
        "sliding_window": context // 2,
        "softcap": 20.0,
        "sink_logits": torch.randn(4, device=device),
    }


def positions(*shape: int, total: int, device: str) -> Tensor:
    return torch.randint(-1, total, shape, device=device)


def score_window(b: int, m: int, device: str) -> list[Sample]:
    return [
        Sample(scoring(b, m, device)),
        Sample(scoring(b, m, device), window_options(b, m, device)),
    ]


def score_tokens(b: int, m: int, device: str) -> list[Sample]:
    return [
        Sample(scoring(b, m, device)),
        Sample(scoring(b, m, device), {"kernel_size": 5, "pool_mode": "max"}),
        Sample(scoring(b, m, device), window_options(b, m, device)),
    ]


def score_layer(b: int, m: int, device: str) -> list[Sample]:
    running = torch.rand(b, m, device=device)
    return [
        Sample((running, *scoring(b, m, device))),
        Sample((running, *scoring(b, m, device)), {"kernel_size": 5, "pool_mode": "max"}),
        Sample((running, *scoring(b, m, device)), window_options(b, m, device)),
    ]


def paged(b: int, m: int, device: str) -> tuple[Tensor, ...]:
    blocks = -(-(m + 8) // 16)
    query = torch.randn(b, 8, 4, 16, device=device)
    key_pages = torch.randn(b * blocks, 16, 2, 32, device=device)[..., :16]
    table = torch.arange(b * blocks, dtype=torch.int32, device=device).view(b, blocks)
    lengths = torch.full((b,), m + 8, dtype=torch.int32, device=device)
    return query, key_pages, table, lengths


def paged_options(b: int, device: str) -> dict:
    return {"scale": 0.25, "rows": torch.arange(b, dtype=torch.int32, device=device)}


def score_layer_paged(b: int, m: int, device: str) -> list[Sample]:
    running = torch.rand(b, m, device=device)
    options = {"kernel_size": 5, "pool_mode": "max", "softcap": 20.0}
    options["sink_logits"] = torch.randn(4, device=device)
    return [
        Sample((running, *paged(b, m, device))),
        Sample((running, *paged(b, m, device)), options | paged_options(b, device)),
    ]


def peak_attention_paged(b: int, m: int, device: str) -> list[Sample]:
    running = torch.rand(b, 8, m + 8, device=device)
    return [
        Sample((running, *paged(b, m, device))),
        Sample((running, *paged(b, m, device)), paged_options(b, device)),
    ]


def pool_heads(b: int, m: int, device: str) -> list[Sample]:
    scores = torch.rand(b, 6, m, device=device)
    return [Sample((scores, 2)), Sample((scores, 3), {"kernel_size": 3, "pool_mode": "max"})]


def aggregate_scores(b: int, m: int, device: str) -> list[Sample]:
    running, scores = torch.rand(b, m, device=device), torch.rand(b, 3, m, device=device)
    return [Sample((running, scores)), Sample((running, scores[:, 1]))]


def select_topk(b: int, m: int, device: str) -> list[Sample]:
    scores = torch.rand(b, 3, m, device=device)
    start = torch.arange(b, device=device)
    options = {"window": 8, "num_sinks": 2, "start": start, "int32": True}
    return [Sample((scores, m // 3)), Sample((scores, m // 2 + 8), options)]


def gather_kv(b: int, m: int, device: str) -> list[Sample]:
    key = torch.randn(b, m, 2, 16, device=device).transpose(1, 2)
    value = torch.randn(b, 2, m, 8, device=device, dtype=torch.bfloat16)
    trained = [x.detach().clone().requires_grad_() for x in (key, value)]
    return [
        Sample((key, value, positions(b, 2, m // 3, total=m, device=device))),
        Sample((*trained, positions(b, m // 2, total=m, device=device).int())),
    ]


def gather_tokens(b: int, m: int, device: str) -> list[Sample]:
    x = torch.randn(b, m, 16, device=device)
    return [
        Sample((x, positions(b, m // 3, total=m, device=device))),
        Sample((x[:1].clone().requires_grad_(), positions(b, m // 2, total=m, device=device))),
    ]


def peak_attention(b: int, m: int, device: str) -> list[Sample]:
    query, key = scoring(b, m, device)
    running = torch.rand(b, 8, m + 8, device=device)
    options = {"scale": 0.25, "running": running, "start": torch.arange(b, device=device)}
    return [Sample((query, key)), Sample((query, key), options)]


def rank_variance(b: int, m: int, device: str) -> list[Sample]:
    return [Sample((torch.rand(3, b, m, device=device), m // 3))]


def hop_tokens(b: int, m: int, device: str) -> list[Sample]:
    scores = torch.rand(b, m, device=device)
    states = torch.randn(b, m + 8, 2, 16, device=device).transpose(1, 2)
    start = torch.arange(b, device=device)
    options = {"hops": 2, "num_seeds": m // 3, "temperature": 0.5, "gap": 2, "kernel_size": 3}
    return [
        Sample((scores, states)),
        Sample((scores, states), options | {"pool_mode": "max", "start": start}),
    ]


def packed(b: int, m: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """A table of pages of four rows, and where the m // 3 tokens that each request keeps begin."""
    blocks = -(-m // 4)
    table = torch.arange(b * blocks, device=device).view(b, blocks)
    starts = torch.arange(b + 1, device=device) * (m // 3)
    kept = torch.arange(m // 3, device=device) * 3
    return table, starts, kept.repeat(b)


def select_topk_packed(b: int, m: int, device: str) -> list[Sample]:
    _, starts, index = packed(b, m, device)
    lengths = torch.full((b,), m, device=device)
    arguments = (index.int(), torch.rand(b, m, device=device), lengths, starts)
    return [Sample(arguments), Sample(arguments, {"window": 8, "num_sinks": 2})]


def gather_rows(b: int, m: int, device: str) -> list[Sample]:
    x, kept = torch.randn(m, 16, device=device), b * (m // 3)
    out = torch.zeros(kept, 16, device=device)
    return [Sample((out, x, positions(kept, total=m, device=device)))]


def store_pages(b: int, m: int, device: str) -> list[Sample]:
    pages, x = torch.zeros(b * m, 4, 16, device=device), torch.randn(m, 16, device=device)
    return [Sample((pages, x, torch.arange(m, device=device) * 4))]


def gather_pages(b: int, m: int, device: str) -> list[Sample]:
    table, starts, index = packed(b, m, device)
    out = torch.zeros(len(index), 16, device=device)
    pages = torch.randn(table.numel(), 4, 16, device=device)
    return [Sample((out, pages, table, starts, index))]


def kept_metadata(b: int, m: int, device: str) -> list[Sample]:
    table, _, _ = packed(b, m, device)
    lengths = torch.full((b,), m, device=device)
    seq_lens, slots = torch.zeros_like(lengths).int(), torch.zeros_like(lengths)
    return [Sample((seq_lens, slots, lengths + 1, lengths, lengths // 3, table, 4))]


def compact_pages(b: int, m: int, device: str) -> list[Sample]:
    table, starts, index = packed(b, m, device)
    key = torch.randn(table.numel(), 4, 2, 16, device=device)
    value = torch.randn(table.numel(), 4, 2, 24, device=device)
    return [
        Sample((key, value, table, starts, index)),
        Sample((key, value, table, starts, index.expand(2, -1).contiguous())),
    ]


SAMPLES: dict[str, Callable[[int, int, str], list[Sample]]] = {
    "aggregate_scores": aggregate_scores,
    "gather_kv": gather_kv,
    "gather_tokens": gather_tokens,
    "hop_tokens": hop_tokens,
    "peak_attention": peak_attention,
    "peak_attention_paged": peak_attention_paged,
    "pool_heads": pool_heads,
    "rank_variance": rank_variance,
    "score_layer": score_layer,
    "score_layer_paged": score_layer_paged,
    "score_tokens": score_tokens,
    "score_window": score_window,
    "select_topk": select_topk,
    "select_topk_packed": select_topk_packed,
    "gather_rows": gather_rows,
    "store_pages": store_pages,
    "gather_pages": gather_pages,
    "kept_metadata": kept_metadata,
    "compact_pages": compact_pages,
}
CASES = [
    pytest.param(op, number, id=f"{op}-{number}")
    for op, make in SAMPLES.items()
    for number in range(len(make(2, 30, "cpu")))
]


class Graphs:
    """A ``torch.compile`` backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        self.count += (
            1  # not before: Dynamo may abandon a trace and start again, for a float argument say
        )
        return compiled


def assert_equal(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def outputs(op: str, function: Callable, args: tuple, options: dict) -> tuple:
    """What it returns, and copies of the arguments that it writes to."""
    count = UPDATED.get(op, 0)
    updated = tuple(x.clone() for x in args[:count])
    return function(*updated, *args[count:], **options), updated


def test_every_public_op_has_samples():
    assert set(SAMPLES) == set(claa_ops.__all__)


@pytest.mark.parametrize(("op", "number"), CASES)
def test_opcheck(op, number, device):
    """Schema, fake shapes with symbolic sizes, autograd registration."""
    args, options = SAMPLES[op](2, 30, device)[number]
    options = dict(options)
    if "pool_mode" in options:  # in C++ it is a number
        options["pool_mode"] = ["avg", "max"].index(options.pop("pool_mode"))
    torch.library.opcheck(getattr(torch.ops.claa, op).default, args, options)


@pytest.mark.parametrize(("op", "number"), CASES)
def test_compiles_into_one_graph(op, number, device):
    """fullgraph: a graph break would raise."""
    function = getattr(claa_ops, op)
    args, options = SAMPLES[op](2, 30, device)[number]
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=graphs)
    assert_equal(outputs(op, compiled, args, options), outputs(op, function, args, options))
    assert graphs.count == 1


@pytest.mark.parametrize(("op", "number"), CASES)
def test_one_graph_serves_every_size(op, number, device):
    """Batch, context, k and the other integers are all symbolic: nothing is compiled again."""
    function = getattr(claa_ops, op)
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    # Sizes that are equal at first are assumed to be one size, so the first batch equals no other.
    for batch, context in ((5, 30), (3, 47), (2, 200), (4, 1001)):
        args, options = SAMPLES[op](batch, context, device)[number]
        assert_equal(outputs(op, compiled, args, options), outputs(op, function, args, options))
    assert graphs.count == 1


NO_SCORES = {"gather_kv", "gather_tokens", "select_topk"} | set(UPDATED) - {"score_layer"}
SCORES = sorted(set(claa_ops.__all__) - NO_SCORES)


def scoring_call(op: str, device: str) -> Sample:
    """A call whose arguments want gradients, except what the op updates in place."""
    args, options = SAMPLES[op](2, 30, device)[0]
    updated = args[:1] if op == "score_layer" else ()
    others = (
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) else x
        for x in args[len(updated) :]
    )
    return Sample((*updated, *others), options)


@pytest.mark.parametrize(
    ("op", "number"), [p.values for p in CASES if p.values[0] in ("gather_kv", "gather_tokens")]
)
def test_gradients_pass_through_the_gathers(op, number, device):
    args, options = SAMPLES[op](2, 30, device)[number]
    trained = any(x.requires_grad for x in args)
    outputs = getattr(claa_ops, op)(*args, **options)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        assert output.requires_grad == trained


@pytest.mark.parametrize("op", SCORES)
def test_a_backward_pass_through_a_score_is_an_error_that_says_what_to_do(op, device):
    args, _ = scoring_call(op, device)
    scores = getattr(claa_ops, op)(*args)
    beside = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    message = rf"^{op}: must not be differentiated, .*detach its arguments, or .*reference"
    with pytest.raises(RuntimeError, match=message):
        (scores.sum() + beside[0].sum()).backward()
    (scores.detach().sum() + beside[0].sum()).backward()  # detached, it is no error
    assert torch.equal(beside[0].grad, torch.ones_like(beside[0]))
    with torch.no_grad():
        assert not getattr(claa_ops, op)(*args).requires_grad


@pytest.mark.parametrize("op", sorted(set(SCORES) - {"rank_variance"}))
def test_the_reference_can_be_trained(op, device):
    """As the error says; only ranks have no gradient there either."""
    args, _ = scoring_call(op, device)
    getattr(claa_ops.reference, op)(*args).sum().backward()
    assert any(isinstance(x, Tensor) and x.is_leaf and x.grad is not None for x in args)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("op", SCORES)
def test_a_graph_serves_arguments_that_want_gradients(op, device):
    """A model that is compiled without ``no_grad``, and never asks for a gradient of its scores."""
    torch._dynamo.reset()
    args, _ = scoring_call(op, device)
    function = getattr(claa_ops, op)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*args).detach(), function(*args).detach())


def test_unknown_pool_modes_are_refused(device):
    """The ops take a pooling mode as a number; an unknown one is an error."""
    scores = torch.rand(1, 2, 9, device=device)
    with pytest.raises(RuntimeError, match="pool_heads: pool_mode must .*, got 2"):
        torch.ops.claa.pool_heads(scores, 1, pool_mode=2)
    query, key = scoring(1, 9, device)
    with pytest.raises(RuntimeError, match="score_tokens: pool_mode must .*, got -1"):
        torch.ops.claa.score_tokens(query, key, pool_mode=-1)
