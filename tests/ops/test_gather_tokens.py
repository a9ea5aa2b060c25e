"""gather_tokens: the kept rows of hidden states and of what goes with them."""

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

gather_tokens = claa_ops.gather_tokens

SHAPES = [  # batch, total, channels, kept
    pytest.param((1, 1, 1, 1), id="one-element"),
    pytest.param((3, 37, 5, 11), id="odd-sizes"),
    pytest.param((1, 2047, 576, 204), id="smollm2"),
    pytest.param((1, 1024, 4096, 102), id="llama-8b"),
    pytest.param((2, 20, 3, 60), id="more-kept-than-there-are"),
    pytest.param((2, 20, 16, 0), id="keep-none"),
    pytest.param((0, 20, 16, 4), id="empty-batch"),
    pytest.param((2, 20, 0, 4), id="empty-rows"),
    pytest.param((2, 0, 16, 0), id="empty-prompt"),
]


def random_index(*shape: int, total: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """Any order, with repetitions and some entries of -1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, max(total, 1), shape, generator=generator).to(device)


def check(x: Tensor, index: Tensor) -> None:
    actual = gather_tokens(x, index)
    assert actual.dtype == x.dtype
    assert actual.is_contiguous()
    assert torch.equal(as_integers(actual), reference.gather_tokens(as_integers(x), index))


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, device):
    batch, total, channels, kept = shape
    x = normal(batch, total, channels, device=device)
    check(x, random_index(batch, kept, total=total, device=device))


@pytest.mark.parametrize("dtype", ROW_TYPES + ROW_TYPES_OF_8_BYTES)
@pytest.mark.parametrize("channels", [1, 3, 16, 80])
def test_moves_any_dtype_as_bytes(channels, dtype, device):
    """Also the bits of NaN."""
    x = random_bytes(2, 50, channels, dtype=dtype, device=device)
    check(x, random_index(2, 20, total=50, device=device))


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_one_row_serves_the_whole_batch(index_type, device):
    """Position embeddings are [1, N, C] for every prompt of the batch."""
    x = normal(1, 40, 8, device=device)
    index = random_index(3, 9, total=40, device=device).to(index_type)
    check(x, index)
    assert torch.equal(gather_tokens(x, index), gather_tokens(x.repeat(3, 1, 1), index))


def test_padding_gives_zeros(device):
    x = normal(1, 5, 8, device=device)
    rows = gather_tokens(x, torch.tensor([[-1, 4, -1]], device=device))
    assert not rows[:, ::2].any()
    assert torch.equal(rows[:, 1], x[:, 4])


def test_all_padding_needs_no_rows(device):
    x = normal(2, 0, 8, device=device)
    rows = gather_tokens(x, torch.full((2, 3), -1, device=device))
    assert rows.shape == (2, 3, 8) and not rows.any()


def test_reads_strided_arguments(device):
    wide = normal(4, 60, 71, device=device)
    index = random_index(4, 40, total=30, device=device)
    check(wide[::2, ::2, 3:67], index[::2, 4:])
    check(normal(60, 4, 7, device=device).transpose(0, 1), index)
    check(wide[:1, :30].expand(4, 30, 71), index[:1].expand(4, 40))


@given(
    batch=st.integers(1, 3),
    total=st.integers(1, 40),
    channels=st.integers(1, 20),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_scattering_back_restores_the_kept_rows(batch, total, channels, seed, data, device):
    x = normal(batch, total, channels, device=device, seed=seed)
    kept = data.draw(st.integers(0, total), label="kept")
    index = normal(batch, total, device=device, seed=seed).argsort(-1)[:, :kept]
    rows = gather_tokens(x, index)
    where = index[..., None].expand_as(rows)
    restored = torch.zeros_like(x).scatter(1, where, rows)
    assert torch.equal(restored, x * torch.zeros_like(x).scatter(1, where, 1.0))


@given(batch=st.integers(1, 3), kept=st.integers(0, 30), seed=st.integers(0, 2**16))
def test_a_row_does_not_know_its_batch(batch, kept, seed, device):
    x = normal(batch, 25, 6, device=device, seed=seed)
    index = random_index(batch, kept, total=25, seed=seed, device=device)
    together = gather_tokens(x, index)
    for b in range(batch):
        assert torch.equal(together[b : b + 1], gather_tokens(x[b : b + 1], index[b : b + 1]))


@given(seed=st.integers(0, 2**16), first=st.integers(0, 20), second=st.integers(0, 20))
def test_gathering_twice_is_gathering_the_gathered_index(seed, first, second, device):
    x = normal(2, 15, 3, device=device, seed=seed)
    outer = random_index(2, first, total=15, seed=seed, device=device).clamp_min(0)
    inner = random_index(2, second, total=first, seed=seed + 1, device=device)
    inner = inner if first else inner.fill_(-1)
    composed = gather_tokens(outer[..., None] + 1, inner)[..., 0] - 1  # padding: 0 - 1
    twice = gather_tokens(gather_tokens(x, outer), inner)
    assert torch.equal(twice, gather_tokens(x, composed))


def test_threads_agree(device):
    x = normal(2, 3000, 256, device=device)
    index = random_index(2, 2000, total=3000, device=device)
    with threads(1):
        alone = gather_tokens(x, index)
    with threads(2):
        assert torch.equal(gather_tokens(x, index), alone)


@pytest.mark.parametrize("rows", [2, 1], ids=["row-each", "one-row-for-all"])
def test_backward_adds_up_repeated_rows(rows, device):
    x = normal(rows, 10, 4, device=device).requires_grad_()
    index = random_index(2, 25, total=10, device=device)  # 25 of 10 rows: repetitions, and -1
    weights = normal(2, 25, 4, device=device, seed=2).round()  # integers: sums are exact
    actual, expected = (
        torch.autograd.grad((gather(x, index) * weights).sum(), x)[0]
        for gather in (gather_tokens, reference.gather_tokens)
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("rows", [2, 1], ids=["row-each", "one-row-for-all"])
def test_gradient_is_the_numerical_one(rows, device):
    x = normal(rows, 6, 3, device=device).double().requires_grad_()
    index = random_index(2, 9, total=6, device=device)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, index), x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"x": torch.zeros(16, 4)}, r"x must .*, got \[16, 4\]", id="rank"),
        pytest.param({"x": torch.zeros(3, 16, 4)}, "x must .*3|index must .*2", id="batch"),
        pytest.param(
            {"x": torch.zeros(2, 16, 4, dtype=torch.complex128)},
            "x must .*dtype.*, got complex128",
            id="16-bytes",
        ),
        pytest.param(
            {"x": torch.zeros(2, 4, 16).mT},
            r"x must be contiguous.*, got strides \[64, 1, 16\]",
            id="strides",
        ),
        pytest.param(
            {"index": torch.zeros(4).long()}, r"index must .*, got \[4\]", id="index-rank"
        ),
        pytest.param(
            {"index": torch.zeros(2, 4)}, "index must .*dtype.*, got float32", id="index-dtype"
        ),
        pytest.param(
            {"index": torch.zeros(4, 2).long().T},
            r"index must be contiguous.*, got strides \[1, 2\]",
            id="index-strides",
        ),
    ],
)
def test_rejects(changes, message, device):
    call = {"x": torch.zeros(2, 16, 4), "index": torch.zeros(2, 5).long()} | changes
    assert_refuses("gather_tokens", call, f"(?:{message})", device)


@pytest.mark.parametrize("index_type", INDEX_TYPES)
@pytest.mark.parametrize("bad", [16, 17, -2, 2**31 - 1, -(2**31)])
def test_rejects_an_index_out_of_range(bad, index_type, device):
    if device != "cpu":
        pytest.skip("a device assertion on CUDA, as in torch.gather: it would end the process")
    index = torch.zeros(2, 5, dtype=index_type)
    index[1, 4] = bad
    message = rf"gather_tokens: index must be in \[-1, N\) = \[-1, 16\), got {bad}"
    with pytest.raises(RuntimeError, match=message):
        gather_tokens(torch.zeros(2, 16, 4), index)


def test_rejects_a_mix_of_devices(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    with pytest.raises(RuntimeError, match="gather_tokens: index must be on the device of x"):
        gather_tokens(torch.zeros(2, 16, 4, device=device), torch.zeros(2, 5).long())
