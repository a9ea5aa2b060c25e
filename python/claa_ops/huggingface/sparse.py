"""Block-sparse causal attention: each block of queries sees the blocks of keys most like it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from claa_ops.huggingface.rows import BLOCK, fake_output, flex_fits, flexible, mask_of_blocks
from claa_ops.selection.budget import Budget

LEAST = 4  # blocks of keys that a block of queries sees: the first, its own, that before, the best


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    share: Budget,
    start: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of a prompt in which a block of queries sees a share of its blocks of keys.

    Blocks are of 128 tokens, counted from the end, so that a padded row has those of the row
    alone. Every block of queries sees the first block of the prompt, its own and the one before,
    and of the others those whose mean key has the largest product with its mean query, for each
    head; the last block sees all. On a GPU by FlexAttention, elsewhere by SDPA with a mask.

    Args:
        query: ``[B, H, n, D]``.
        key: ``[B, G, n, D]``; G divides H.
        value: ``[B, G, n, Dv]``.
        share: of the blocks before a block of queries and its own, how many it sees: a rate. At
            least 4 of them.
        start: ``[B]``: the first token of each row that is not padding; None without any.
        scale: factor on the products; ``D ** -0.5`` if not given.

    Returns:
        ``[B, H, n, Dv]``. Rows at padding mean nothing.
    """
    if flex_fits(query, value):
        rate = share.count, share.per
        return _flexible_blocks(query, key, value, *rate, start, scale).transpose(1, 2)
    padding = -query.shape[2] % BLOCK
    query, key, value, start = _aligned(query, key, value, start, padding)
    chosen = choose_blocks(query, key, share, start)
    grouped = query.shape[1] != key.shape[1]
    place = torch.arange(query.shape[2], device=query.device)
    # While a graph is made, not in parts, of which there would be as many as one length has.
    step = len(place) if torch.compiler.is_compiling() else BLOCK
    attended = []
    for first in range(0, len(place), step):
        rows = place[first : first + step, None]
        visible = chosen[:, :, rows[:, 0] // BLOCK].repeat_interleave(BLOCK, dim=3)
        visible = visible & (place <= rows) & (place >= start[:, None, None, None])
        visible = visible | (place == rows)  # padding sees itself, so that no row is without any
        part = F.scaled_dot_product_attention(
            query[:, :, first : first + step],
            key,
            value,
            attn_mask=visible,
            scale=scale,
            enable_gqa=grouped,
        )
        attended.append(part)
    return torch.cat(attended, dim=2)[:, :, padding:]


def _aligned(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, padding: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All with so much padding on the left, and the start of each row after it."""
    if padding:
        query, key, value = (F.pad(x, (0, 0, padding, 0)) for x in (query, key, value))
    if start is None:
        start = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
    return query, key, value, start.long() + padding


@torch.library.custom_op(
    "claa_attention::blocks",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, SymInt count, SymInt per, Tensor? start, "
    "float? scale) -> Tensor",
)
def _flexible_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    count: int,
    per: int,
    start: Tensor | None,
    scale: float | None,
) -> Tensor:
    padding = -query.shape[2] % BLOCK
    query, key, value, start = _aligned(query, key, value, start, padding)
    mask = _block_mask(choose_blocks(query, key, Budget(count, per), start), start)
    output = flexible(query, key, value, mask, scale)
    return output[:, padding:].contiguous()


@_flexible_blocks.register_fake
def _fake_blocks(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return fake_output(query, value)


def choose_blocks(query: Tensor, key: Tensor, share: Budget, start: Tensor) -> Tensor:
    """Which blocks of keys each block of queries sees, ``[B, H, n / 128, n / 128]``, bool.

    Args:
        query: ``[B, H, n, D]``, n a multiple of 128.
        key: ``[B, G, n, D]``.
        share: see :func:`block_sparse_attention`.
        start: ``[B]``: the first token of each row that is not padding.
    """
    mean_key = _means(key, start)[:, :, None]
    mean_query = _means(query, start).unflatten(1, (key.shape[1], -1))
    scores = (mean_query @ mean_key.transpose(3, 4)).flatten(1, 2)
    block = torch.arange(scores.shape[3], device=scores.device)
    first = (start // BLOCK)[:, None, None, None]
    own = block[:, None]
    visible = (block <= own) & (block >= first)
    forced = (block == first) | (block >= own - 1)
    scores = scores.masked_fill(forced, torch.inf).masked_fill(~visible, -torch.inf)
    number = own - first + 1
    count = torch.where(own == block[-1], number, share.tokens(number, LEAST))
    order = scores.argsort(dim=3, descending=True, stable=True)
    best = (block < count).expand_as(order)
    return torch.zeros_like(best).scatter(3, order, best)


def pairs_seen(tokens: int, share: Budget) -> int:
    """Query-key pairs of one head in a prompt of so many tokens, without padding."""
    padding = -tokens % BLOCK
    blocks = (tokens + padding) // BLOCK
    pairs = 0
    for own in range(blocks):
        count = own + 1 if own == blocks - 1 else share.tokens(own + 1, LEAST)
        rows = BLOCK if own else BLOCK - padding
        before = (count - 1) * BLOCK - (padding if own else 0)
        pairs += rows * before + rows * (rows + 1) // 2
    return pairs


def _means(x: Tensor, start: Tensor) -> Tensor:
    """``[B, H, n / 128, D]``, float32: the means of blocks over what is not padding."""
    valid = (torch.arange(x.shape[2], device=x.device) >= start[:, None])[:, None, :, None]
    sums = x.masked_fill(~valid, 0).unflatten(2, (-1, BLOCK)).sum(dim=3, dtype=torch.float32)
    return sums / valid.unflatten(2, (-1, BLOCK)).sum(dim=3).clamp_min(1)


def _block_mask(chosen: Tensor, start: Tensor) -> BlockMask:
    """The same for FlexAttention: blocks on the diagonal and that of the start are partial."""
    block = torch.arange(chosen.shape[3], device=chosen.device)
    bounds = (block == block[:, None]) | (block == (start // BLOCK)[:, None, None, None])
    lists = []
    for part in (chosen & bounds, chosen & ~bounds):
        lists += [part.sum(dim=3), part.int().argsort(dim=3, descending=True, stable=True)]

    def visible(batch: Tensor, head: Tensor, row: Tensor, place: Tensor) -> Tensor:
        return (place <= row) & (place >= start[batch])

    tokens = chosen.shape[3] * BLOCK
    return mask_of_blocks(lists, visible, tokens, tokens)
