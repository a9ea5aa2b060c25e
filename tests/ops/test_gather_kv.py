"""gather_kv: the kept rows of keys and values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import claa_ops
from claa_ops import reference
from support.fakes import assert_refuses
from support.inputs import INDEX_TYPES, normal, threads
from support.row_types import ROW_TYPES, as_integers, random_bytes

gather_kv = claa_ops.gather_kv

SHAPES = [  # batch, kv_heads, total, dim, value_dim, kept
    pytest.param((1, 1, 1, 1, 1, 1), id="one-element"),
    pytest.param((2, 3, 37, 5, 7, 11), id="odd-sizes"),
    pytest.param((1, 3, 2047, 64, 64, 204), id="smollm2"),
    pytest.param((1, 8, 4096, 128, 128, 410), id="llama-8b"),
    pytest.param((2, 2, 20, 192, 128, 60), id="more-kept-than-there-are"),
    pytest.param((2, 2, 20, 16, 16, 0), id="keep-none"),
    pytest.param((0, 2, 20, 16, 16, 4), id="empty-batch"),
    pytest.param((2, 2, 20, 0, 16, 4), id="empty-rows"),
    pytest.param((2, 2, 0, 16, 16, 0), id="empty-cache"),
]


def random_index(*shape: int, total: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """Any order, with repetitions and some entries of -1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, max(total, 1), shape, generator=generator).to(device)


def check(key: Tensor, value: Tensor, index: Tensor) -> None:
    actual = gather_kv(key, value, index)
    expected = reference.gather_kv(as_integers(key), as_integers(value), index)
    for rows, expected_rows, source in zip(actual, expected, (key, value), strict=True):
        assert rows.dtype == source.dtype
        assert rows.is_contiguous()
        assert torch.equal(as_integers(rows), expected_rows)


