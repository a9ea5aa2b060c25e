"""The specification: every op in plain PyTorch, one short function each.

Tests compare the kernels with these functions in float64, and the benchmark uses them as the eager
baseline: they follow the chain of tensor operations of the published code (keys repeated to the
query heads, one softmax over all logits), so they read and write what that code does. Scores are
float32 whatever the input dtype, and float64 for float64 inputs. Letters are those of the ops'
docstrings: B prompts, H query heads, G key heads, N keys, W window queries, M = N - W context
tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def score_window(
    query: Tensor,  # [B, H, W, D]: the last W of the N positions
    key: Tensor,  # [B, G, N, D]
    *,
    scale: float | None = None,
    lse: Tensor | None = None,  # [B, H, W]
    start: Tensor | None = None,  # [B]
    sliding_window: int = 0,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,  # [H]
) -> Tensor:
    """Attention that the last W queries pay to each context key, summed over them: [B, H, M]."""
    window, total = query.shape[2], key.shape[2]
    logits = _logits(query, key, scale)  # [B, H, W, N]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)

    key_position = torch.arange(total, device=key.device)
    query_position = key_position[total - window :, None]
    visible = key_position <= query_position  # [W, N]
    if sliding_window:
        visible = visible & (key_position > query_position - sliding_window)
    visible = visible & _valid_keys(start, key_position)  # [B or 1, 1, W, N]
    logits = logits.masked_fill(~visible, -torch.inf)

    if lse is None:
        if sink_logits is not None:
            sinks = sink_logits.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sinks], dim=-1)  # [B, H, W, N + 1]
        probability = logits.softmax(dim=-1)[..., :total]
    else:
        lse = lse.to(logits.dtype)
        if sink_logits is not None:
            lse = torch.logaddexp(lse, sink_logits.to(logits.dtype)[:, None])
        probability = torch.exp(logits - lse[..., None])
    # A query that sees no key is padding and has no vote.
    probability = probability.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)
    return probability.sum(dim=2)[..., : total - window]


def pool_heads(
    scores: Tensor,  # [B, H, M]
    num_kv_heads: int,  # G
    *,
    kernel_size: int = 7,
    pool_mode: str = "avg",
) -> Tensor:
    """Pool along the tokens of each head, then sum the heads of each group: [B, G, M]."""
    pool = F.avg_pool1d if pool_mode == "avg" else F.max_pool1d
    if scores.numel():
        scores = pool(scores, kernel_size, stride=1, padding=kernel_size // 2)  # [B, H, M]
    return scores.unflatten(1, (num_kv_heads, -1)).sum(dim=2)  # of [B, G, H // G, M]


def score_tokens(
    query: Tensor,  # [B, H, W, D]
    key: Tensor,  # [B, G, N, D]
    *,
    kernel_size: int = 7,
    pool_mode: str = "avg",
    **options: Any,  # the keyword arguments of score_window
) -> Tensor:
    """``score_window``, then ``pool_heads``: [B, G, M]."""
    scores = score_window(query, key, **options)  # [B, H, M]
    return pool_heads(scores, key.shape[1], kernel_size=kernel_size, pool_mode=pool_mode)


def aggregate_scores(
    running: Tensor,  # [B, M]
    scores: Tensor,  # [B, M] or [B, G, M]
) -> Tensor:
    """Running maximum over layers, and over heads where ``scores`` still has them: [B, M]."""
    if scores.dim() == 3:
        scores = scores.amax(dim=1)  # [B, M]
    return torch.maximum(running, scores)


def score_layer(
    running: Tensor,  # [B, M], updated in place
    query: Tensor,  # [B, H, W, D]
    key: Tensor,  # [B, G, N, D]
    **options: Any,  # the keyword arguments of score_tokens
) -> Tensor:
    """``score_tokens``, [B, G, M], and ``running`` becomes ``aggregate_scores`` of it and them."""
    scores = score_tokens(query, key, **options)
    running.copy_(aggregate_scores(running, scores))
    return scores


def score_layer_paged(
    running: Tensor,  # [R, M], updated in place
    query: Tensor,  # [R, W, H, D]
    key_pages: Tensor,  # [P, L, G, D]
    block_table: Tensor,  # [requests, blocks]
    lengths: Tensor,  # [R]
    *,
    rows: Tensor | None = None,  # [R]
    k_scale: Tensor | None = None,  # one number
    scale: float | None = None,
    **options: Any,  # other keyword arguments of score_tokens
) -> None:
    """``score_layer`` of each prompt alone, on the keys of its pages.

    Columns of ``running`` at and beyond a prompt's context, N - W, stay as they are.
    """
    scale = _key_scale(query, scale, k_scale)
    for r, key in enumerate(_keys_in_pages(query, key_pages, block_table, lengths, rows)):
        context = key.shape[2] - query.shape[1]
        if context > 0:
            row = running[r : r + 1, :context]
            score_layer(row, query[r : r + 1].transpose(1, 2), key, scale=scale, **options)


def select_topk(
    scores: Tensor,  # [..., M]
    k: int,
    *,
    window: int = 0,
    num_sinks: int = 0,
    start: Tensor | None = None,  # [B] for scores [B, ..., M]
    counts: Tensor | None = None,  # [B]
    int32: bool = False,
) -> Tensor:
    """Ascending positions of the k best of M + window tokens: [..., k].

    Four tiers, best first: the window (latest first, which matters only for k < window), the
    sinks (earliest first), the other tokens by score (NaN first, then the lower position on a
    tie), padding. A row with a count below k keeps that many, after entries of -1.
    """
    context = scores.shape[-1]
    position = torch.arange(context + window, device=scores.device)
    first = torch.zeros(1, dtype=torch.int64, device=scores.device) if start is None else start
    first = first.view(-1, *[1] * (scores.dim() - 1))
    in_window = position >= context
    is_padding = ~in_window & (position < first)
    is_sink = ~in_window & ~is_padding & (position < first + num_sinks)

    tier = 1 + is_sink.long() + 2 * in_window.long() - is_padding.long()
    value = F.pad(scores, (0, window))
    value = torch.where(in_window, position, torch.where(is_sink, -position, value))
    value = torch.where(is_padding, 0.0, value)
    by_value = value.sort(dim=-1, descending=True, stable=True).indices
    tier = tier.expand(value.shape).gather(-1, by_value)
    by_tier = tier.sort(dim=-1, descending=True, stable=True).indices
    best = by_value.gather(-1, by_tier)[..., :k]
    if counts is not None:
        wanted = counts.view(-1, *[1] * (scores.dim() - 1))
        best = best.masked_fill(position[:k] >= wanted, -1)
    return best.sort(dim=-1).values.to(torch.int32 if int32 else torch.int64)


def gather_kv(
    key: Tensor,  # [B, G, N, D]
    value: Tensor,  # [B, G, N, Dv]
    index: Tensor,  # [B, G, k], or [B, k] for all heads; -1 gives a row of zeros
) -> tuple[Tensor, Tensor]:
    """Rows of key and value at ``index``: [B, G, k, D] and [B, G, k, Dv]."""
    if index.dim() == 2:
        index = index[:, None].expand(-1, key.shape[1], -1)
    index = index.long()

    def rows(x: Tensor) -> Tensor:
        kept = x.gather(2, index.clamp_min(0)[..., None].expand(-1, -1, -1, x.shape[-1]))
        return kept.masked_fill((index < 0)[..., None], 0)

    return rows(key), rows(value)


def gather_tokens(
    x: Tensor,  # [B, N, C], or [1, N, C] for all prompts
    index: Tensor,  # [B, k]; -1 gives a row of zeros
) -> Tensor:
    """Rows of x at ``index``: [B, k, C]."""
    index = index.long()[..., None].expand(-1, -1, x.shape[-1])
    kept = x.expand(index.shape[0], -1, -1).gather(1, index.clamp_min(0))
    return kept.masked_fill(index < 0, 0)


def peak_attention(
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, G, N, D]
    *,
    scale: float | None = None,
    running: Tensor | None = None,  # [B, T, N]
    start: Tensor | None = None,  # [B]
) -> Tensor:
    """The largest attention over heads that each query pays to each key: [B, T, N]."""
    logits = _logits(query, key, scale)  # [B, H, T, N]
    visible = _valid_keys(start, torch.arange(key.shape[2], device=key.device))
    probability = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    probability = probability.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)
    peak = probability.amax(dim=1)
    return peak if running is None else torch.maximum(running, peak)


def peak_attention_paged(
    running: Tensor,  # [R, T, M], updated in place
    query: Tensor,  # [R, T, H, D]
    key_pages: Tensor,  # [P, L, G, D]
    block_table: Tensor,  # [requests, blocks]
    lengths: Tensor,  # [R]
    *,
    rows: Tensor | None = None,  # [R]
    k_scale: Tensor | None = None,  # one number
    scale: float | None = None,
) -> None:
    """``peak_attention`` of each prompt alone, on the keys of its pages, joined into ``running``.

    Columns of ``running`` at and beyond a prompt's length stay as they are.
    """
    scale = _key_scale(query, scale, k_scale)
    for r, key in enumerate(_keys_in_pages(query, key_pages, block_table, lengths, rows)):
        if key.shape[2] > 0:
            row = running[r : r + 1, :, : key.shape[2]]
            row.copy_(
                peak_attention(query[r : r + 1].transpose(1, 2), key, scale=scale, running=row)
            )


def rank_variance(
    scores: Tensor,  # [L, B, M]
    k: int,
) -> Tensor:
    """Variance over L layers of the ranks of all tokens that are in some layer's top k: [B]."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices  # [L, B, M]
    one_based = torch.arange(1, scores.shape[-1] + 1, device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, one_based)
    in_union = (rank <= k).any(dim=0)  # [B, M]
    spread = rank.double().var(dim=0, correction=0)  # [B, M], population variance over layers
    total = spread.masked_fill(~in_union, 0.0).sum(dim=-1)
    return (total / in_union.sum(dim=-1).clamp_min(1)).to(scores.dtype)


