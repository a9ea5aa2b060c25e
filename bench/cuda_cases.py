"""What is timed on a GPU: the ops with the shapes of Llama-3.1-8B, bfloat16, one prompt.

Each function yields functions that make a case, with new inputs on every call.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import claa_ops
from bench.cases import (
    LLAMA,
    PAGE_SIZES,
    Case,
    Shape,
    compaction,
    keys_of,
    packed_selection,
    paged_case,
    queries_of,
)
from bench.cases import OPS as PORTABLE

Make = Callable[[], Case]
BF16 = torch.bfloat16
WINDOW = 8
PEAK_QUERIES = 128


def score_tokens(shape: Shape) -> Iterator[Make]:
    """With and without the attention's logsumexp; eight prompts at once where they are long."""
    yield partial(_scoring, "score_tokens", shape, WINDOW, lse=True)
    yield partial(_scoring, "score_tokens", shape, WINDOW)
    yield partial(_scoring, "score_tokens", shape, 64, lse=True)
    yield partial(_scoring, "score_tokens", shape, 64)
    if shape.tokens >= 131_072:
        yield partial(_scoring, "score_tokens", shape, WINDOW, lse=True, batch=8)


def score_window(shape: Shape) -> Iterator[Make]:
    """The scores of each query head, not pooled."""
    yield partial(_scoring, "score_window", shape, WINDOW, lse=True)


def score_layer(shape: Shape) -> Iterator[Make]:
    """The scores that join a running maximum."""
    yield partial(_joining, shape)


def score_layer_paged(shape: Shape) -> Iterator[Make]:
    """The op for keys in rows, then keys in pages of 16 and 64; then several prompts at once."""
    yield partial(_joining, shape, lse=False)
    yield from _paging("score_layer_paged", shape, WINDOW)


def peak_attention_paged(shape: Shape) -> Iterator[Make]:
    """The same, for as many queries as Peak has and for more."""
    for window in (64, PEAK_QUERIES):
        yield partial(_peaks, shape, window)
        yield from _paging("peak_attention_paged", shape, window)


