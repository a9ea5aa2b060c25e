import torch
from torch import Tensor

from claa_ops.ops._checks import (
    check,
    check_device_like,
    check_dtype,
    check_last_dim_contiguous,
    check_rank,
    check_size,
    hint_of,
)
from claa_ops.ops._pages import check_integers, check_page_table

_op = torch.ops.claa.kept_metadata.default


def kept_metadata(
    seq_lens: Tensor,
    slots: Tensor,
    logical_seq_lens: Tensor,
    prompts: Tensor,
    kept: Tensor,
    block_table: Tensor,
    block_size: int,
) -> None:
    """Lengths and slots of the layers behind a selection, for one step of decoding.

    Of a prompt of ``prompts[r]`` tokens these layers hold ``kept[r]``, and every token after it:
    ``seq_lens[r] = logical_seq_lens[r] - prompts[r] + kept[r]`` entries. The Q new tokens of a
    request, which ``logical_seq_lens`` counts, are the last of them: entry e is slot
    ``block_table[r, e // block_size] * block_size + e % block_size``.

    Args:
        seq_lens: ``[R]``, int32: the result; 0 for a row of padding, whose ``logical_seq_lens`` is
            0, and for a prompt that is not over yet.
        slots: ``[R * Q]``, int64: the result, Q slots for each request; -1 where there is no entry.
        logical_seq_lens: ``[R]``, int32 or int64: tokens of each request so far, new ones
            included. It shares no memory with a result.
        prompts, kept: ``[R]``, int32 or int64; not read for a row of padding.
        block_table: ``[R, blocks]``, int32 or int64: the pages of these layers.
        block_size: entries of a page.

    Returns:
        None; ``seq_lens`` and ``slots`` are written.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above, or on the CPU a
            request has more entries than its pages hold.

    Exact. Not differentiable.

    Source: the slot mapping of PagedAttention (arXiv 2309.06180), behind the token propagation of
    CLAA (arXiv 2602.16054).

    Example:
        Ten tokens kept of a prompt of 100, and the third token after it; then a row of padding.

        >>> seq_lens, slots = torch.empty(2, dtype=torch.int32), torch.empty(2, dtype=torch.int64)
        >>> logical, prompts, kept = torch.tensor([[103, 0], [100, 0], [10, 0]])
        >>> table = torch.tensor([[7], [0]])
        >>> kept_metadata(seq_lens, slots, logical, prompts, kept, table, block_size=16)
        >>> seq_lens, slots
        (tensor([13,  0], dtype=torch.int32), tensor([124,  -1]))
    """
    _op(seq_lens, slots, logical_seq_lens, prompts, kept, block_table, block_size)


@torch.library.register_fake("claa::kept_metadata")
def _kept_metadata_fake(
    seq_lens: Tensor,
    slots: Tensor,
    logical_seq_lens: Tensor,
    prompts: Tensor,
    kept: Tensor,
    block_table: Tensor,
    block_size: int,
) -> None:
    op = "kept_metadata"
    check_rank(op, "seq_lens", seq_lens, 1, "[R]")
    check_rank(op, "slots", slots, 1, "[R * Q]")
    check_dtype(op, "seq_lens", seq_lens, torch.int32)
    check_dtype(op, "slots", slots, torch.int64)
    check_device_like(op, "slots", slots, seq_lens, "seq_lens")
    check_last_dim_contiguous(op, "seq_lens", seq_lens)
    check_last_dim_contiguous(op, "slots", slots)
    requests = seq_lens.shape[0]
    check(
        op,
        slots.shape[0] % torch.sym_max(requests, 1) == 0,
        lambda: (
            f"slots must have as many entries for each of the R = {hint_of(requests)} requests of "
            f"seq_lens, got {hint_of(slots.shape[0])}"
        ),
    )
    check(op, block_size > 0, lambda: f"block_size must be positive, got {hint_of(block_size)}")
    check_integers(op, "logical_seq_lens", logical_seq_lens, "R", requests, seq_lens, "seq_lens")
    check_integers(op, "prompts", prompts, "R", requests, seq_lens, "seq_lens")
    check_integers(op, "kept", kept, "R", requests, seq_lens, "seq_lens")
    check_page_table(op, block_table, seq_lens, "seq_lens")
    check_size(op, "block_table", block_table, 0, "R", requests, "seq_lens")
