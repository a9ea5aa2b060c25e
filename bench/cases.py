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
BLOCK = 16  # tokens of a page
REQUESTS = 256  # that decode at a time
MOVES_ROWS = {
    "gather_kv",
    "gather_tokens",
    "gather_rows",
    "gather_pages",
    "store_pages",
    "compact_pages",
}
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
    plain: Callable[[], object] | None = None  # eager, where the reference waits for the device

    @property
    def min_bytes(self) -> int:
        """Each input read once, each output written once; of rows that move only those."""
        if self.op in MOVES_ROWS:
            return 2 * self.outputs + self.args[-1].nbytes
        values = (*self.args, *self.options.values())
        return self.outputs + sum(x.nbytes for x in values if isinstance(x, Tensor))

    def ours(self) -> object:
        """Call the op."""
        return getattr(claa_ops, self.op)(*self.args, **self.options)

    def eager(self) -> object:
        """Call the plain PyTorch of the reference."""
        if self.plain is not None:
            return self.plain()
        return getattr(reference, self.op)(*self.args, **self.options)

    def compiled(self) -> Callable[[], object]:
        """Compile the reference for this shape alone: slower to compile, faster to run."""
        torch._dynamo.reset()  # after eight shapes Dynamo would run the rest in eager mode
        if self.plain is not None:
            return torch.compile(self.plain, dynamic=False)
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

    def plain() -> None:
        for r, length in enumerate(lengths):
            key = key_pages[table[r, : blocks[r]].long()].flatten(0, 1)[:length]
            own = query[r : r + 1].transpose(1, 2), key.transpose(0, 1)[None]
            if op == "score_layer_paged":
                reference.score_layer(running[r : r + 1, : length - window], *own)
            else:
                reference.peak_attention(*own, running=running[r : r + 1, :, :length])

    return Case(op, shape, dtype, args, outputs, note=note, flops=flops, plain=plain)


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


