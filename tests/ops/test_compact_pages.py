"""compact_pages: kept keys and values move to the front of their pages, in place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import claa_ops
from claa_ops import reference
from support.fakes import assert_refuses
from support.inputs import INDEX_TYPES, normal, threads
from support.packed import (
    LAYOUTS,
    ascending,
    block_table,
    key_and_value_pages,
    requests,
    starts_of,
)
from support.row_types import ROW_TYPES, ROW_TYPES_OF_8_BYTES, as_integers, random_bytes

compact_pages = claa_ops.compact_pages

SHAPES = [  # lengths, kept, rows of a page, heads, channels of keys and values
    pytest.param([1], [1], 1, 1, (1, 1), id="one-element"),
    pytest.param([37, 5, 20], [11, 5, 0], 3, 3, (5, 7), id="odd-sizes"),
    pytest.param([2047], [204], 16, 3, (64, 64), id="smollm2"),
    pytest.param([4096, 1024], [409, 1000], 16, 8, (128, 128), id="llama-8b"),
    pytest.param([300], [300], 16, 2, (64, 64), id="keep-all"),
    pytest.param([300], [0], 16, 2, (64, 64), id="keep-none"),
    pytest.param([20] * 100, [7] * 100, 16, 2, (8, 8), id="many-short"),
    pytest.param([200], [60], 64, 1, (576, 512), id="wide-rows"),
    pytest.param([30], [20], 16, 1, (2100, 4), id="rows-of-several-pieces"),
    pytest.param([20], [4], 16, 2, (0, 8), id="empty-keys"),
    # On CUDA each block waits for those before it: more of them than run at a time.
    pytest.param([30_000, 9], [15_000, 9], 16, 8, (64, 64), id="long"),
]


def kept_positions(
    lengths: list[int], counts: list[int], heads: int | None, device: str, unused: int = 0
) -> Tensor:
    """The same for all heads, or for each its own; then what belongs to no request."""

    def of_head(seed: int) -> Tensor:
        kept = [ascending(n, k, n + seed) for n, k in zip(lengths, counts, strict=True)]
        return torch.cat([*kept, torch.full((unused,), -1)]).to(device)

    return of_head(0) if heads is None else torch.stack([of_head(g) for g in range(heads)])


def check(key: Tensor, value: Tensor, table: Tensor, starts: Tensor, index: Tensor) -> None:
    expected = [as_integers(x).clone() for x in (key, value)]
    compact_pages(key, value, table, starts, index)
    reference.compact_pages(*expected, table, starts, index)
    for actual, right in zip((key, value), expected, strict=True):
        assert torch.equal(as_integers(actual), right)


@pytest.mark.parametrize("per_head", [False, True], ids=["all-heads", "each-head"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("lengths", "counts", "block", "heads", "dims"), SHAPES)
def test_matches_reference(lengths, counts, block, heads, dims, layout, per_head, device):
    if layout == "pairs" and dims[0] != dims[1]:
        pytest.skip("keys and values of one tensor have one size")
    table = block_table(len(lengths), -(-max(lengths) // block), device=device)
    key, value = (
        normal(table.numel() + 1, block, heads, dim, device=device, seed=dim) for dim in dims
    )
    key, value = key_and_value_pages(layout, key, value)
    index = kept_positions(lengths, counts, heads if per_head else None, device, unused=3)
    check(key, value, table, starts_of(counts, device), index)


@pytest.mark.parametrize("index_type", INDEX_TYPES)
@pytest.mark.parametrize("dtype", ROW_TYPES + ROW_TYPES_OF_8_BYTES)
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_moves_any_dtype_as_bytes(channels, dtype, index_type, device):
    """A value may have another dtype."""
    table = block_table(2, 10, device=device, dtype=index_type)
    key = random_bytes(20, 4, 2, channels, dtype=dtype, device=device)
    value = random_bytes(20, 4, 2, channels, dtype=torch.uint8, device=device, seed=1)
    index = kept_positions([40, 13], [17, 5], None, device).to(index_type)
    check(key, value, table, starts_of([17, 5], device, index_type), index)


@given(
    drawn=requests(longest=50),
    block=st.integers(1, 20),
    heads=st.integers(1, 3),
    channels=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
    per_head=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_is_the_gather_of_each_prompt(
    drawn, block, heads, channels, layout, per_head, seed, device
):
    """And nothing else changes: neither entries behind the kept ones nor pages of nobody."""
    lengths, counts = drawn
    table = block_table(len(lengths), -(-50 // block), device=device, seed=seed)
    memory = (table.numel() + 1, block, heads, channels)
    before = [normal(*memory, device=device, seed=seed + i) for i in range(2)]
    key, value = key_and_value_pages(layout, *before)
    index = kept_positions(lengths, counts, heads if per_head else None, device)
    compact_pages(key, value, table, starts_of(counts, device), index)

    index = index.expand(heads, -1)
    for pages, old in zip((key, value), before, strict=True):
        assert torch.equal(pages[-1], old[-1])
        begin = 0
        for row, count in zip(table.long(), counts, strict=True):
            entries, was = (x[row].flatten(0, 1) for x in (pages, old))  # [tokens, heads, channels]
            for g in range(heads):
                kept = index[g, begin : begin + count]
                assert torch.equal(entries[:count, g], was[kept, g])
            assert torch.equal(entries[count:], was[count:])
            begin += count


@given(seed=st.integers(0, 2**16), data=st.data())
def test_compacting_twice_is_compacting_by_the_compacted_index(seed, data, device):
    first = data.draw(st.integers(0, 60), label="first")
    second = data.draw(st.integers(0, first), label="second")
    outer, inner = ascending(60, first, seed), ascending(first, second, seed + 1)
    table = block_table(1, 8, device=device, seed=seed)
    pages = [normal(8, 8, 2, 4, device=device, seed=seed + i) for i in range(2)]
    twice, once = ([x.clone() for x in pages] for _ in range(2))
    for index in (outer, inner):
        compact_pages(*twice, table, starts_of([len(index)], device), index.to(device))
    compact_pages(*once, table, starts_of([second], device), outer[inner].to(device))
    for one, two in zip(once, twice, strict=True):
        of_one, of_two = (x[table[0].long()].flatten(0, 1)[:second] for x in (one, two))
        assert torch.equal(of_one, of_two)


def test_threads_agree(device):
    lengths, counts = [3000, 1000], [1500, 900]
    table = block_table(2, 200, device=device)
    key, value = (normal(400, 16, 4, 64, device=device, seed=i) for i in range(2))
    index, starts = kept_positions(lengths, counts, 4, device), starts_of(counts, device)
    results = []
    for count in (1, 2, 3, 5):
        pages = key.clone(), value.clone()
        with threads(count):
            compact_pages(*pages, table, starts, index)
        results.append(torch.cat(pages))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"key_pages": torch.zeros(6, 2, 4)},
            r"key_pages must have shape \[P, block, G, D\], got \[6, 2, 4\]",
        ),
        ({"value_pages": torch.zeros(5, 2, 3, 4)}, "value_pages must have P = 6 like key_pages"),
        ({"value_pages": torch.zeros(6, 3, 3, 4)}, "value_pages must have block = 2 like key_page"),
        ({"value_pages": torch.zeros(6, 2, 2, 4)}, "value_pages must have G = 3 like key_pages"),
        ({"key_pages": torch.zeros(6, 2, 4, 3).mT}, "key_pages must be contiguous in its last"),
        (
            {"value_pages": torch.zeros(6, 2, 1, 4).expand(6, 2, 3, 4)},
            r"value_pages must have rows that do not overlap, got strides \[8, 4, 0, 1\]",
        ),
        (
            {"value_pages": torch.zeros(6, 2, 3, 4, dtype=torch.complex128)},
            "value_pages must have a dtype of at most 8 bytes, got complex128",
        ),
        ({"block_table": torch.zeros(2, 3)}, "block_table must have dtype int64 or int32, got flo"),
        ({"block_table": torch.zeros(3).int()}, r"block_table must have shape \[R, blocks\], got"),
        ({"starts": torch.zeros(2).int()}, r"starts must have R \+ 1 = 3 like block_table, got 2"),
        ({"index": torch.zeros(1, 3, 5).int()}, r"index must have shape \[k\] or \[G, k\], got"),
        ({"index": torch.zeros(2, 5).int()}, r"index must have G = 3 like key_pages, got 2 in"),
        ({"index": torch.zeros(5)}, "index must have dtype int64 or int32, got float32"),
    ],
)
def test_rejects(changes, message, device):
    call = {
        "key_pages": torch.zeros(6, 2, 3, 4),
        "value_pages": torch.zeros(6, 2, 3, 4),
        "block_table": torch.zeros(2, 3).int(),
        "starts": torch.zeros(3).int(),
        "index": torch.zeros(5).int(),
    } | changes
    assert_refuses("compact_pages", call, message, device)


@pytest.mark.parametrize(
    ("index", "pages", "message"),
    [
        ([0, 4], [0, 1], r"index must be in \[0, blocks \* block\) = \[0, 4\), got 4"),
        ([-1, 2], [0, 1], r"index must be in \[0, .*, got -1"),
        ([2, 1], [0, 1], "index must ascend within a request, got 1 after 2"),
        ([2, 2], [0, 1], "index must ascend within a request, got 2 after 2"),
        ([1, 3], [0, 6], r"block_table must be in \[0, P\) = \[0, 6\) where it is read, got 6"),
        ([2, 3], [-1, 0], "block_table must be in .*, got -1"),
    ],
)
def test_rejects_what_cannot_be_moved_and_moves_nothing(index, pages, message, device):
    if device != "cpu":
        pytest.skip("a device assertion on CUDA, as in torch.gather: it would end the process")
    key, value = normal(6, 2, 3, 4, device=device), normal(6, 2, 3, 4, device=device, seed=1)
    before = key.clone(), value.clone()
    with pytest.raises(RuntimeError, match=f"compact_pages: {message}"):
        compact_pages(key, value, torch.tensor([pages]), torch.tensor([0, 2]), torch.tensor(index))
    assert torch.equal(key, before[0]) and torch.equal(value, before[1])
