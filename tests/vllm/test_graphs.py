"""What CUDA graphs need of the plug-in, as far as a CPU can tell: invariant 10.

A graph reads lengths, slots and inputs where they were when it was captured, of padded rows too.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM is not in this environment: make test-vllm")

from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata

from claa_ops.vllm.halves import Inputs
from claa_ops.vllm.metadata import Buffers, compressed, selected, unchanged
from claa_ops.vllm.plan import Batch, Plan

BLOCK = 16
TABLE = torch.arange(1, 41, dtype=torch.int32).reshape(4, 10)


def a_config(most_tokens: int = 64) -> SimpleNamespace:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=most_tokens),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=8),
        model_config=SimpleNamespace(dtype=torch.float32),
    )


def a_batch(rows: list[tuple[int, int, int]], padded: int) -> tuple[CommonAttentionMetadata, Plan]:
    """Requests that decode: prompt, kept and computed tokens; metadata have padded rows."""
    live = len(rows)
    prompts, kept, computed = map(np.array, zip(*rows, strict=True))
    start = torch.tensor([min(row, live) for row in range(padded + 1)], dtype=torch.int32)
    lengths = torch.zeros(padded, dtype=torch.int32)
    lengths[:live] = torch.from_numpy(computed + 1)
    common = CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=lengths,
        num_reqs=padded,
        num_actual_tokens=padded,
        max_query_len=1,
        max_seq_len=int(lengths.max()),
        block_table_tensor=TABLE[:padded],
        slot_mapping=torch.full((padded,), 7),
    )
    names = [f"request {row}" for row in range(live)]
    return common, Plan(Batch(names, prompts, kept, computed), start[: live + 1].numpy())


def test_lengths_and_slots_of_decoding_stay_in_place_and_padding_is_empty():
    buffers = Buffers.of(a_config(), torch.device("cpu"))
    for rows, padded in (
        ([(100, 10, 100), (40, 40, 50), (90, 20, 93)], 4),
        ([(64, 8, 70)], 4),
        ([(64, 8, 70), (64, 8, 71)], 2),
    ):
        common, plan = a_batch(rows, padded)
        assert plan.same and plan.drops
        changed = unchanged(common, plan, BLOCK, buffers)
        held = [kept + computed - prompt for prompt, kept, computed in rows]
        empty = padded - len(rows)
        slots = [int(TABLE[r, h // BLOCK]) * BLOCK + h % BLOCK for r, h in enumerate(held)]
        assert changed.seq_lens.tolist() == [entry + 1 for entry in held] + [0] * empty
        assert changed.slot_mapping.tolist() == slots + [-1] * empty
        assert changed.max_seq_len == max(held) + 1
        assert changed.seq_lens.data_ptr() == buffers.lengths.data_ptr()
        assert changed.slot_mapping.data_ptr() == buffers.slots.data_ptr()
        assert changed.query_start_loc is common.query_start_loc
        assert changed.block_table_tensor is common.block_table_tensor


def test_tables_lengths_and_slots_of_compressed_caches_stay_in_place():
    buffers = Buffers.of(a_config(), torch.device("cpu"))
    # A prompt of 36 tokens of which 10 are cached, one that is whole, and a padded row.
    common, _ = a_batch([(36, 10, 40), (20, 20, 25)], 3)
    names, start = ["a", "b"], np.array([0, 1, 2])
    prompts, computed, cached = np.array([36, 20]), np.array([40, 25]), np.array([10, 20])
    plan = Plan(Batch(names, prompts, cached, computed, cached), start)
    changed = compressed(common, plan, -(-prompts // BLOCK), BLOCK, buffers)
    assert changed.seq_lens.tolist() == [10 + 4 + 1, 26, 0]
    assert changed.block_table_tensor[0, 0] == TABLE[0, 3]  # behind three blocks of the prompt
    assert changed.block_table_tensor[1, :2].tolist() == TABLE[1, :2].tolist()
    slots = [int(TABLE[0, 3]) * BLOCK + 14, int(TABLE[1, 1]) * BLOCK + 9, -1]
    assert changed.slot_mapping.tolist() == slots
    dummy = compressed(common, None, None, BLOCK, buffers)
    assert torch.equal(dummy.block_table_tensor, common.block_table_tensor)
    assert torch.equal(dummy.seq_lens, common.seq_lens)
    for name in ("block_table_tensor", "seq_lens", "slot_mapping"):
        assert getattr(dummy, name).data_ptr() == getattr(changed, name).data_ptr()


def test_a_prompt_beside_compressed_caches_is_seen_whole():
    buffers = Buffers.of(a_config(), torch.device("cpu"))
    common, _ = a_batch([(36, 10, 40), (20, 20, 25)], 2)
    # A request that decodes, and 30 tokens of a prompt of 60 in a table as others have.
    start = torch.tensor([0, 1, 31], dtype=torch.int32)
    own = torch.tensor([7, *range(30)])
    common = common.replace(query_start_loc=start, query_start_loc_cpu=start, slot_mapping=own)
    prompts, computed = np.array([36, 60]), np.array([40, 16])
    cached = np.array([10, 12])
    plan = Plan(Batch(["a", "b"], prompts, cached, computed, cached), start.numpy())
    changed = compressed(common, plan, -(-prompts // BLOCK), BLOCK, buffers)
    assert changed.seq_lens.tolist() == [15, 46]
    assert changed.max_seq_len == 46
    assert changed.block_table_tensor[1, :3].tolist() == TABLE[1, :3].tolist()
    assert changed.slot_mapping[1:].tolist() == [
        int(TABLE[1, at // BLOCK]) * BLOCK + at % BLOCK for at in range(16, 46)
    ]


@pytest.mark.parametrize("known", [False, True])
def test_a_dummy_batch_and_one_without_dropped_tokens_are_copied(known):
    buffers = Buffers.of(a_config(), torch.device("cpu"))
    common, plan = a_batch([(40, 40, 50), (30, 30, 31)], 4)
    changed = unchanged(common, plan if known else None, BLOCK, buffers)
    assert changed.seq_lens.tolist() == common.seq_lens.tolist()
    assert changed.slot_mapping.tolist() == common.slot_mapping.tolist()
    assert changed.seq_lens.data_ptr() == buffers.lengths.data_ptr()
    assert changed.slot_mapping.data_ptr() == buffers.slots.data_ptr()


def test_rows_without_deeper_tokens_are_left_out():
    common, _ = a_batch([(8, 8, 8)] * 3, 3)
    # A prompt that ends, one that does not, and a request that decodes.
    batch = Batch(
        ["a", "b", "c"], np.array([50, 90, 40]), np.array([20, 30, 4]), np.array([32, 0, 44])
    )
    plan = Plan(batch, np.array([0, 18, 50, 51]))
    changed = selected(common, plan.whole, 24, BLOCK)
    assert changed.query_start_loc.tolist() == [0, 20, 21]
    assert changed.seq_lens.tolist() == [20, 9]
    assert (changed.num_reqs, changed.num_actual_tokens, changed.max_query_len) == (2, 21, 20)
    assert torch.equal(changed.block_table_tensor, TABLE[[0, 2]])
    first = [int(TABLE[0, e // BLOCK]) * BLOCK + e % BLOCK for e in range(20)]
    assert changed.slot_mapping.tolist() == [*first, int(TABLE[2, 0]) * BLOCK + 8, -1, -1, -1]


def a_context(mode: CUDAGraphMode, tokens: int) -> SimpleNamespace:
    return SimpleNamespace(cudagraph_runtime_mode=mode, batch_descriptor=f"batch of {tokens}")


def test_the_back_half_runs_the_smallest_captured_graph_with_its_own_descriptor():
    inputs = Inputs(a_config(), width=3)
    for tokens in (8, 4, 2):
        given = torch.arange(tokens), torch.rand(tokens, 3), torch.rand(tokens, 3)
        held = inputs.hold(a_context(CUDAGraphMode.PIECEWISE, tokens), *given)
        assert all(torch.equal(mine, its) for mine, its in zip(held, given, strict=True))
        assert held[1].data_ptr() == inputs.hidden.data_ptr()  # where it is at every replay
    mixed = a_context(CUDAGraphMode.PIECEWISE, 8)
    assert [inputs.padded(mixed, tokens, 8) for tokens in (1, 3, 8, 9)] == [2, 4, 8, None]
    with inputs.running(mixed, 4):
        assert mixed.batch_descriptor == "batch of 4"
    assert mixed.batch_descriptor == "batch of 8"
    # A batch too large for a graph, of which few tokens go deeper; and one that must run without.
    large = a_context(CUDAGraphMode.NONE, 100)
    assert inputs.padded(large, 3, 100) == 4
    with inputs.running(large, 4):
        assert large.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
    assert large.cudagraph_runtime_mode == CUDAGraphMode.NONE
    assert inputs.padded(a_context(CUDAGraphMode.NONE, 6), 3, 6) is None
    with inputs.running(mixed, None):
        assert mixed.cudagraph_runtime_mode == CUDAGraphMode.NONE


def test_without_graphs_nothing_is_copied():
    inputs = Inputs(a_config(), width=3)
    given = torch.arange(5), torch.rand(5, 3), torch.rand(5, 3)
    held = inputs.hold(a_context(CUDAGraphMode.NONE, 5), *given)
    assert all(mine is its for mine, its in zip(held, given, strict=True))
    assert inputs.padded(a_context(CUDAGraphMode.NONE, 100), 3, 100) is None
    assert [len(each) for each in inputs.empty(None, 6, given[1])] == [6, 6, 6]
