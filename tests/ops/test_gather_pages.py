"""gather_pages: the kept rows of each request from an engine's pages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import claa_ops
from claa_ops import reference
from support.fakes import assert_refuses
from support.inputs import INDEX_TYPES, normal, threads
from support.packed import ascending, block_table, requests, starts_of
from support.row_types import ROW_TYPES, ROW_TYPES_OF_8_BYTES, as_integers, random_bytes

gather_pages = claa_ops.gather_pages

SHAPES = [  # lengths, kept, rows of a page, channels
    pytest.param([1], [1], 1, 1, id="one-element"),
    pytest.param([37, 5, 20], [11, 5, 0], 3, 5, id="odd-sizes"),
    pytest.param([2047], [204], 16, 576, id="smollm2"),
    pytest.param([1024, 600], [102, 60], 64, 4096, id="llama-8b"),
    pytest.param([20] * 100, [7] * 100, 16, 8, id="many-short"),
    pytest.param([20], [0], 16, 8, id="keep-none"),
    pytest.param([20], [4], 16, 0, id="empty-rows"),
]


def packed(lengths: list[int], counts: list[int], unused: int, device: str) -> Tensor:
    """Some positions of each, then what belongs to no request and is not read."""
    kept = [ascending(n, k, n) for n, k in zip(lengths, counts, strict=True)]
    return torch.cat([*kept, torch.full((unused,), 10**6)]).to(device)


def table_for(lengths: list[int], block: int, device: str, **options) -> Tensor:
    blocks = -(-max(lengths) // block)
    return block_table(len(lengths), blocks, device=device, **options)


def check(pages: Tensor, table: Tensor, starts: Tensor, index: Tensor) -> Tensor:
    out = torch.ones(len(index), pages.shape[2], device=pages.device).to(pages.dtype)
    expected = as_integers(out).clone()
    gather_pages(out, pages, table, starts, index)
    reference.gather_pages(expected, as_integers(pages), table, starts, index)
    assert torch.equal(as_integers(out), expected)
    return out


@pytest.mark.parametrize("index_type", INDEX_TYPES)
@pytest.mark.parametrize(("lengths", "counts", "block", "channels"), SHAPES)
def test_matches_reference(lengths, counts, block, channels, index_type, device):
    table = table_for(lengths, block, device, dtype=index_type)
    pages = normal(table.numel() + 1, block, channels, device=device)
    index = packed(lengths, counts, 5, device).to(index_type)
    out = check(pages, table, starts_of(counts, device, index_type), index)
    assert not out[sum(counts) :].any()


@pytest.mark.parametrize("dtype", ROW_TYPES + ROW_TYPES_OF_8_BYTES)
@pytest.mark.parametrize("channels", [1, 3, 16, 80])
def test_moves_any_dtype_as_bytes(channels, dtype, device):
    table = table_for([50, 20], 8, device)
    pages = random_bytes(table.numel(), 8, channels, dtype=dtype, device=device)
    check(pages, table, starts_of([20, 5], device), packed([50, 20], [20, 5], 2, device))


def test_padding_gives_zeros(device):
    pages = normal(3, 2, 8, device=device)
    index = torch.tensor([-1, 4, -1], device=device)
    table = torch.tensor([[2, 0, 1]], device=device)
    out = check(pages, table, torch.tensor([0, 3], device=device), index)
    assert not out[::2].any()
    assert torch.equal(out[1], pages[1, 0])


def test_reads_strided_pages(device):
    """A page that is padded, pages of two caches in turn, channels of a wider row."""
    table, starts = table_for([50, 20], 4, device), starts_of([20, 5], device)
    index = packed([50, 20], [20, 5], 0, device)
    count = table.numel()
    check(normal(count, 5, 16, device=device)[:, :4], table, starts, index)
    check(normal(count, 2, 4, 16, device=device)[:, 1], table, starts, index)
    check(normal(4, count, 20, device=device).transpose(0, 1)[..., 3:19], table, starts, index)
    wide = torch.full((2, 40), -1, device=device)
    wide[:, 10 : 10 + table.shape[1]] = table
    check(normal(count, 4, 16, device=device), wide[:, 10:], starts, index)


def test_limits_out_of_range_are_the_nearest_in_range(device):
    table, pages = table_for([9, 9, 9], 4, device), normal(9, 4, 8, device=device)
    index = torch.arange(8, device=device)
    check(pages, table, torch.tensor([-3, 2, 5, 99], device=device), index)
    out = check(pages, table[:0], torch.tensor([0], device=device), index)
    assert not out.any()


@given(
    drawn=requests(longest=60),
    block=st.integers(1, 20),
    channels=st.integers(1, 9),
    unused=st.integers(0, 9),
    seed=st.integers(0, 2**16),
)
def test_is_the_gather_of_each_prompt(drawn, block, channels, unused, seed, device):
    lengths, counts = drawn
    prompts = [normal(n, channels, device=device, seed=seed + n) for n in lengths]
    table = block_table(len(lengths), -(-60 // block), device=device, seed=seed)
    pages = torch.full((table.numel(), block, channels), torch.nan, device=device)
    for prompt, row in zip(prompts, table.long(), strict=True):
        token = torch.arange(len(prompt), device=device)
        pages[row[token // block], token % block] = prompt
    index = packed(lengths, counts, unused, device)
    out = torch.ones(len(index), channels, device=device)
    gather_pages(out, pages, table, starts_of(counts, device), index)
    kept = [x[ascending(len(x), k, len(x))] for x, k in zip(prompts, counts, strict=True)]
    assert torch.equal(out, torch.cat([*kept, torch.zeros(unused, channels, device=device)]))


def test_threads_agree(device):
    lengths, counts = [3000, 1000], [2000, 500]
    table, index = table_for(lengths, 16, device), packed(lengths, counts, 0, device)
    pages = normal(table.numel(), 16, 256, device=device)
    one, several = (torch.empty(2500, 256, device=device) for _ in range(2))
    for count, out in ((1, one), (3, several)):
        with threads(count):
            gather_pages(out, pages, table, starts_of(counts, device), index)
    assert torch.equal(one, several)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": torch.zeros(4)}, r"out must have shape \[k, C\], got \[4\]"),
        ({"out": torch.zeros(5, 3)}, r"pages must have C = 3 like out, got 4 in \[3, 2, 4\]"),
        ({"out": torch.zeros(5, 4).half()}, "out must have dtype float32 like pages, got float16"),
        ({"out": torch.zeros(5, 8)[:, :4]}, r"out must be contiguous, got strides \[8, 1\]"),
        ({"pages": torch.zeros(6, 4)}, r"pages must have shape \[P, block, C\], got \[6, 4\]"),
        ({"pages": torch.zeros(3, 0, 4)}, r"pages must have a block of at least one row, got \[3,"),
        ({"block_table": torch.zeros(2).int()}, r"block_table must have shape \[R, blocks\], got"),
        ({"block_table": torch.zeros(2, 2)}, "block_table must have dtype int64 or int32, got flo"),
        ({"starts": torch.zeros(2).int()}, r"starts must have R \+ 1 = 3 like block_table, got 2"),
        ({"index": torch.zeros(4).int()}, r"index must have k = 5 like out, got 4 in \[4\]"),
        ({"index": torch.zeros(5)}, "index must have dtype int64 or int32, got float32"),
    ],
)
def test_rejects(changes, message, device):
    call = {
        "out": torch.zeros(5, 4),
        "pages": torch.zeros(3, 2, 4),
        "block_table": torch.zeros(2, 2).int(),
        "starts": torch.zeros(3).int(),
        "index": torch.zeros(5).int(),
    } | changes
    assert_refuses("gather_pages", call, message, device)


@pytest.mark.parametrize(
    ("token", "page", "message"),
    [
        (4, 0, r"index must be in \[-1, blocks \* block\) = \[-1, 4\), got 4"),
        (-2, 0, r"index must be in \[-1, .*, got -2"),
        (3, 3, r"block_table must be in \[0, P\) = \[0, 3\) where it is read, got 3"),
        (3, -1, "block_table must be in .*, got -1"),
    ],
)
def test_rejects_what_its_pages_do_not_hold(token, page, message, device):
    if device != "cpu":
        pytest.skip("a device assertion on CUDA, as in torch.gather: it would end the process")
    out, pages = torch.ones(2, 4), torch.zeros(3, 2, 4)
    table, starts = torch.tensor([[0, page]]), torch.tensor([0, 2])
    with pytest.raises(RuntimeError, match=f"gather_pages: {message}"):
        gather_pages(out, pages, table, starts, torch.tensor([0, token]))
    assert (out == 1).all()
