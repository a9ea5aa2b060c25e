"""Attention metadata of layers whose caches have not all tokens, made of the whole batch's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from claa_ops.vllm.plan import Integers, Pass, Plan, to_device


@dataclass(frozen=True, eq=False)
class Buffers:
    """Where a CUDA graph finds lengths and slots of one group's requests, at every replay.

    Attributes:
        lengths: ``[most requests]``, int32.
        slots: ``[most tokens]``, int64.
        tables: block tables, ``[most requests, blocks]``, int32, once they were needed.
    """

    lengths: Tensor
    slots: Tensor
    tables: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, vllm_config: Any, device: torch.device) -> Buffers:
        """Large enough for any batch that may be a CUDA graph."""
        scheduler = vllm_config.scheduler_config
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        tokens = max(scheduler.max_num_batched_tokens, captured)
        return cls(
            torch.zeros(scheduler.max_num_seqs, dtype=torch.int32, device=device),
            torch.full((tokens,), -1, dtype=torch.int64, device=device),
        )

    def table(self, like: Tensor) -> Tensor:
        """For a block table of this form, ``[rows, blocks]``."""
        if not self.tables:
            self.tables.append(like.new_zeros(len(self.lengths), like.shape[1]))
        return self.tables[0][: len(like)]


def unchanged(
    common: CommonAttentionMetadata, plan: Plan | None, block_size: int, buffers: Buffers
) -> CommonAttentionMetadata:
    """For a step in which the deeper layers see the batch as it is, padding included.

    Only where the tokens are in the caches differs, behind prompts of which tokens were dropped.

    Args:
        common: the metadata of the whole batch.
        plan: of the step; None for a dummy batch.
        block_size: how many entries a block has.
        buffers: what is written and used in place of the batch's lengths and slots.
    """
    some = plan.whole if plan is not None and plan.drops else None
    return _placed(common, some, block_size, buffers)


def compressed(
    common: CommonAttentionMetadata,
    plan: Plan | None,
    first_block: Integers | None,
    block_size: int,
    buffers: Buffers,
) -> CommonAttentionMetadata:
    """For layers before the selection whose caches are compressed when a prompt is over.

    They see the batch as it is; rows whose prompt is over find what is kept of it, and the tokens
    after it, behind the prompt's blocks.

    Args:
        common: the metadata of the whole batch.
        plan: of the step; None for a dummy batch.
        first_block: ``[R]``, where in the block table that is; None for a dummy batch.
        block_size: how many entries a block has.
        buffers: what is written and used in place of the batch's tables, lengths and slots.
    """
    given = common.block_table_tensor[: common.num_reqs]
    table = buffers.table(given)
    if plan is None or first_block is None or not plan.compressed.any():
        table.copy_(given)
        return _placed(common.replace(block_table_tensor=table), None, block_size, buffers)
    some = plan.compressing
    used = -(-int(some.lengths.max()) // block_size)
    shift = np.zeros(len(given), np.int64)
    shift[: len(first_block)] = np.where(plan.compressed, first_block, 0)
    columns = torch.arange(used, device=given.device)
    columns = to_device(shift, given.device)[:, None] + columns
    table[:, :used] = given.gather(1, columns.clamp_max_(given.shape[1] - 1))
    return _placed(common.replace(block_table_tensor=table), some, block_size, buffers)


def _placed(
    common: CommonAttentionMetadata, whole: Pass | None, block_size: int, buffers: Buffers
) -> CommonAttentionMetadata:
    """The batch as it is, with its tokens at other entries; at the batch's own if that is None."""
    rows, tokens = common.num_reqs, common.slot_mapping.shape[0]
    lengths, slots = buffers.lengths[:rows], buffers.slots[:tokens]
    if whole is None:
        lengths.copy_(common.seq_lens[:rows])
        slots.copy_(common.slot_mapping)
        return common.replace(seq_lens=lengths, slot_mapping=slots)
    device = whole.on(lengths.device, block_size)
    live = len(whole.rows)
    lengths[:live].copy_(device.lengths)
    if live < rows:
        lengths[live:].zero_()
    device.write_slots(slots, common.block_table_tensor, block_size)
    host = torch.zeros(rows, dtype=torch.int32)
    host[:live] = torch.from_numpy(whole.lengths)
    queries = common.query_start_loc_cpu[: rows + 1].diff()
    return common.replace(
        seq_lens=lengths,
        slot_mapping=slots,
        max_seq_len=int(whole.lengths.max()),
        **_on_host(common, host, queries),
    )


def selected(
    common: CommonAttentionMetadata, some: Pass, size: int, block_size: int
) -> CommonAttentionMetadata:
    """For tokens other than those of the batch: rows without any of them are left out.

    Args:
        common: the metadata of the whole batch.
        some: the tokens.
        size: how many tokens the layers run with, padding included.
        block_size: how many entries a block has.
    """
    device = some.on(common.query_start_loc.device, block_size)
    slots = device.block.new_empty(size)
    device.write_slots(slots, common.block_table_tensor, block_size)
    host = torch.from_numpy(some.lengths)
    queries = torch.from_numpy(some.query_start).diff()
    return common.replace(
        query_start_loc=device.query_start.int(),
        query_start_loc_cpu=torch.from_numpy(some.query_start),
        seq_lens=device.lengths.int(),
        num_reqs=len(some.rows),
        num_actual_tokens=some.tokens,
        max_query_len=int(some.count.max()),
        max_seq_len=int(some.lengths.max()),
        block_table_tensor=common.block_table_tensor[device.rows],
        slot_mapping=slots,
        is_prefilling=torch.from_numpy(some.first == 0),
        positions=None,
        _token_to_req_indices_cache=None,
        **_on_host(common, host, queries),
    )


def _on_host(common: CommonAttentionMetadata, lengths: Tensor, queries: Tensor) -> dict[str, Any]:
    """The host's copies of lengths, by the names of this version of vLLM."""
    names: dict[str, Any] = {
        "seq_lens_cpu_upper_bound": lengths,
        "_num_computed_tokens_cache": None,
    }
    if hasattr(common, "_seq_lens_cpu"):  # without them 0.25 asks the device
        names |= {"_seq_lens_cpu": lengths, "_num_computed_tokens_cpu": lengths - queries}
    return names
