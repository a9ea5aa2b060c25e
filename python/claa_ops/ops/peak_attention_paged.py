import torch
from torch import Tensor

from claa_ops.ops._checks import (
    check,
    check_device_like,
    check_dtype,
    check_last_dim_contiguous,
    check_pages,
    check_rank,
    check_size,
    strides_of,
)

_op = torch.ops.claa.peak_attention_paged.default


def peak_attention_paged(
    running: Tensor,
    query: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    rows: Tensor | None = None,
    scale: float | None = None,
    k_scale: Tensor | None = None,
) -> None:
    """The peaks of one more layer of prompts of any lengths, whose keys lie in an engine's pages.

    For each prompt ``r`` of ``N = lengths[r]`` tokens, what :func:`peak_attention` does with its
    queries and the ``N`` keys of its pages: ``running[r, :, :N]`` becomes the maximum of itself
    and the largest attention, over heads, that each query pays to each key. All prompts take one
    launch, on CUDA without a look at ``lengths`` by the host: a call may be captured and replayed
    with other lengths.

    Args:
        running: ``[R, T, M]``, float32: the peaks so far, updated in place; begin with zeros. M is
            room for the longest prompt. Columns at and beyond ``N`` stay as they are. Last
            dimension contiguous; its rows must not overlap, nor share memory with another
            argument.
        query: ``[R, T, H, D]``, float32, bfloat16 or float16, after the rotary embedding. Any
            strides, last dimension contiguous.
        key_pages, block_table, rows, k_scale: as in :func:`score_layer_paged`.
        lengths: ``[R]``, int32: the tokens of each prompt, at most ``M`` and what its row of
            ``block_table`` has room for; 0 or less where a row of a padded batch has no
            prompt.
        scale: factor on the products; ``D ** -0.5`` if not given.

    Returns:
        None; ``running`` is updated.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above. On the CPU also for a
            length or a page out of range; on CUDA lengths are cut to the room there is, and a
            page out of range reads other memory.

    Accumulates in float32. Deterministic: the bits of a row depend neither on the other prompts,
    nor on L, nor on M, nor on the number of threads. They are those of :func:`peak_attention` on
    the prompt alone, but for keys of float8_e4m3fn, and on GPUs other than Hopper for more than 64
    queries of a key head's group, where the last bits differ. Autograd does not see the update.

    Source: the Answer-Informed Oracle of CLAA (arXiv 2602.16054) and Speculative Prefill
    (arXiv 2502.02789).

    Example:
        Zero logits give every key the same share.

        >>> running = torch.zeros(1, 1, 5)
        >>> query, key_pages = torch.zeros(1, 1, 2, 8), torch.zeros(3, 16, 1, 8)
        >>> block_table, lengths = torch.tensor([[2]]).int(), torch.tensor([4]).int()
        >>> peak_attention_paged(running, query, key_pages, block_table, lengths)
        >>> running
        tensor([[[0.2500, 0.2500, 0.2500, 0.2500, 0.0000]]])
    """
    _op(
        running,
        query,
        key_pages,
        block_table,
        lengths,
        rows=rows,
        scale=scale,
        k_scale=k_scale,
    )


@torch.library.register_fake("claa::peak_attention_paged")
def _peak_attention_paged_fake(
    running: Tensor,
    query: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    rows: Tensor | None = None,
    scale: float | None = None,
    k_scale: Tensor | None = None,
) -> None:
    op = "peak_attention_paged"
    check_pages(op, query, key_pages, block_table, lengths, rows, k_scale, "[R, T, H, D]")
    prompts, queries, _, _ = query.shape
    check_rank(op, "running", running, 3, "[R, T, M]")
    check_size(op, "running", running, 0, "R", prompts, "query")
    check_size(op, "running", running, 1, "T", queries, "query")
    check_dtype(op, "running", running, torch.float32)
    check_device_like(op, "running", running, query, "query")
    check_last_dim_contiguous(op, "running", running)
    most, stride_b, stride_t = running.shape[2], running.stride(0), running.stride(1)
    one_prompt, one_query = prompts <= 1, queries <= 1
    by_prompt = (one_query | (stride_t >= most)) & (
        one_prompt | (stride_b >= (queries - 1) * stride_t + most)
    )
    by_query = (one_prompt | (stride_b >= most)) & (
        one_query | (stride_t >= (prompts - 1) * stride_b + most)
    )
    check(
        op,
        by_prompt | by_query,
        lambda: f"running must have rows that do not overlap, got strides {strides_of(running)}",
    )
