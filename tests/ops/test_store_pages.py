"""store_pages: rows into the slots of an engine's pages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import claa_ops
from claa_ops import reference
from support.fakes import assert_refuses
from support.inputs import INDEX_TYPES, normal, threads
from support.row_types import ROW_TYPES, ROW_TYPES_OF_8_BYTES, as_integers, random_bytes

store_pages = claa_ops.store_pages

SHAPES = [  # pages, rows of a page, channels, rows stored
    pytest.param((1, 1, 1, 1), id="one-element"),
    pytest.param((7, 5, 3, 20), id="odd-sizes"),
    pytest.param((40, 16, 576, 500), id="smollm2"),
    pytest.param((9, 64, 4096, 512), id="llama-8b"),
    pytest.param((4, 16, 8, 0), id="none"),
    pytest.param((4, 16, 0, 9), id="empty-rows"),
    pytest.param((0, 16, 8, 0), id="no-pages"),
]


def random_slots(count: int, places: int, device: str, seed: int = 0) -> Tensor:
    """Different places, and some entries of -1."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(places, generator=generator)[:count]
    return slots.masked_fill(torch.rand(count, generator=generator) < 0.2, -1).to(device)


def check(pages: Tensor, x: Tensor, slots: Tensor) -> None:
    expected = as_integers(pages).clone()
    store_pages(pages, x, slots)
    reference.store_pages(expected, as_integers(x), slots)
    assert torch.equal(as_integers(pages), expected)


@pytest.mark.parametrize("index_type", INDEX_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, index_type, device):
    count, block, channels, rows = shape
    pages = normal(count, block, channels, device=device)
    slots = random_slots(rows, count * block, device).to(index_type)
    check(pages, normal(rows, channels, device=device, seed=1), slots)


@pytest.mark.parametrize("dtype", ROW_TYPES + ROW_TYPES_OF_8_BYTES)
@pytest.mark.parametrize("channels", [1, 3, 16, 80])
def test_moves_any_dtype_as_bytes(channels, dtype, device):
    pages = random_bytes(9, 4, channels, dtype=dtype, device=device)
    x = random_bytes(30, channels, dtype=dtype, device=device, seed=1)
    check(pages, x, random_slots(30, 36, device))


def test_strided_pages_and_rows(device):
    """A page that is padded, pages of two caches in turn, rows of a wider tensor."""
    x, slots = normal(30, 71, device=device), random_slots(30, 36, device)
    check(normal(9, 5, 16, device=device)[:, :4], x[:, 3:19], slots)
    check(normal(9, 2, 4, 16, device=device)[:, 1], x[:, 3:19], slots)
    check(
        normal(4, 9, 20, device=device).transpose(0, 1)[..., :16], x[:1, :16].expand(30, 16), slots
    )


@given(
    count=st.integers(1, 12),
    block=st.integers(1, 9),
    channels=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_gather_pages_reads_it_back(count, block, channels, seed, data, device):
    rows = data.draw(st.integers(0, count * block), label="rows")
    pages = normal(count, block, channels, device=device, seed=seed)
    before = pages.clone()
    x = normal(rows, channels, device=device, seed=seed + 1)
    slots = random_slots(rows, count * block, device, seed)
    store_pages(pages, x, slots)
    out = torch.ones_like(x)
    table, starts = torch.arange(count, device=device)[None], torch.tensor([0, rows], device=device)
    claa_ops.gather_pages(out, pages, table, starts, slots)
    assert torch.equal(out, x.masked_fill((slots < 0)[:, None], 0))
    others = torch.ones(count * block, dtype=torch.bool, device=device)
    others[slots[slots >= 0]] = False
    assert torch.equal(pages.flatten(0, 1)[others], before.flatten(0, 1)[others])


def test_threads_agree(device):
    x, slots = normal(3000, 256, device=device), random_slots(3000, 3200, device)
    one, several = (torch.zeros(200, 16, 256, device=device) for _ in range(2))
    with threads(1):
        store_pages(one, x, slots)
    with threads(3):
        store_pages(several, x, slots)
    assert torch.equal(one, several)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pages": torch.zeros(16, 4)}, r"pages must have shape \[P, block, C\], got \[16, 4\]"),
        ({"pages": torch.zeros(3, 2, 5)}, r"x must have C = 5 like pages, got 4 in \[6, 4\]"),
        ({"pages": torch.zeros(3, 0, 4)}, r"pages must have a block of at least one row, got \[3,"),
        ({"pages": torch.zeros(3, 4, 2).mT}, r"pages must be contiguous.*, got strides \[8, 1, 2"),
        (
            {"pages": torch.zeros(1, 2, 4).expand(3, 2, 4)},
            r"pages must have rows that do not overlap, got strides \[0, 4, 1\]",
        ),
        (
            {"pages": torch.zeros(1, dtype=torch.int8).new_empty(2**20, 2**11, 0)},
            "pages must have rows that do not overlap|pages must have fewer than 2",
        ),
        ({"x": torch.zeros(6)}, r"x must have shape \[T, C\], got \[6\]"),
        ({"x": torch.zeros(6, 4).half()}, "x must have dtype float32 like pages, got float16"),
        ({"x": torch.zeros(4, 6).T}, r"x must be contiguous.*, got strides \[1, 6\]"),
        ({"slots": torch.zeros(5).long()}, r"slots must have T = 6 like x, got 5 in \[5\]"),
        ({"slots": torch.zeros(6)}, "slots must have dtype int64 or int32, got float32"),
    ],
)
def test_rejects(changes, message, device):
    call = {
        "pages": torch.zeros(3, 2, 4),
        "x": torch.zeros(6, 4),
        "slots": torch.arange(6),
    } | changes
    if call["pages"].dtype == torch.int8:
        call["x"] = torch.zeros(6, 0, dtype=torch.int8)
    assert_refuses("store_pages", call, f"(?:{message})", device)


@pytest.mark.parametrize("bad", [6, -2])
def test_rejects_a_slot_out_of_range_and_writes_nothing(bad, device):
    if device != "cpu":
        pytest.skip("a device assertion on CUDA, as in torch.gather: it would end the process")
    pages = torch.ones(3, 2, 4)
    message = rf"store_pages: slots must be in \[-1, P \* block\) = \[-1, 6\), got {bad}"
    with pytest.raises(RuntimeError, match=message):
        store_pages(pages, torch.zeros(2, 4), torch.tensor([0, bad]))
    assert (pages == 1).all()
