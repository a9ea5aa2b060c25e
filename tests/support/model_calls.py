"""Each op as the layers of a model call it, for any batch, context and seed.

The CUDA tests repeat these calls, capture them, run them concurrently and under compute-sanitizer.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import claa_ops

HEADS, KV_HEADS = 8, 2


# How many of its first arguments an op writes to.
UPDATED = {
    "score_layer": 1,
    "score_layer_paged": 1,
    "peak_attention_paged": 1,
    "select_topk_packed": 1,
    "gather_rows": 1,
    "store_pages": 1,
    "gather_pages": 1,
    "kept_metadata": 2,
    "compact_pages": 2,
}
# Ops whose requests lie one after the other: no dimension is the batch.
PACKED = {
    "select_topk_packed",
    "gather_rows",
    "store_pages",
    "gather_pages",
    "kept_metadata",
    "compact_pages",
}


class Call(NamedTuple):
    """An op with its arguments."""

    op: str
    args: tuple
    options: dict = {}

    def __call__(self) -> tuple[Tensor, ...]:
        """The outputs of the op, always as a tuple, then what it updates: copies of arguments."""
        count = UPDATED.get(self.op, 0)
        updated = tuple(x.clone() for x in self.args[:count])
        out = getattr(claa_ops, self.op)(*updated, *self.args[count:], **self.options)
        if out is None:
            return updated
        return (*out, *updated) if isinstance(out, tuple) else (out, *updated)

    def tensors(self) -> list[Tensor]:
        return [x for x in (*self.args, *self.options.values()) if isinstance(x, Tensor)]


Maker = Callable[[int, int, str, int], Call]  # batch, context, device, seed


def normal(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, drawn on the device: a long prompt has many keys."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def queries_and_keys(
    batch: int, window: int, total: int, dim: int, *, device: str, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    """As Hugging Face has them: [B, H, N, D] views of [B, N, H, D] memory."""
    query = normal(batch, window, HEADS, dim, device=device, dtype=dtype, seed=2 * seed)
    key = normal(batch, total, KV_HEADS, dim, device=device, dtype=dtype, seed=2 * seed + 1)
    return query.transpose(1, 2), key.transpose(1, 2)


def _scores(op: str, window: int, dim: int, dtype: torch.dtype, *given: str, **options) -> Maker:
    def make(batch: int, context: int, device: str, seed: int) -> Call:
        sizes = (batch, window, context + window, dim)
        query, key = queries_and_keys(*sizes, device=device, dtype=dtype, seed=seed)
        tensors = {}
        if "lse" in given:  # about the true value
            tensors["lse"] = normal(batch, HEADS, window, device=device, seed=seed) / 10 + 8
        if "start" in given:
            tensors["start"] = torch.arange(batch, device=device) * context // (2 * batch)
        if "sink_logits" in given:
            tensors["sink_logits"] = normal(HEADS, device=device, seed=seed)
        return Call(op, (query, key), options | tensors)

    return make


def _layer(*scoring) -> Maker:
    make_scores = _scores("score_layer", 8, 128, *scoring)

    def make(batch: int, context: int, device: str, seed: int) -> Call:
        call = make_scores(batch, context, device, seed)
        # Below every score, so that a repetition ends as it did the first time.
        running = torch.full((batch, context), -1.0, device=device)
        return call._replace(args=(running, *call.args))

    return make


def _peak(window: int, *given: str) -> Maker:
    def make(batch: int, context: int, device: str, seed: int) -> Call:
        sizes = (batch, window, context, 128)
        query, key = queries_and_keys(*sizes, device=device, dtype=torch.bfloat16, seed=seed)
        options = {}
        if "running" in given:
            running = normal(batch, window, context, device=device, seed=seed)
            options["running"] = running.sigmoid() / 100
        return Call("peak_attention", (query, key), options)

    return make


def _paged(op: str, window: int, dim: int, dtype: torch.dtype, *given: str, **options) -> Maker:
    """Prompts of several lengths in pages of 16 tokens, keys and values of a token side by side."""

    def make(batch: int, context: int, device: str, seed: int) -> Call:
        room = context if op == "score_layer_paged" else context + window
        rows = (batch, room) if op == "score_layer_paged" else (batch, window, room)
        running = torch.full(rows, -1.0, device=device)  # below every score
        query = normal(batch, window, HEADS, dim, device=device, dtype=dtype, seed=2 * seed)
        blocks = -(-(context + window) // 16)
        memory = normal(
            batch * blocks, 16, KV_HEADS, 2 * dim, device=device, dtype=dtype, seed=seed + 1
        )
        key_pages = memory[..., :dim]
        order = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(seed))
        table = order.int().view(batch, blocks).to(device)
        shares = (torch.arange(batch) + seed) % batch  # one is left out, one has all
        lengths = (context + window) * shares // max(1, batch - 1)
        tensors = {}
        if "e4m3" in given:
            key_pages = key_pages.to(torch.float8_e4m3fn)
            tensors["k_scale"] = torch.full((1,), 0.5, device=device)
        if "sink_logits" in given:
            tensors["sink_logits"] = normal(HEADS, device=device, seed=seed)
        return Call(
            op, (running, query, key_pages, table, lengths.int().to(device)), options | tensors
        )

    return make


def _pool(pool_mode: str) -> Maker:
    def make(batch: int, context: int, device: str, seed: int) -> Call:
        scores = normal(batch, HEADS, context, device=device, seed=seed)
        return Call("pool_heads", (scores, KV_HEADS), {"pool_mode": pool_mode})

    return make


def _aggregate(batch: int, context: int, device: str, seed: int) -> Call:
    running = normal(batch, context, device=device, seed=seed)
    return Call(
        "aggregate_scores",
        (running, normal(batch, KV_HEADS, context, device=device, seed=seed + 1)),
    )


def _select(heads: int | None, per: int, padded: bool = False) -> Maker:
    def make(batch: int, context: int, device: str, seed: int) -> Call:
        shape = (batch, context) if heads is None else (batch, heads, context)
        # Two decimals: ties, which go to the lower position.
        scores = normal(*shape, device=device, seed=seed).round(decimals=2)
        options = {"window": 8, "num_sinks": 4}
        if padded:
            start = torch.arange(batch, device=device) * context // (2 * batch)
            options |= {"start": start, "counts": (context - start) // per + 8}
        return Call("select_topk", (scores, context // per + 8), options)

    return make


def _positions(*shape: int, total: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, total, shape, generator=generator).to(device)


def _gather_kv(batch: int, context: int, device: str, seed: int) -> Call:
    memory = (batch, context, KV_HEADS, 128)
    key, value = (
        normal(*memory, device=device, dtype=torch.bfloat16, seed=seed + i).transpose(1, 2)
        for i in range(2)
    )
    kept = (batch, KV_HEADS, context // 10)
    return Call(
        "gather_kv", (key, value, _positions(*kept, total=context, device=device, seed=seed))
    )


def _gather_tokens(batch: int, context: int, device: str, seed: int) -> Call:
    x = normal(batch, context, 64, device=device, dtype=torch.bfloat16, seed=seed)
    kept = _positions(batch, context // 10, total=context, device=device, seed=seed)
    return Call("gather_tokens", (x, kept))


def _rank(batch: int, context: int, device: str, seed: int) -> Call:
    scores = normal(3, batch, context, device=device, seed=seed)
    return Call("rank_variance", (scores, context // 10))


def _hop(pieces: int, dim: int, dtype: torch.dtype, *given: str) -> Maker:
    def make(batch: int, context: int, device: str, seed: int) -> Call:
        scores = normal(batch, context, device=device, seed=seed)
        memory = (batch, context + 8, pieces, dim)
        states = normal(*memory, device=device, dtype=dtype, seed=seed + 1).transpose(1, 2)
        options = {}
        if "start" in given:
            options["start"] = torch.arange(batch, device=device) * context // (2 * batch)
        return Call("hop_tokens", (scores, states), options)

    return make


def _packed(batch: int, context: int, device: str) -> tuple[Tensor, Tensor, int]:
    """Lengths of prompts up to ``context``, where a tenth of each begins, and capacity."""
    lengths = [context - b * context // (2 * batch) for b in range(batch)]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length // 10)
    return (
        torch.tensor(lengths, dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        starts[-1] + 5,
    )


def _ascending(lengths: Tensor, starts: Tensor, capacity: int, seed: int) -> Tensor:
    """Some positions of each prompt, then padding."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.full((capacity,), -1, dtype=torch.int32)
    limits = starts.tolist()
    for r, length in enumerate(lengths.tolist()):
        kept = torch.randperm(length, generator=generator)[: limits[r + 1] - limits[r]]
        index[limits[r] : limits[r + 1]] = kept.sort().values
    return index.to(lengths.device)