def _paging(op: str, shape: Shape, window: int) -> Iterator[Make]:
    for size in PAGE_SIZES:
        yield partial(paged_case, op, shape, BF16, [shape.tokens], window, size)
    # As many tokens in eight prompts, the longest five times as long as the shortest.
    lengths = [shape.tokens * (i % 5 + 1) // 20 for i in range(8)]
    yield partial(paged_case, op, shape, BF16, lengths, window, PAGE_SIZES[0])


def select_topk(shape: Shape) -> Iterator[Make]:
    """One row: the tokens of the later layers. Eight rows: what the cache of a layer keeps."""
    yield partial(_selection, shape, rows=1, percent=10)
    for percent in (10, 40):
        yield partial(_selection, shape, rows=LLAMA.kv_heads, percent=percent)
    if shape.tokens >= 131_072:
        yield partial(_selection, shape._replace(tokens=2**20), rows=1, percent=10)


def gather_kv(shape: Shape) -> Iterator[Make]:
    """A tenth of the tokens, different ones for each head."""
    yield partial(_gathering, shape)


def select_topk_packed(shape: Shape) -> Iterator[Make]:
    """Prompts of one length, as select_topk has rows; many, each half as long as the one before."""
    for prompts in (1, 8):
        yield partial(packed_selection, shape, [shape.tokens] * prompts)
    lengths = [max(1024, shape.tokens >> i % 8) for i in range(64)]
    yield partial(packed_selection, shape, lengths, "64 of any length")
    if shape.tokens >= 131_072:
        yield partial(packed_selection, shape._replace(tokens=2**20), [2**20])


def compact_pages(shape: Shape) -> Iterator[Make]:
    """A tenth of the tokens, in both layouts of vLLM."""
    for layout in ("pairs", "side by side"):
        yield partial(compaction, shape, BF16, layout)


def aggregate_scores(shape: Shape) -> Iterator[Make]:
    """Against one torch.maximum over all heads, which leaves their maximum to another kernel."""
    yield partial(_aggregation, shape)


def peak_attention(shape: Shape) -> Iterator[Make]:
    """Against FlashAttention-2's forward, which multiplies twice as much: by the values too."""
    yield partial(_peaks, shape)


def layer(tokens: int) -> dict[str, Callable[[], object]]:
    """The ops of a layer that is aggregated and whose cache is compressed, in their order.

    ``score_layer`` does the work of the first two.
    """
    shape = Shape(LLAMA, tokens, "cuda")
    query, key = _queries_and_keys(shape, WINDOW)
    lse = _logsumexp(shape, 1, WINDOW)
    running = torch.rand(1, shape.context, device=shape.device)
    scores = claa_ops.score_tokens(query, key, lse=lse)
    return {
        "score_tokens": lambda: claa_ops.score_tokens(query, key, lse=lse),
        "aggregate_scores": lambda: claa_ops.aggregate_scores(running, scores),
        "score_layer": lambda: claa_ops.score_layer(running, query, key, lse=lse),
        "select_topk": lambda: claa_ops.select_topk(scores, tokens // 10, window=WINDOW),
    }


def _scoring(op: str, shape: Shape, window: int, *, lse: bool = False, batch: int = 1) -> Case:
    query, key = _queries_and_keys(shape, window, batch)
    options = {"lse": _logsumexp(shape, batch, window)} if lse else {}
    heads = LLAMA.heads if op == "score_window" else LLAMA.kv_heads
    note = f"W {window}" + ", lse" * lse + f", B {batch}" * (batch > 1)
    outputs = 4 * batch * heads * (shape.tokens - window)
    flops = batch * _multiply_adds(shape, window)
    return Case(op, shape, BF16, (query, key), outputs, options, note, flops)


def _joining(shape: Shape, *, lse: bool = True) -> Case:
    case = _scoring("score_layer", shape, WINDOW, lse=lse)
    running = torch.rand(1, shape.context, device=shape.device)
    return replace(case, args=(running, *case.args), outputs=case.outputs + running.nbytes)


def _selection(shape: Shape, *, rows: int, percent: int) -> Case:
    scores = torch.rand(1, rows, shape.context, device=shape.device)
    k = shape.tokens * percent // 100

    def topk_and_sort() -> Tensor:
        return scores.topk(k - WINDOW, sorted=False).indices.sort().values

    note = f"{rows} row{'s' * (rows > 1)}, {percent} %"
    return Case(
        "select_topk",
        shape,
        torch.float32,
        (scores, k),
        8 * rows * k,
        {"window": WINDOW},
        note,
        0,
        topk_and_sort,
    )


def _gathering(shape: Shape) -> Case:
    key, value = (keys_of(LLAMA, BF16, shape.tokens, shape.device) for _ in range(2))
    index = _kept(shape, LLAMA.kv_heads)[None]
    outputs = 2 * index.numel() * LLAMA.dim * key.element_size()

    def torch_gather() -> tuple[Tensor, Tensor]:
        rows = index[..., None].expand(-1, -1, -1, LLAMA.dim)
        return key.gather(2, rows), value.gather(2, rows)

    return Case("gather_kv", shape, BF16, (key, value, index), outputs, {}, "10 %", 0, torch_gather)


def _aggregation(shape: Shape) -> Case:
    scores = torch.rand(1, LLAMA.kv_heads, shape.context, device=shape.device)
    running = torch.rand(1, shape.context, device=shape.device)
    running_heads = torch.rand_like(scores)
    return Case(
        "aggregate_scores",
        shape,
        torch.float32,
        (running, scores),
        running.nbytes,
        {},
        f"{LLAMA.kv_heads} heads",
        0,
        lambda: torch.maximum(running_heads, scores),
    )


def _peaks(shape: Shape, queries: int = PEAK_QUERIES) -> Case:
    query, key = _queries_and_keys(shape, queries)
    value = keys_of(LLAMA, BF16, shape.tokens, shape.device)

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    return Case(
        "peak_attention",
        shape,
        BF16,
        (query, key),
        4 * queries * shape.tokens,
        {},
        f"T {queries}",
        _multiply_adds(shape, queries),
        flash,
    )


def _queries_and_keys(shape: Shape, window: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    query = queries_of(LLAMA, BF16, shape.device, window=window, batch=batch)
    return query, keys_of(LLAMA, BF16, shape.tokens, shape.device, batch=batch)


def _logsumexp(shape: Shape, batch: int, window: int) -> Tensor:
    """Roughly the true value for these inputs; any value costs the same."""
    size = (batch, LLAMA.heads, window)
    return torch.full(size, 0.5, device=shape.device) + torch.tensor(shape.tokens).log().item()


def _multiply_adds(shape: Shape, window: int) -> int:
    return 2 * LLAMA.heads * window * shape.tokens * LLAMA.dim


def _kept(shape: Shape, rows: int) -> Tensor:
    scores = torch.rand(rows, shape.tokens, device=shape.device)
    return claa_ops.select_topk(scores, shape.tokens // 10)


def _portable(op: str) -> Callable[[Shape], Iterator[Make]]:
    """The one case that is also timed on the CPU."""
    return lambda shape: iter([lambda: next(PORTABLE[op](shape, BF16))])


OPS: dict[str, Callable[[Shape], Iterator[Make]]] = {
    "score_tokens": score_tokens,
    "score_window": score_window,
    "score_layer": score_layer,
    "score_layer_paged": score_layer_paged,
    "peak_attention": peak_attention,
    "peak_attention_paged": peak_attention_paged,
    "pool_heads": _portable("pool_heads"),
    "aggregate_scores": aggregate_scores,
    "select_topk": select_topk,
    "gather_kv": gather_kv,
    "gather_tokens": _portable("gather_tokens"),
    "rank_variance": _portable("rank_variance"),
    "hop_tokens": _portable("hop_tokens"),
    "select_topk_packed": select_topk_packed,
    "gather_rows": _portable("gather_rows"),
    "store_pages": _portable("store_pages"),
    "gather_pages": _portable("gather_pages"),
    "kept_metadata": _portable("kept_metadata"),
    "compact_pages": compact_pages,
}


def cases(op: str, tokens: tuple[int, ...]) -> Iterator[Make]:
    """All lines of an op."""
    for count in tokens:
        yield from OPS[op](Shape(LLAMA, count, "cuda"))
