"""kept_metadata: what the layers behind a selection hold in a step of decoding, and where."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import claa_ops
from claa_ops import reference
from support.fakes import assert_refuses
from support.inputs import INDEX_TYPES
from support.packed import block_table

kept_metadata = claa_ops.kept_metadata


def run(
    logical: Tensor, prompts: Tensor, kept: Tensor, table: Tensor, block: int, queries: int = 1
) -> tuple[Tensor, Tensor]:
    """Both results, which are those of the reference, in memory that held something else."""
    seq_lens = torch.full_like(logical, 77, dtype=torch.int32)
    slots = torch.full((len(logical) * queries,), 77, device=logical.device)
    expected = seq_lens.clone(), slots.clone()
    kept_metadata(seq_lens, slots, logical, prompts, kept, table, block)
    reference.kept_metadata(*expected, logical, prompts, kept, table, block)
    assert torch.equal(seq_lens, expected[0])
    assert torch.equal(slots, expected[1])
    return seq_lens, slots


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_by_hand(index_type, device):
    """Selected; not selected; padding; a prompt that is not over; the first token after one."""
    columns = [(103, 100, 10), (40, 30, 30), (0, 9, 5), (50, 60, 6), (71, 70, 7)]
    logical, prompts, kept = torch.tensor(columns, device=device).to(index_type).T.contiguous()
    table = torch.arange(15, device=device, dtype=index_type).view(5, 3)
    seq_lens, slots = run(logical, prompts, kept, table, 16)
    assert seq_lens.tolist() == [13, 40, 0, 0, 8]
    assert slots.tolist() == [12, 5 * 16 + 7, -1, -1, 12 * 16 + 7]


def test_several_new_tokens(device):
    """On both sides of a page's end; more than the request has entries."""
    logical = torch.tensor([100, 3, 0], device=device)
    prompts, kept = torch.tensor([95, 2, 0], device=device), torch.tensor([12, 1, 0], device=device)
    table = torch.tensor([[5, 9], [2, 0], [1, 1]], device=device)
    seq_lens, slots = run(logical, prompts, kept, table, 16, queries=3)
    assert seq_lens.tolist() == [17, 2, 0]
    assert slots.tolist() == [94, 95, 144, -1, 32, 33, -1, -1, -1]


@given(
    requests=st.integers(0, 300),
    block=st.integers(1, 40),
    queries=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    narrow=st.booleans(),
)
def test_the_slots_of_the_last_entries(requests, block, queries, seed, narrow, device):
    """The promises of the docstring, request by request, without the reference."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(highest: int) -> Tensor:
        return torch.randint(highest, (requests,), generator=generator)

    prompts, kept, later = drawn(500), drawn(50), drawn(60)
    logical = (prompts + later).masked_fill(drawn(4) == 0, 0)
    table = block_table(requests, 110, device="cpu", seed=seed)  # at least 110 entries each
    arguments = [x.int() if narrow else x for x in (logical, prompts, kept)]
    seq_lens, slots = run(*(x.to(device) for x in (*arguments, table)), block, queries)
    for r, length in enumerate(seq_lens.tolist()):
        is_live = 0 < logical[r] and prompts[r] <= logical[r]
        assert length == (int(kept[r] + logical[r] - prompts[r]) if is_live else 0)
        entries = range(length - queries, length)
        assert slots[r * queries : (r + 1) * queries].tolist() == [
            int(table[r, e // block]) * block + e % block if e >= 0 else -1 for e in entries
        ]


def test_writes_the_first_rows_of_persistent_buffers(device):
    """Padded rows at their end keep what a replay of a larger batch will write."""
    seq_lens = torch.full((8,), 77, dtype=torch.int32, device=device)
    slots = torch.full((8,), 77, device=device)
    logical = torch.tensor([9, 0], device=device)
    table = torch.zeros(2, 4, dtype=torch.int32, device=device)
    kept_metadata(seq_lens[:2], slots[:2], logical, logical - 1, logical - 5, table, 4)
    assert seq_lens.tolist() == [5, 0] + [77] * 6
    assert slots.tolist() == [0, -1] + [77] * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_lens": torch.zeros(3, 1).int()}, r"seq_lens must have shape \[R\], got \[3, 1\]"),
        ({"seq_lens": torch.zeros(3).long()}, "seq_lens must have dtype int32, got int64"),
        ({"slots": torch.zeros(3, 1).long()}, r"slots must have shape \[R \* Q\], got \[3, 1\]"),
        ({"slots": torch.zeros(3).int()}, "slots must have dtype int64, got int32"),
        (
            {"slots": torch.zeros(4).long()},
            "slots must have as many entries for each of the R = 3 requests of seq_lens, got 4",
        ),
        ({"slots": torch.zeros(6).long()[::2]}, r"slots must be contiguous.*, got strides \[2\]"),
        ({"logical_seq_lens": torch.zeros(2).int()}, "logical_seq_lens must have R = 3 like seq_l"),
        ({"prompts": torch.zeros(3)}, "prompts must have dtype int64 or int32, got float32"),
        ({"kept": torch.zeros(3, 1).int()}, r"kept must have shape \[R\], got \[3, 1\]"),
        ({"block_table": torch.zeros(3).int()}, r"block_table must have shape \[R, blocks\], got"),
        ({"block_table": torch.zeros(2, 4).int()}, "block_table must have R = 3 like seq_lens, go"),
        ({"block_size": 0}, "block_size must be positive, got 0"),
    ],
)
def test_rejects(changes, message, device):
    call = {
        "seq_lens": torch.zeros(3).int(),
        "slots": torch.zeros(3).long(),
        "logical_seq_lens": torch.zeros(3).int(),
        "prompts": torch.zeros(3).int(),
        "kept": torch.zeros(3).int(),
        "block_table": torch.zeros(3, 4).int(),
        "block_size": 16,
    } | changes
    assert_refuses("kept_metadata", call, message, device)


def test_rejects_more_entries_than_the_pages_hold(device):
    if device != "cpu":
        pytest.skip("a device assertion on CUDA: it would end the process")
    one = torch.ones(1).int()
    message = "kept_metadata: block_table must have room for 65 entries of a request, got 64"
    with pytest.raises(RuntimeError, match=message):
        kept_metadata(one, one.long(), one * 80, one * 75, one * 60, torch.zeros(1, 4).int(), 16)
