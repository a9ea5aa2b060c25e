"""Causal attention of some tokens of a prompt to all of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # queries and keys of a block of FlexAttention
_LEAST_WIDTH = 16  # of its heads, on a GPU
_MASKED = 1 << 26  # entries of a mask made at a time
_MOST_KINDS = 256  # of calls that FlexAttention is compiled for


def attention_of_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    start: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of the tokens at ``index`` to all before them, and themselves.

    On a GPU by FlexAttention, which skips blocks of keys that come after all queries of a block,
    and makes no mask of tokens times tokens; its first call for a device compiles it. Elsewhere by
    SDPA with a mask.

    Args:
        query: ``[B, H, k, D]``, of the tokens at ``index``.
        key: ``[B, G, n, D]``, of all tokens; G divides H.
        value: ``[B, G, n, Dv]``.
        index: ``[B, k]``, int64, ascending in [0, n); -1, before all others, is padding, whose
            rows mean nothing.
        start: ``[B]``: the first token of each row that is not padding; None without any.
        scale: factor on the products; ``D ** -0.5`` if not given.

    Returns:
        ``[B, H, k, Dv]``: rows ``index`` of the causal attention of all tokens.

    Example:
        >>> query, key, value = torch.randn(3, 1, 2, 5, 8)[:, None].unbind(0)
        >>> index = torch.tensor([[1, 4]])
        >>> some = attention_of_rows(query[:, 0, :, [1, 4]], key[:, 0], value[:, 0], index)
        >>> whole = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> torch.allclose(some, whole[:, 0, :, [1, 4]], atol=1e-6)
        True
    """
    grouped = query.shape[1] != key.shape[1]
    if flex_fits(query, value):
        return _flexible_rows(query, key, value, index, start, scale).transpose(1, 2)
    tokens, rows = key.shape[2], query.shape[2]
    if torch.compiler.is_compiling():  # where a number of blocks would be that of one length
        blocks = [slice(None)]
    else:
        step = max(1, _MASKED // (query.shape[0] * tokens))
        blocks = [slice(first, first + step) for first in range(0, rows, step)]
    attended = [
        F.scaled_dot_product_attention(
            query[:, :, block],
            key,
            value,
            attn_mask=visible_to(index[:, block], tokens, start),
            scale=scale,
            enable_gqa=grouped,
        )
        for block in blocks
    ]
    return torch.cat(attended, dim=2)


def flex_fits(query: Tensor, value: Tensor) -> bool:
    """Whether FlexAttention is the faster one here, and serves these heads."""
    return query.is_cuda and min(query.shape[3], value.shape[3]) >= _LEAST_WIDTH


# An op of its own, because torch.compile, where it takes FlexAttention into a model's graph, loses
# what the model then writes to its cache (torch 2.13).
@torch.library.custom_op(
    "claa_attention::rows",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor index, Tensor? start, float? scale)"
    " -> Tensor",
)
def _flexible_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    start: Tensor | None,
    scale: float | None,
) -> Tensor:
    return flexible(query, key, value, block_mask(index, key.shape[2], start), scale)


@_flexible_rows.register_fake
def _fake_rows(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return fake_output(query, value)


def flexible(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None
) -> Tensor:
    """FlexAttention of ``[B, H, k, D]``, contiguous as ``[B, k, H, Dv]``."""
    output = _compiled()(
        query,
        key,
        value,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        # Below 128 rows FlexAttention would take its kernel for decoding, which has no form for
        # some numbers of rows (torch 2.11).
        kernel_options={"BACKEND": "TRITON"},
    )
    return output.transpose(1, 2).contiguous()


def fake_output(query: Tensor, value: Tensor) -> Tensor:
    """What :func:`flexible` returns, without its numbers."""
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[3])


def visible_to(index: Tensor, tokens: int, start: Tensor | None) -> Tensor:
    """``[B, 1, k, n]``, bool: which of the tokens those at ``index`` see.

    Padding sees the first token, so that no row is without any.
    """
    place = torch.arange(tokens, device=index.device)
    visible = place <= index.clamp_min(0)[:, :, None]
    if start is not None:
        padding = index[:, :, None] < start[:, None, None]
        visible = visible & (padding | (place >= start[:, None, None]))
    return visible[:, None]


def block_mask(index: Tensor, tokens: int, start: Tensor | None) -> BlockMask:
    """The same for FlexAttention, made on the device without a mask of all pairs.

    The rows of a block ascend, so all of it sees what its first row sees, and none of it what
    comes after its last.
    """
    rows = index.shape[1]
    query_blocks, key_blocks = -(-rows // BLOCK), -(-tokens // BLOCK)
    padded = F.pad(index, (0, query_blocks * BLOCK - rows), value=-1)
    blocks = padded.unflatten(1, (query_blocks, BLOCK))
    ends = blocks.amax(dim=2).clamp_min(0) // BLOCK + 1  # [B, query_blocks]
    order = torch.arange(key_blocks, device=index.device)
    if start is None:
        whole = (blocks[:, :, 0] + 1) // BLOCK
        first = whole
    else:  # no block is whole, for any may hold padding
        whole = torch.zeros_like(ends)
        first = torch.minimum((start.long() // BLOCK)[:, None], ends - 1)
    partial = (first[:, :, None] + order) % key_blocks
    shape = (*whole.shape, key_blocks)
    lists = (ends - first, partial, whole, order.expand(shape))

    def visible(batch: Tensor, head: Tensor, row: Tensor, place: Tensor) -> Tensor:
        seen = place <= index[batch, row]
        return seen if start is None else seen & (place >= start[batch])

    return mask_of_blocks([each[:, None] for each in lists], visible, rows, tokens)


def mask_of_blocks(
    lists: Sequence[Tensor], visible: Callable[..., Tensor], rows: int, tokens: int
) -> BlockMask:
    """FlexAttention's mask of listed blocks.

    Args:
        lists: for each block of queries how many blocks of keys are partial, ``[B, heads, query
            blocks]``, and these first among all, ``[B, heads, query blocks, key blocks]``; the
            same of whole ones.
        visible: of a partial block, as FlexAttention calls it.
        rows, tokens: how many queries and keys there are.
    """
    partial_number, partial, whole_number, whole = (each.int().contiguous() for each in lists)
    return BlockMask.from_kv_blocks(
        partial_number,
        partial,
        whole_number,
        whole,
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(rows, tokens),
        compute_q_blocks=False,
    )


@functools.cache
def _compiled() -> Any:
    # It is compiled anew for each dtype and number of heads, with and without padding, for one
    # prompt and for several: more than the eight times that torch allows. At its limit an eager one
    # would make all products of queries and keys.
    compiled = torch.compile(flex_attention, fullgraph=True)
    return torch._dynamo.config.patch(recompile_limit=_MOST_KINDS)(compiled)
