"""The plan of a step against one made request by request, and the arithmetic of slots."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claa_ops.vllm.plan import Batch, Plan

BLOCK = 16


@st.composite
def batches(draw):
    """Requests anywhere in their lives, with the number of tokens that each has in the step."""
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        prompt = draw(st.integers(1, 60))
        kept = draw(st.integers(1, prompt))
        computed = draw(st.integers(0, prompt + 10))
        rows.append((prompt, kept, computed, draw(st.integers(1, 40))))
    return rows


def plan_of(rows):
    prompts, kept, computed, queries = map(np.array, zip(*rows, strict=True))
    names = [f"request {index}" for index in range(len(rows))]
    start = np.concatenate([[0], np.cumsum(queries)])
    return Plan(Batch(names, prompts, kept, computed), start)


def deeper(row):
    """The entries of its deeper caches that a request fills in the step, one by one."""
    prompt, kept, computed, queries = row
    held = 0 if computed < prompt else kept + computed - prompt
    after = computed + queries
    return list(range(held, kept + after - prompt)) if after >= prompt else []


@settings(deadline=None)
@given(batches())
def test_rows_lengths_and_entries_are_those_of_each_request_alone(rows):
    plan = plan_of(rows)
    entries = [deeper(row) for row in rows]
    alive = [index for index, each in enumerate(entries) if each]
    whole = plan.whole
    assert whole.rows.tolist() == alive
    assert whole.count.tolist() == [len(entries[index]) for index in alive]
    assert whole.lengths.tolist() == [entries[index][-1] + 1 for index in alive]
    on = whole.on(torch.device("cpu"), BLOCK)
    wanted = [(index, entry) for index in alive for entry in entries[index]]
    found = zip(on.of_token.tolist(), (on.block * BLOCK + on.offset).tolist(), strict=True)
    assert list(found) == wanted


@settings(deadline=None)
@given(batches())
def test_the_batch_is_unchanged_only_if_each_row_is(rows):
    same = all(
        computed >= prompt or (computed == 0 and queries >= prompt and kept == prompt)
        for prompt, kept, computed, queries in rows
    )
    assert plan_of(rows).same == same


@settings(deadline=None)
@given(batches(), st.integers(1, 30))
def test_passes_are_the_whole_in_order_and_none_is_too_large(rows, most):
    plan = plan_of(rows)

    def tokens(some):
        first = zip(some.rows.tolist(), some.first.tolist(), some.count.tolist(), strict=True)
        return [(row, start + step) for row, start, count in first for step in range(count)]

    passes = plan.passes(most)
    assert all(1 <= some.tokens <= most for some in passes)
    assert [token for some in passes for token in tokens(some)] == tokens(plan.whole)


@settings(deadline=None)
@given(batches())
def test_runs_cover_what_goes_deeper_and_lead_back_to_the_batch(rows):
    plan = plan_of(rows)
    starts = np.concatenate([[0], np.cumsum([row[3] for row in rows])])
    at = 0
    for begin, end, row in plan.runs():
        assert begin == at < end
        at = end
        of_token = np.repeat(plan.whole.rows, plan.whole.count)[begin:end]
        if row is None:
            first = plan.source(begin, end)
            assert (first >= starts[of_token]).all() and (first < starts[of_token + 1]).all()
            assert (np.diff(first)[np.diff(of_token) == 0] == 1).all()
        else:
            assert row.ends and (row.drops or row.computed) and set(of_token) == {row.index}
            assert end - begin == row.kept + row.after - row.prompt
    assert at == plan.whole.tokens


@settings(deadline=None)
@given(batches())
def test_the_last_token_of_each_row_is_sampled_from(rows):
    plan = plan_of(rows)
    here, there = plan.last_tokens()
    assert here.tolist() == (plan.whole.query_start[1:] - 1).tolist()
    ends = np.cumsum([row[3] for row in rows]) - 1
    assert there.tolist() == ends[plan.whole.rows].tolist()


@pytest.mark.parametrize("size", [5, 8])
def test_slots_go_through_the_block_table_and_end_in_padding(size):
    plan = plan_of([(40, 20, 40, 1), (3, 3, 0, 3), (9, 4, 12, 1)])
    table = torch.tensor([[7, 3, 0], [5, 0, 0], [2, 0, 0]], dtype=torch.int32)
    slots = torch.full((size,), 99)
    plan.whole.on(torch.device("cpu"), BLOCK).write_slots(slots, table, BLOCK)
    wanted = [3 * BLOCK + 4, 5 * BLOCK, 5 * BLOCK + 1, 5 * BLOCK + 2, 2 * BLOCK + 7]
    assert slots.tolist() == wanted + [-1] * (size - 5)