@pytest.mark.parametrize("per_head", [True, False], ids=["index-per-head", "one-index"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, per_head, device):
    batch, kv_heads, total, dim, value_dim, kept = shape
    key = normal(batch, kv_heads, total, dim, device=device)
    value = normal(batch, kv_heads, total, value_dim, device=device, seed=1)
    index_shape = (batch, kv_heads, kept) if per_head else (batch, kept)
    check(key, value, random_index(*index_shape, total=total, device=device))


@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("dim", [1, 3, 16, 80])
def test_moves_any_dtype_as_bytes(dim, dtype, device):
    """Also the bits of NaN; key and value need not agree."""
    key = random_bytes(2, 3, 50, dim, dtype=dtype, device=device)
    value = random_bytes(2, 3, 50, 64, dtype=torch.bfloat16, device=device, seed=1)
    check(key, value, random_index(2, 3, 20, total=50, device=device))
    check(value, key, random_index(2, 20, total=50, device=device))


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_index_is_of_either_type(index_type, device):
    key = normal(2, 3, 40, 8, device=device)
    check(key, -key, random_index(2, 3, 9, total=40, device=device).to(index_type))


def test_padding_gives_zeros(device):
    key = normal(1, 2, 5, 8, device=device)
    index = torch.tensor([[-1, 4, -1]], device=device)
    kept_key, kept_value = gather_kv(key, key.bfloat16(), index)
    assert not kept_key[:, :, ::2].any() and not kept_value[:, :, ::2].any()
    assert torch.equal(kept_key[:, :, 1], key[:, :, 4])


def test_all_padding_needs_no_rows(device):
    key = normal(1, 2, 0, 8, device=device)
    for rows in gather_kv(key, key, torch.full((1, 3), -1, device=device)):
        assert rows.shape == (1, 2, 3, 8) and not rows.any()


def test_reads_strided_arguments(device):
    projected = normal(2, 60, 4, 64, device=device)
    cache = normal(4, 4, 80, 71, device=device, seed=1)
    wide_index = random_index(2, 8, 40, total=60, device=device)
    check(projected.transpose(1, 2), cache[::2, :, 10:70, 3:67], wide_index[:, ::2, 4:30])
    check(
        cache[1::2, :, :60, :5],
        projected.transpose(1, 2)[..., 1:],
        wide_index[:, 0, 7:],
    )
    check(
        cache[:2, :1, :60].expand(2, 4, 60, 71),
        cache[:2, :, :60],
        wide_index[:1, :4].expand(2, 4, 40),
    )


@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    total=st.integers(1, 40),
    dim=st.integers(1, 20),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_scattering_back_restores_the_kept_rows(batch, kv_heads, total, dim, seed, data, device):
    key = normal(batch, kv_heads, total, dim, device=device, seed=seed)
    kept = data.draw(st.integers(0, total), label="kept")
    scores = normal(batch, kv_heads, total, device=device, seed=seed)
    index = scores.argsort(-1)[..., :kept]  # any order, no repetition
    rows, negated = gather_kv(key, -key, index)
    where = index[..., None].expand_as(rows)
    restored = torch.zeros_like(key).scatter(2, where, rows)
    was_kept = torch.zeros_like(key).scatter(2, where, 1.0)
    assert torch.equal(restored, key * was_kept)
    assert torch.equal(negated, -rows)


@given(batch=st.integers(1, 3), kept=st.integers(0, 30), seed=st.integers(0, 2**16))
def test_a_row_does_not_know_its_batch(batch, kept, seed, device):
    key = normal(batch, 2, 25, 6, device=device, seed=seed)
    index = random_index(batch, 2, kept, total=25, seed=seed, device=device)
    together = gather_kv(key, key.half(), index)
    for b in range(batch):
        row = slice(b, b + 1)
        alone = gather_kv(key[row], key[row].half(), index[row])
        assert all(torch.equal(x[row], y) for x, y in zip(together, alone, strict=True))


def test_all_rows_in_order_are_the_tensor(device):
    key = normal(2, 3, 50, 16, device=device)
    rows, _ = gather_kv(key, key, torch.arange(50, device=device).expand(2, 50))
    assert torch.equal(rows, key)


def test_threads_agree(device):
    key = normal(2, 4, 3000, 64, device=device)
    index = random_index(2, 4, 2000, total=3000, device=device)
    with threads(1):
        alone = gather_kv(key, -key, index)
    with threads(2):
        assert all(map(torch.equal, gather_kv(key, -key, index), alone))


@pytest.mark.parametrize("per_head", [True, False], ids=["index-per-head", "one-index"])
def test_backward_adds_up_repeated_rows(per_head, device):
    key = normal(2, 3, 10, 4, device=device).requires_grad_()
    value = normal(2, 3, 10, 6, device=device, seed=1).requires_grad_()
    index = random_index(2, 3, 25, total=10, device=device)  # 25 of 10 rows: repetitions, and -1
    index = index if per_head else index[:, 0]
    weights = normal(2, 3, 25, 6, device=device, seed=2).round()  # integers: sums are exact

    def gradients(gather) -> tuple[Tensor, ...]:
        rows, value_rows = gather(key, value, index)
        total = (rows * weights[..., :4]).sum() + (value_rows * weights).sum()
        return torch.autograd.grad(total, (key, value))

    actual, expected = gradients(gather_kv), gradients(reference.gather_kv)
    assert all(map(torch.equal, actual, expected))


def test_backward_of_keys_alone(device):
    key = normal(1, 2, 6, 4, device=device).requires_grad_()
    rows, _ = gather_kv(key, key.detach(), torch.tensor([[5, -1, 0]], device=device))
    rows.sum().backward()
    expected = torch.zeros(6, device=device)
    expected[[0, 5]] = 1
    assert torch.equal(key.grad, expected[None, None, :, None].expand_as(key))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"key": torch.zeros(3, 16, 4)}, r"key must .*, got \[3, 16, 4\]", id="key-rank"
        ),
        pytest.param(
            {"value": torch.zeros(3, 16, 4)}, r"value must .*, got \[3, 16, 4\]", id="value-rank"
        ),
        pytest.param({"value": torch.zeros(1, 3, 16, 4)}, "value must .*1", id="value-batch"),
        pytest.param({"value": torch.zeros(2, 2, 16, 4)}, "value must .*2", id="value-heads"),
        pytest.param({"value": torch.zeros(2, 3, 15, 4)}, "value must .*15", id="value-length"),
        pytest.param(
            {"key": torch.zeros(2, 3, 16, 4, dtype=torch.complex128)},
            "key must .*dtype.*, got complex128",
            id="key-of-16-bytes",
        ),
        pytest.param(
            {"value": torch.zeros(2, 3, 16, 4, dtype=torch.complex128)},
            "value must .*dtype.*, got complex128",
            id="value-of-16-bytes",
        ),
        pytest.param(
            {"key": torch.zeros(2, 3, 4, 16).mT},
            r"key must be contiguous.*, got strides \[",
            id="key-strides",
        ),
        pytest.param(
            {"value": torch.zeros(2, 3, 4, 16).mT},
            r"value must be contiguous.*, got strides \[",
            id="value-strides",
        ),
        pytest.param(
            {"index": torch.zeros(4).long()}, r"index must .*, got \[4\]", id="index-rank"
        ),
        pytest.param({"index": torch.zeros(1, 4).long()}, "index must .*1", id="index-batch"),
        pytest.param({"index": torch.zeros(2, 4, 5).long()}, "index must .*4", id="index-heads"),
        pytest.param(
            {"index": torch.zeros(2, 4)}, "index must .*dtype.*, got float32", id="index-dtype"
        ),
        pytest.param(
            {"index": torch.zeros(2, 4).short()},
            "index must .*dtype.*, got int16",
            id="index-int16",
        ),
        pytest.param(
            {"index": torch.zeros(4, 2).long().T},
            r"index must be contiguous.*, got strides \[",
            id="index-strides",
        ),
    ],
)
def test_rejects(changes, message, device):
    call = {"key": torch.zeros(2, 3, 16, 4), "value": torch.zeros(2, 3, 16, 8)}
    call |= {"index": torch.zeros(2, 5).long()} | changes
    assert_refuses("gather_kv", call, message, device)


@pytest.mark.parametrize("index_type", INDEX_TYPES)
@pytest.mark.parametrize("bad", [16, 17, -2, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("per_head", [True, False], ids=["index-per-head", "one-index"])
def test_rejects_an_index_out_of_range(per_head, bad, index_type, device):
    if device != "cpu":
        pytest.skip("a device assertion on CUDA, as in torch.gather: it would end the process")
    key = torch.zeros(2, 3, 16, 4)
    index = torch.zeros((2, 3, 5) if per_head else (2, 5), dtype=index_type)
    index.view(-1)[-1] = bad
    message = rf"gather_kv: index must be in \[-1, N\) = \[-1, 16\), got {bad}"
    with pytest.raises(RuntimeError, match=message):
        gather_kv(key, key, index)


def test_rejects_a_mix_of_devices(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    key = torch.zeros(2, 3, 16, 4, device=device)
    with pytest.raises(RuntimeError, match="gather_kv: index must be on the device of key"):
        gather_kv(key, key, torch.zeros(2, 5).long())
