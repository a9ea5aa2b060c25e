"""What is timed: one function per op, each yielding a line of the table per shape and dtype.

Shapes are those of one prompt in SmolLM2-135M and Llama-3.1-8B, a window of 8 queries, a tenth
of the tokens kept. Keys and queries are [B, H, N, D] views of [B, N, H, D] memory, as Hugging
Face lays them out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

import claa_ops
from claa_ops import reference


class Model(NamedTuple):
    """The sizes of a decoder that an op sees."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    hidden: int


SMOLLM2 = Model("SmolLM2-135M", heads=9, kv_heads=3, dim=64, hidden=576)
LLAMA = Model("Llama-3.1-8B", heads=32, kv_heads=8, dim=128, hidden=4096)
WINDOW = 8
HOPS, SEEDS = 4, 64  # of hop_tokens: its defaults
LAYERS = 8  # layers that rank_variance compares
KEEP = 10  # one token in ten
PAGE_SIZES = (16, 64)  # tokens of a page


class Shape(NamedTuple):
    """One prompt in one model."""

    model: Model
    tokens: int
    device: str

    def __str__(self) -> str:
        return f"{self.model.name} {self.tokens // 1024}k"

    @property
    def context(self) -> int:
        """How many tokens have a score."""
        return self.tokens - WINDOW


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    op: str
    shape: Shape
    dtype: torch.dtype
    args: tuple
    outputs: int  # bytes written
    options: dict = field(default_factory=dict)
    note: str = ""
    flops: int = 0  # of one pass over the keys, for the ops that multiply
    builtin: Callable[[], object] | None = None  # torch's own kernels for it, if any

    @property
    def min_bytes(self) -> int:
        """Each input read once, each output written once; for a gather only the kept rows."""
        if self.op.startswith("gather"):
            return 2 * self.outputs + self.args[-1].nbytes
        values = (*self.args, *self.options.values())
        return self.outputs + sum(x.nbytes for x in values if isinstance(x, Tensor))

    def ours(self) -> object:
        """Call the op."""
        return getattr(claa_ops, self.op)(*self.args, **self.options)

    def eager(self) -> object:
        """Call the plain PyTorch of the reference."""
        return getattr(reference, self.op)(*self.args, **self.options)

    def compiled(self) -> Callable[[], object]:
        """Compile the reference for this shape alone: slower to compile, faster to run."""
        torch._dynamo.reset()  # after eight shapes Dynamo would run the rest in eager mode
        function = torch.compile(getattr(reference, self.op), dynamic=False)
        return lambda: function(*self.args, **self.options)


def keys_of(
    model: Model, dtype: torch.dtype, tokens: int, device: str = "cpu", *, batch: int = 1
) -> Tensor:
    memory = torch.empty(batch, tokens, model.kv_heads, model.dim, dtype=dtype, device=device)
    return memory.normal_().transpose(1, 2)


def queries_of(
    model: Model, dtype: torch.dtype, device: str = "cpu", *, window: int = WINDOW, batch: int = 1
) -> Tensor:
    memory = torch.empty(batch, window, model.heads, model.dim, dtype=dtype, device=device)
    return memory.normal_().transpose(1, 2)