def _block_table(batch: int, context: int, block: int, device: str, seed: int) -> Tensor:
    """The pages of each request, in any order; page 0 is nobody's."""
    blocks = -(-context // block)
    pages = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(seed)) + 1
    return pages.view(batch, blocks).to(device, torch.int32)


def _select_packed(batch: int, context: int, device: str, seed: int) -> Call:
    lengths, starts, capacity = _packed(batch, context + 8, device)
    index = torch.zeros(capacity, dtype=torch.int32, device=device)
    scores = normal(batch, context, device=device, seed=seed).round(decimals=2)
    options = {"window": 8, "num_sinks": 4}
    return Call("select_topk_packed", (index, scores, lengths, starts), options)


def _gather_rows(batch: int, context: int, device: str, seed: int) -> Call:
    x = normal(context, 64, device=device, dtype=torch.bfloat16, seed=seed)
    index = _positions(context // 10, total=context, device=device, seed=seed)
    return Call("gather_rows", (torch.zeros_like(x[: context // 10]), x, index))


def _store_pages(batch: int, context: int, device: str, seed: int) -> Call:
    blocks = context // 16 + 1
    x = normal(context, 64, device=device, dtype=torch.bfloat16, seed=seed)
    pages = torch.zeros(blocks, 16, 64, device=device, dtype=torch.bfloat16)
    slots = torch.randperm(blocks * 16, generator=torch.Generator().manual_seed(seed))[:context]
    slots[::7] = -1
    return Call("store_pages", (pages, x, slots.to(device)))


def _gather_pages(batch: int, context: int, device: str, seed: int) -> Call:
    lengths, starts, capacity = _packed(batch, context, device)
    table = _block_table(batch, context, 16, device, seed)
    pages = normal(table.numel() + 1, 16, 64, device=device, dtype=torch.bfloat16, seed=seed)
    out = torch.zeros(capacity, 64, device=device, dtype=torch.bfloat16)
    index = _ascending(lengths, starts, capacity, seed)
    return Call("gather_pages", (out, pages, table, starts, index))


def _kept_metadata(batch: int, context: int, device: str, seed: int) -> Call:
    prompts = torch.arange(1, batch + 1, device=device, dtype=torch.int32) * context // batch
    kept = prompts // 10 + 1
    logical = prompts + seed + 2
    logical[1::3] = 0  # padding
    seq_lens, slots = torch.zeros_like(prompts), torch.zeros(2 * batch, device=device).long()
    table = _block_table(batch, context // 10 + 20, 16, device, seed)
    return Call("kept_metadata", (seq_lens, slots, logical, prompts, kept, table, 16))


def _compact(layout: str) -> Maker:
    def make(batch: int, context: int, device: str, seed: int) -> Call:
        lengths, starts, capacity = _packed(batch, context, device)
        table = _block_table(batch, context, 16, device, seed)
        blocks = table.numel() + 1
        index = _ascending(lengths, starts, capacity, seed)
        if layout == "pairs":  # pages of keys, then of values
            memory = (blocks, 2, 16, KV_HEADS, 64)
            pages = normal(*memory, device=device, dtype=torch.bfloat16, seed=seed)
            key, value = pages.unbind(1)
        else:  # a key and its value side by side, heads outside; other tokens for each head
            memory = (blocks, KV_HEADS, 16, 2 * 64)
            pages = normal(*memory, device=device, dtype=torch.bfloat16, seed=seed)
            key, value = pages.transpose(1, 2).chunk(2, dim=-1)
            others = (_ascending(lengths, starts, capacity, seed + 1 + g) for g in range(KV_HEADS))
            index = torch.stack(list(others))
        return Call("compact_pages", (key, value, table, starts, index))

    return make


_BF16, _F32 = torch.bfloat16, torch.float32
_MAKERS: dict[str, Maker] = {
    "score_window": _scores("score_window", 8, 128, _BF16),
    "score_window-lse": _scores("score_window", 8, 128, _BF16, "lse"),
    "score_window-float32": _scores("score_window", 8, 128, _F32),
    "score_tokens": _scores("score_tokens", 8, 128, _BF16),
    "score_tokens-lse": _scores("score_tokens", 8, 128, _BF16, "lse"),
    "score_tokens-w64": _scores("score_tokens", 64, 128, _BF16),
    "score_tokens-w64-lse": _scores("score_tokens", 64, 128, _BF16, "lse"),
    "score_tokens-max": _scores("score_tokens", 8, 64, torch.float16, "lse", pool_mode="max"),
    "score_tokens-any-dim": _scores("score_tokens", 5, 80, _BF16, "start"),
    "score_tokens-options": _scores(
        "score_tokens", 8, 128, _BF16, "start", "sink_logits", sliding_window=300, softcap=20.0
    ),
    "score_layer": _layer(_BF16),
    "score_layer-lse": _layer(_BF16, "lse"),
    "score_layer-float32": _layer(_F32, "start"),
    "score_layer_paged": _paged("score_layer_paged", 8, 128, _BF16),
    "score_layer_paged-w64": _paged("score_layer_paged", 64, 128, _BF16),
    "score_layer_paged-e4m3": _paged("score_layer_paged", 8, 64, torch.float16, "e4m3"),
    "score_layer_paged-options": _paged(
        "score_layer_paged", 8, 128, _F32, "sink_logits", softcap=20.0, pool_mode="max"
    ),
    "peak_attention": _peak(128),
    "peak_attention-running": _peak(8, "running"),
    "peak_attention_paged": _paged("peak_attention_paged", 128, 128, _BF16),
    "peak_attention_paged-e4m3": _paged("peak_attention_paged", 8, 128, _BF16, "e4m3"),
    "peak_attention_paged-float32": _paged("peak_attention_paged", 8, 40, _F32, scale=0.2),
    "pool_heads": _pool("avg"),
    "pool_heads-max": _pool("max"),
    "aggregate_scores": _aggregate,
    "select_topk": _select(None, 10),
    "select_topk-heads": _select(KV_HEADS, 3),
    "select_topk-padded": _select(KV_HEADS, 3, padded=True),
    "gather_kv": _gather_kv,
    "gather_tokens": _gather_tokens,
    "rank_variance": _rank,
    "hop_tokens": _hop(KV_HEADS, 128, _BF16, "start"),
    "hop_tokens-hidden": _hop(1, 2048, torch.float16),
    "hop_tokens-float32": _hop(KV_HEADS, 40, _F32),
    "select_topk_packed": _select_packed,
    "gather_rows": _gather_rows,
    "store_pages": _store_pages,
    "gather_pages": _gather_pages,
    "kept_metadata": _kept_metadata,
    "compact_pages": _compact("pairs"),
    "compact_pages-heads": _compact("side by side"),
}
MAKERS = [pytest.param(maker, id=name) for name, maker in _MAKERS.items()]