def select_topk_packed(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    for prompts in (1, 8):
        yield packed_selection(shape, [shape.tokens] * prompts)


def packed_selection(shape: Shape, lengths: list[int], note: str = "") -> Case:
    """Prompts of these lengths, of each a tenth; eager selects as if all were as long as any."""
    scores = torch.rand(len(lengths), max(lengths) - WINDOW, device=shape.device)
    counts = torch.tensor([0, *(length // KEEP for length in lengths)])
    starts = counts.cumsum(0).int().to(shape.device)
    index = torch.empty(int(counts.sum()), dtype=torch.int32, device=shape.device)
    arguments = (index, scores, torch.tensor(lengths).to(starts), starts)
    k = max(lengths) // KEEP

    def topk_and_sort() -> Tensor:
        return scores.topk(k - WINDOW, sorted=False).indices.sort().values

    return Case(
        "select_topk_packed",
        shape,
        torch.float32,
        arguments,
        index.nbytes,
        {"window": WINDOW},
        note or f"{len(lengths)} prompt{'s' * (len(lengths) > 1)}",
        builtin=topk_and_sort,
        plain=lambda: reference.select_topk(scores, k, window=WINDOW),
    )


def gather_rows(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    x = torch.rand((shape.tokens, shape.model.hidden), dtype=dtype, device=shape.device)
    index = kept_positions(shape, 1)[0]
    out = torch.empty(len(index), shape.model.hidden, dtype=dtype, device=shape.device)
    arguments = (out, x, index)

    def index_select() -> Tensor:
        return torch.index_select(x, 0, index, out=out)

    yield Case("gather_rows", shape, dtype, arguments, out.nbytes, builtin=index_select)


def store_pages(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """The hidden states of a prompt, all of them."""
    pages, table = _pages(shape, dtype, shape.model.hidden)
    x = torch.rand((shape.tokens, shape.model.hidden), dtype=dtype, device=shape.device)
    slots = (table[0].long()[:, None] * BLOCK + torch.arange(BLOCK).to(table)).flatten()

    def index_copy() -> Tensor:
        return pages.flatten(0, 1).index_copy_(0, slots, x)

    yield Case(
        "store_pages",
        shape,
        dtype,
        (pages, x, slots),
        x.nbytes,
        builtin=index_copy,
        plain=lambda: pages.index_put_((slots // BLOCK, slots % BLOCK), x),
    )


def gather_pages(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    pages, table = _pages(shape, dtype, shape.model.hidden)
    index = kept_positions(shape, 1)[0].int()
    out = torch.empty(len(index), shape.model.hidden, dtype=dtype, device=shape.device)
    starts = torch.tensor([0, len(index)], dtype=torch.int32, device=shape.device)
    arguments = (out, pages, table, starts, index)

    def indexed() -> Tensor:
        return out.copy_(pages[table[0, index // BLOCK].long(), index % BLOCK])

    yield Case("gather_pages", shape, dtype, arguments, out.nbytes, plain=indexed)


def kept_metadata(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    prompts = torch.full((REQUESTS,), shape.tokens, dtype=torch.int32, device=shape.device)
    blocks = shape.tokens // KEEP // BLOCK + 2
    table = torch.arange(REQUESTS * blocks, dtype=torch.int32, device=shape.device)
    seq_lens, slots = torch.empty_like(prompts), torch.empty_like(prompts, dtype=torch.int64)
    inputs = (prompts + 7, prompts, prompts // KEEP)
    entry = (inputs[0] - inputs[1] + inputs[2])[:, None]

    def indexed() -> Tensor:
        seq_lens.copy_((inputs[0] - inputs[1] + inputs[2]) * (inputs[0] > 0))
        page = table.view(REQUESTS, blocks).gather(1, (entry - 1).long() // BLOCK)[:, 0]
        return slots.copy_(page * BLOCK + (entry[:, 0] - 1) % BLOCK)

    yield Case(
        "kept_metadata",
        shape,
        torch.float32,
        (seq_lens, slots, *inputs, table.view(REQUESTS, blocks), BLOCK),
        seq_lens.nbytes + slots.nbytes,
        note=f"{REQUESTS} requests",
        plain=indexed,
    )


def compact_pages(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    yield compaction(shape, dtype, "pairs")
    yield compaction(shape, dtype, "side by side")


def compaction(shape: Shape, dtype: torch.dtype, layout: str) -> Case:
    """A tenth of a prompt: pages of keys beside pages of values, or each key beside its value."""
    model = shape.model
    if layout == "pairs":
        pages, table = _pages(shape, dtype, 2 * model.kv_heads * model.dim)
        pairs = pages.view(-1, 2, BLOCK, model.kv_heads, model.dim)
        key, value = pairs.unbind(1)
    else:
        pages, table = _pages(shape, dtype, 2 * model.kv_heads * model.dim)
        heads = pages.view(-1, model.kv_heads, BLOCK, 2 * model.dim)
        key, value = heads.transpose(1, 2).chunk(2, dim=-1)
    index = kept_positions(shape, 1)[0].int()
    starts = torch.tensor([0, len(index)], dtype=torch.int32, device=shape.device)
    entry, row = torch.arange(len(index)).to(index), table[0]

    def indexed() -> None:
        for x in (key, value):
            kept = x[row[index // BLOCK].long(), index % BLOCK]
            x[row[entry // BLOCK].long(), entry % BLOCK] = kept

    return Case(
        "compact_pages",
        shape,
        dtype,
        (key, value, table, starts, index),
        2 * len(index) * model.kv_heads * model.dim * key.element_size(),
        note=layout,
        plain=indexed,
    )


def _pages(shape: Shape, dtype: torch.dtype, channels: int) -> tuple[Tensor, Tensor]:
    """Pages of a prompt in any order, and their table."""
    blocks = shape.tokens // BLOCK
    pages = torch.empty(blocks, BLOCK, channels, dtype=dtype, device=shape.device).normal_()
    return pages, torch.randperm(blocks).int().to(shape.device)[None]


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
    "select_topk_packed": select_topk_packed,
    "gather_rows": gather_rows,
    "store_pages": store_pages,
    "gather_pages": gather_pages,
    "kept_metadata": kept_metadata,
    "compact_pages": compact_pages,
}
MOVES_MODEL_DTYPE = {
    "score_tokens",
    "score_window",
    "score_layer",
    "score_layer_paged",
    "peak_attention",
    "peak_attention_paged",
    "hop_tokens",
} | MOVES_ROWS


def cases(op: str, device: str, tokens: tuple[int, ...]) -> Iterator[Case]:
    """All lines of an op; scores are float32 in a model of any dtype."""
    dtypes = [torch.float32, torch.bfloat16] if op in MOVES_MODEL_DTYPE else [torch.float32]
    for dtype in dtypes:
        for model in (SMOLLM2, LLAMA):
            for count in tokens:
                yield from OPS[op](Shape(model, count, device), dtype)