def kept_positions(shape: Shape, rows: int) -> Tensor:
    """Positions as a selection returns them: ascending, some adjacent and some far apart."""
    scores = torch.rand(rows, shape.tokens, device=shape.device)
    return claa_ops.select_topk(scores, shape.tokens // KEEP, window=0)


def score_window(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    query, key, flops = _scoring(shape, dtype)
    outputs = 4 * shape.model.heads * shape.context
    yield Case("score_window", shape, dtype, (query, key), outputs, flops=flops)


def score_tokens(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    query, key, flops = _scoring(shape, dtype)
    outputs = 4 * shape.model.kv_heads * shape.context
    yield Case("score_tokens", shape, dtype, (query, key), outputs, flops=flops)
    if shape.model is LLAMA:
        # Roughly the true value for these inputs; any value costs the same.
        lse = torch.full((1, shape.model.heads, WINDOW), 0.5, device=shape.device)
        options = {"lse": lse + torch.tensor(float(shape.tokens)).log()}
        given = Case("score_tokens", shape, dtype, (query, key), outputs, options, flops=flops)
        yield replace(given, note="lse given")


def score_layer(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    query, key, flops = _scoring(shape, dtype)
    running = torch.rand(1, shape.context, device=shape.device)
    outputs = 4 * (shape.model.kv_heads + 1) * shape.context
    yield Case("score_layer", shape, dtype, (running, query, key), outputs, flops=flops)


def peak_attention(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    query, key, flops = _scoring(shape, dtype)
    outputs = 4 * WINDOW * shape.tokens
    yield Case("peak_attention", shape, dtype, (query, key), outputs, flops=flops)


def score_layer_paged(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    for size in PAGE_SIZES:
        yield paged_case("score_layer_paged", shape, dtype, [shape.tokens], WINDOW, size)


def peak_attention_paged(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    for size in PAGE_SIZES:
        yield paged_case("peak_attention_paged", shape, dtype, [shape.tokens], WINDOW, size)


def paged_case(
    op: str, shape: Shape, dtype: torch.dtype, lengths: Sequence[int], window: int, size: int
) -> Case:
    """Prompts of these lengths, in pages of so many tokens that lie in a random order."""
    model, device, prompts = shape.model, shape.device, len(lengths)
    blocks = [-(-length // size) for length in lengths]
    key_pages = torch.empty(
        sum(blocks), size, model.kv_heads, model.dim, dtype=dtype, device=device
    )
    order = torch.randperm(sum(blocks)).int().split(blocks)
    table = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True).to(device)
    query = queries_of(model, dtype, device, window=window, batch=prompts).transpose(1, 2)
    longest, tokens = max(lengths), sum(lengths)
    if op == "score_layer_paged":
        running = torch.zeros(prompts, longest - window, device=device)
        outputs = 4 * (tokens - prompts * window)
    else:
        running = torch.zeros(prompts, window, longest, device=device)
        outputs = 4 * window * tokens
    number = torch.tensor(lengths, dtype=torch.int32, device=device)
    args = (running, query, key_pages.normal_(), table, number)
    note = f"W {window}, pages of {size}" + f", {prompts} prompts" * (prompts > 1)
    flops = 2 * model.heads * window * tokens * model.dim
    return Case(op, shape, dtype, args, outputs, note=note, flops=flops)


def pool_heads(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    scores = torch.rand(1, shape.model.heads, shape.context, device=shape.device)
    outputs = 4 * shape.model.kv_heads * shape.context
    yield Case("pool_heads", shape, torch.float32, (scores, shape.model.kv_heads), outputs)


def aggregate_scores(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    running = torch.rand(1, shape.context, device=shape.device)
    scores = torch.rand(1, shape.model.kv_heads, shape.context, device=shape.device)
    yield Case("aggregate_scores", shape, torch.float32, (running, scores), running.nbytes)


def select_topk(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    for rows in (1, shape.model.kv_heads):  # token propagation, then the KV cache
        scores = torch.rand(1, rows, shape.context, device=shape.device)
        k = shape.tokens // KEEP

        def topk_and_sort(scores: Tensor = scores, k: int = k) -> Tensor:
            return scores.topk(k - WINDOW, sorted=False).indices.sort().values

        yield Case(
            "select_topk",
            shape,
            torch.float32,
            (scores, k),
            8 * rows * k,
            {"window": WINDOW},
            f"{rows} row{'s' * (rows > 1)}",
            builtin=topk_and_sort,
        )


def gather_kv(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    model = shape.model
    key, value = (keys_of(model, dtype, shape.tokens, shape.device) for _ in range(2))
    index = kept_positions(shape, model.kv_heads)[None]
    outputs = 2 * index.numel() * model.dim * key.element_size()

    def torch_gather() -> tuple[Tensor, Tensor]:
        rows = index[..., None].expand(-1, -1, -1, model.dim)
        return key.gather(2, rows), value.gather(2, rows)

    yield Case("gather_kv", shape, dtype, (key, value, index), outputs, builtin=torch_gather)


def gather_tokens(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    size = (1, shape.tokens, shape.model.hidden)
    x = torch.rand(size, dtype=dtype, device=shape.device)
    index = kept_positions(shape, 1)
    outputs = index.numel() * shape.model.hidden * x.element_size()

    def torch_gather() -> Tensor:
        return x.gather(1, index[..., None].expand(-1, -1, shape.model.hidden))

    yield Case("gather_tokens", shape, dtype, (x, index), outputs, builtin=torch_gather)


def rank_variance(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    scores = torch.rand(LAYERS, 1, shape.context, device=shape.device)
    arguments = (scores, shape.tokens // KEEP)
    yield Case("rank_variance", shape, torch.float32, arguments, 4, note=f"{LAYERS} layers")


def hop_tokens(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """The values of a layer; each hop multiplies them with its seeds."""
    scores = torch.rand(1, shape.context, device=shape.device)
    states = keys_of(shape.model, dtype, shape.tokens, shape.device)
    outputs = 4 * HOPS * shape.context
    flops = 2 * HOPS * SEEDS * states.numel()
    arguments, note = (scores, states), f"{HOPS} hops"
    yield Case("hop_tokens", shape, dtype, arguments, outputs, note=note, flops=flops)


def _scoring(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    model = shape.model
    query = queries_of(model, dtype, shape.device)
    key = keys_of(model, dtype, shape.tokens, shape.device)
    return query, key, 2 * model.heads * WINDOW * shape.tokens * model.dim


OPS: dict[str, Callable[[Shape, torch.dtype], Iterator[Case]]] = {
    "score_tokens": score_tokens,
    "score_window": score_window,
    "score_layer": score_layer,
    "score_layer_paged": score_layer_paged,
    "peak_attention": peak_attention,
    "peak_attention_paged": peak_attention_paged,
    "pool_heads": pool_heads,
    "aggregate_scores": aggregate_scores,
    "select_topk": select_topk,
    "gather_kv": gather_kv,
    "gather_tokens": gather_tokens,
    "rank_variance": rank_variance,
    "hop_tokens": hop_tokens,
}
MOVES_MODEL_DTYPE = {
    "score_tokens",
    "score_window",
    "score_layer",
    "score_layer_paged",
    "peak_attention",
    "peak_attention_paged",
    "gather_kv",
    "gather_tokens",
    "hop_tokens",
}


def cases(op: str, device: str, tokens: tuple[int, ...]) -> Iterator[Case]:
    """All lines of an op; scores are float32 in a model of any dtype."""
    dtypes = [torch.float32, torch.bfloat16] if op in MOVES_MODEL_DTYPE else [torch.float32]
    for dtype in dtypes:
        for model in (SMOLLM2, LLAMA):
            for count in tokens:
                yield from OPS[op](Shape(model, count, device), dtype)