def hop_tokens(
    scores: Tensor,  # [B, M]
    states: Tensor,  # [B, G, N, D], N >= M
    *,
    hops: int = 4,
    num_seeds: int = 64,
    temperature: float = 0.1,
    gap: int = 8,
    kernel_size: int = 25,
    pool_mode: str = "avg",
    start: Tensor | None = None,  # [B]
) -> Tensor:
    """Scores of the tokens that each hop leads to from the best of the hop before: [B, hops, M].

    Directions are rounded to the dtype of the states, as a model would multiply them. A row with
    fewer tokens that were no seeds yet has fewer seeds; one with none has scores of 0.
    """
    batch, context = scores.shape
    if not scores.numel():
        return scores.new_zeros(batch, hops, context)
    position = torch.arange(context, device=scores.device)
    valid = _valid_keys(start, position).view(-1, context).expand(batch, -1)  # [B, M]
    tokens = valid.sum(dim=-1)  # [B]

    x = states[:, :, :context].transpose(1, 2).flatten(2)  # [B, M, G * D]
    x = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~valid[..., None], 0.0)
    mean = x.sum(dim=1, keepdim=True) / tokens.clamp_min(1)[:, None, None]
    direction = F.normalize(x - mean, dim=-1).to(states.dtype)

    rank, was_seed, found = scores, torch.zeros_like(valid), []
    for hop in range(hops):
        k = min(num_seeds, context)
        counts = (tokens - hop * num_seeds).clamp(0, k)
        seeds = select_topk(rank, k, start=start, counts=counts)  # [B, k], -1 for none
        seed_rows = seeds.clamp_min(0)[..., None].expand(-1, -1, x.shape[-1])
        cosine = direction.gather(1, seed_rows) @ direction.mT  # [B, k, M]
        is_near = (position - seeds[..., None]).abs() <= gap
        visible = ~is_near & valid[:, None] & (seeds >= 0)[..., None]
        logits = (cosine.to(x.dtype) / temperature).masked_fill(~visible, -torch.inf)
        link = logits.softmax(dim=-1).masked_fill(~visible, 0.0).amax(dim=1)  # [B, M]
        score = pool_heads(link[:, None], 1, kernel_size=kernel_size, pool_mode=pool_mode)[:, 0]
        found.append(score.masked_fill(~valid, 0.0))
        is_seed = position == seeds[..., None]  # [B, k, M]
        was_seed = was_seed | is_seed.any(dim=1)
        rank = score.masked_fill(was_seed, -1.0)  # below every score
    return torch.stack(found, dim=1)


