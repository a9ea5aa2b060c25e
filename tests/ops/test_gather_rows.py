"""gather_rows: the kept rows of a packed batch, into memory of the caller."""

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

gather_rows = claa_ops.gather_rows

SHAPES = [  # rows, channels, kept
    pytest.param((1, 1, 1), id="one-element"),
    pytest.param((37, 5, 11), id="odd-sizes"),
    pytest.param((2047, 576, 204), id="smollm2"),
    pytest.param((1024, 4096, 102), id="llama-8b"),
    pytest.param((20, 3, 60), id="more-kept-than-there-are"),
    pytest.param((20, 16, 0), id="keep-none"),
    pytest.param((20, 0, 4), id="empty-rows"),
    pytest.param((0, 16, 0), id="empty-prompt"),
]


def random_index(kept: int, total: int, device: str, seed: int = 0) -> Tensor:
    """Any order, with repetitions and some entries of -1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, max(total, 1), (kept,), generator=generator).to(device)


def check(x: Tensor, index: Tensor) -> None:
    out = torch.ones(len(index), x.shape[1], device=x.device).to(x.dtype)
    expected = as_integers(out).clone()
    gather_rows(out, x, index)
    reference.gather_rows(expected, as_integers(x), index)
    assert torch.equal(as_integers(out), expected)


@pytest.mark.parametrize("index_type", INDEX_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, index_type, device):
    total, channels, kept = shape
    index = random_index(kept, total, device).to(index_type)
    check(normal(total, channels, device=device), index)


@pytest.mark.parametrize("dtype", ROW_TYPES + ROW_TYPES_OF_8_BYTES)
@pytest.mark.parametrize("channels", [1, 3, 16, 80])
def test_moves_any_dtype_as_bytes(channels, dtype, device):
    """Also the bits of NaN."""
    x = random_bytes(50, channels, dtype=dtype, device=device)
    check(x, random_index(20, 50, device))


def test_all_padding_needs_no_rows(device):
    out = torch.ones(3, 8, device=device)
    gather_rows(out, normal(0, 8, device=device), torch.full((3,), -1, device=device))
    assert not out.any()


def test_reads_strided_rows_and_writes_a_part_of_a_buffer(device):
    wide, index = normal(60, 71, device=device), random_index(12, 30, device)
    check(wide[::2, 3:67], index)
    check(wide[:1, :9].expand(30, 9), index)
    for first in (0, 1, 4):  # the second is no 16-byte boundary
        buffer = torch.full((20, 5), 7.0, device=device)
        gather_rows(buffer[first : first + 12], wide[:30, :5], index)
        expected = reference.gather_tokens(wide[None, :30, :5], index[None])[0]
        assert torch.equal(buffer[first : first + 12], expected)
        assert (buffer[:first] == 7).all() and (buffer[first + 12 :] == 7).all()


@given(
    total=st.integers(1, 40),
    channels=st.integers(1, 20),
    kept=st.integers(0, 90),
    seed=st.integers(0, 2**16),
)
def test_is_gather_tokens_into_given_memory(total, channels, kept, seed, device):
    x = normal(total, channels, device=device, seed=seed)
    index = random_index(kept, total, device, seed)
    out = torch.ones(kept, channels, device=device)
    gather_rows(out, x, index)
    assert torch.equal(out, claa_ops.gather_tokens(x[None], index[None])[0])


def test_threads_agree(device):
    x, index = normal(3000, 256, device=device), random_index(2000, 3000, device)
    one, several = (torch.empty(2000, 256, device=device) for _ in range(2))
    with threads(1):
        gather_rows(one, x, index)
    with threads(3):
        gather_rows(several, x, index)
    assert torch.equal(one, several)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": torch.zeros(4)}, r"out must have shape \[k, C\], got \[4\]"),
        ({"out": torch.zeros(5, 3)}, r"x must have C = 3 like out, got 4 in \[16, 4\]"),
        ({"out": torch.zeros(5, 4).half()}, "out must have dtype float32 like x, got float16"),
        ({"out": torch.zeros(5, 8)[:, :4]}, r"out must be contiguous, got strides \[8, 1\]"),
        ({"out": torch.zeros(4, 5).T}, r"out must be contiguous.*, got strides \[1, 5\]"),
        ({"x": torch.zeros(2, 16, 4)}, r"x must have shape \[T, C\], got \[2, 16, 4\]"),
        ({"x": torch.zeros(4, 16).T}, r"x must be contiguous.*, got strides \[1, 16\]"),
        ({"index": torch.zeros(4).long()}, r"index must have k = 5 like out, got 4 in \[4\]"),
        ({"index": torch.zeros(5)}, "index must have dtype int64 or int32, got float32"),
        (
            {name: torch.zeros(5, 4, dtype=torch.complex128) for name in ("out", "x")},
            "x must have a dtype of at most 8 bytes, got complex128",
        ),
    ],
)
def test_rejects(changes, message, device):
    call = {
        "out": torch.zeros(5, 4),
        "x": torch.zeros(16, 4),
        "index": torch.zeros(5).long(),
    } | changes
    assert_refuses("gather_rows", call, message, device)


@pytest.mark.parametrize("bad", [16, -2, 2**31 - 1])
def test_rejects_an_index_out_of_range_and_writes_nothing(bad, device):
    if device != "cpu":
        pytest.skip("a device assertion on CUDA, as in torch.gather: it would end the process")
    out = torch.ones(5, 4)
    message = rf"gather_rows: index must be in \[-1, N\) = \[-1, 16\), got {bad}"
    with pytest.raises(RuntimeError, match=message):
        gather_rows(out, torch.zeros(16, 4), torch.tensor([0, 0, 0, 0, bad]))
    assert (out == 1).all()