# Prompts of several lengths, packed, and an engine's pages: R requests, P pages, k kept in all.
# These write to their first arguments.


def select_topk_packed(
    index: Tensor,  # [k], int32
    scores: Tensor,  # [R, M]
    lengths: Tensor,  # [R]
    starts: Tensor,  # [R + 1]
    *,
    window: int = 0,
    num_sinks: int = 0,
) -> None:
    """``select_topk`` of each request alone; -1 where there is no token to keep."""
    index.fill_(-1)
    lengths = lengths.clamp(0, scores.shape[1] + window)
    for row, length, (begin, end) in zip(
        scores, lengths.tolist(), _limits(starts, index.shape[0]), strict=True
    ):
        in_window, kept = min(window, length), min(end - begin, length)
        scored = row[: length - in_window]
        index[end - kept : end] = select_topk(scored, kept, window=in_window, num_sinks=num_sinks)


def gather_rows(
    out: Tensor,  # [k, C]
    x: Tensor,  # [T, C]
    index: Tensor,  # [k]; -1 gives a row of zeros
) -> None:
    """Rows of x at ``index``."""
    out.copy_(gather_tokens(x[None], index[None])[0])


def store_pages(
    pages: Tensor,  # [P, block, C]
    x: Tensor,  # [T, C]
    slots: Tensor,  # [T]; -1 is stored nowhere
) -> None:
    """Slot s is row ``s % block`` of page ``s // block``."""
    block, is_stored = pages.shape[1], slots >= 0
    slot = slots[is_stored].long()
    pages[slot // block, slot % block] = x[is_stored]


def gather_pages(
    out: Tensor,  # [k, C]
    pages: Tensor,  # [P, block, C]
    block_table: Tensor,  # [R, blocks]
    starts: Tensor,  # [R + 1]
    index: Tensor,  # [k]; -1 gives a row of zeros
) -> None:
    """Rows of each request at its ``index``: token t is in page ``block_table[r, t // block]``."""
    block = pages.shape[1]
    out.zero_()
    for table, (begin, end) in zip(block_table, _limits(starts, out.shape[0]), strict=True):
        token = index[begin:end].long()
        exists = token >= 0
        token = token[exists]
        out[begin:end][exists] = pages[table[token // block].long(), token % block]


def kept_metadata(
    seq_lens: Tensor,  # [R], int32
    slots: Tensor,  # [R * Q], int64
    logical_seq_lens: Tensor,  # [R]
    prompts: Tensor,  # [R]
    kept: Tensor,  # [R]
    block_table: Tensor,  # [R, blocks]
    block_size: int,
) -> None:
    """Entries behind a selection, and the slots of the last Q of them; 0 and -1 for padding."""
    requests = seq_lens.shape[0]
    is_live = (logical_seq_lens > 0) & (logical_seq_lens >= prompts)
    length = torch.where(is_live, logical_seq_lens - prompts + kept, 0).long()  # [R]
    new = torch.arange(slots.shape[0] // max(requests, 1), device=slots.device)
    entry = length[:, None] - len(new) + new  # [R, Q]
    request, query = (entry >= 0).nonzero(as_tuple=True)
    entry = entry[request, query]
    page = block_table[request, entry // block_size].long()
    seq_lens.copy_(length)
    slots.fill_(-1)
    slots[request * len(new) + query] = page * block_size + entry % block_size


def compact_pages(
    key_pages: Tensor,  # [P, block, G, D]
    value_pages: Tensor,  # [P, block, G, Dv]
    block_table: Tensor,  # [R, blocks]
    starts: Tensor,  # [R + 1]
    index: Tensor,  # [G, k], or [k] for all heads
) -> None:
    """Entry i of a request becomes what its entry ``index[..., i]`` was."""
    block, kv_heads = key_pages.shape[1:3]
    index = index.long().expand(kv_heads, -1)  # [G, k]
    head = torch.arange(kv_heads, device=index.device)[:, None]
    for table, (begin, end) in zip(block_table, _limits(starts, index.shape[1]), strict=True):
        token, entry = index[:, begin:end], torch.arange(end - begin, device=index.device)
        for pages in (key_pages, value_pages):
            kept = pages[table[token // block].long(), token % block, head]  # [G, k of r, D]
            pages[table[entry // block].long(), entry % block] = kept.transpose(0, 1)


def _limits(starts: Tensor, capacity: int) -> list[tuple[int, int]]:
    """Where the entries of each request begin and end, within [0, capacity]."""
    limits = starts.clamp(0, capacity).tolist()
    return [(begin, max(begin, end)) for begin, end in pairwise(limits)]


def _logits(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """Scaled products of each query head with the keys of its group, in the dtype of the scores."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # [B, H, N, D]
    logits = query @ key.transpose(-1, -2)
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))  # [B, H, W, N]


def _keys_in_pages(
    query: Tensor, key_pages: Tensor, block_table: Tensor, lengths: Tensor, rows: Tensor | None
) -> Iterator[Tensor]:
    """The keys of each prompt in the dtype of query: [1, G, N, D]."""
    for r, length in enumerate(lengths.tolist()):
        row = 0 if length <= 0 else r if rows is None else int(rows[r])
        length = max(length, 0)
        pages = block_table[row, : -(-length // key_pages.shape[1])]
        # As bytes: not every torch can index float8.
        bytes_of = key_pages.view(torch.uint8) if key_pages.dtype.itemsize == 1 else key_pages
        keys = bytes_of[pages.long()].view(key_pages.dtype)
        yield keys.flatten(0, 1)[:length].transpose(0, 1)[None].to(query.dtype)


def _key_scale(query: Tensor, scale: float | None, k_scale: Tensor | None) -> float | None:
    if k_scale is None:
        return scale
    return (query.shape[-1] ** -0.5 if scale is None else scale) * float(k_scale)


def _valid_keys(start: Tensor | None, position: Tensor) -> Tensor:
    """[B or 1, 1, 1, N]: which keys are not left padding."""
    if start is None:
        return torch.ones_like(position, dtype=torch.bool)[None, None, None]
    return (position >= start[:, None])[:, None, None]
