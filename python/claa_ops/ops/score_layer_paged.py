import torch
from torch import Tensor

from claa_ops.ops._checks import (
    check,
    check_device_like,
    check_dtype,
    check_kernel_size,
    check_last_dim_contiguous,
    check_pages,
    check_pool_mode,
    check_rank,
    check_sink_logits,
    check_size,
    hint_of,
    strides_of,
)
from claa_ops.ops._pool_mode import PoolMode, pool_mode_code

_op = torch.ops.claa.score_layer_paged.default


def score_layer_paged(
    running: Tensor,
    query: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    rows: Tensor | None = None,
    kernel_size: int = 7,
    pool_mode: PoolMode = "avg",
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> None:
    """Score one more layer of prompts of any lengths, whose keys lie in an engine's pages.

    For each prompt ``r`` of ``N = lengths[r]`` tokens, what :func:`score_layer` does with the last
    ``W`` queries and the ``N`` keys of its pages: ``running[r, : N - W]`` becomes the maximum of
    itself and the scores of all heads. All prompts take one launch, on CUDA without a look at
    ``lengths`` by the host: a call may be captured and replayed with other lengths.

    Args:
        running: ``[R, M]``, float32: the maximum so far, updated in place; begin with zeros. M is
            room for the longest context. Columns at and beyond ``N - W`` stay as they are; so
            does the whole row of a prompt with no more than W tokens. Any strides, last dimension
            contiguous; its rows must not overlap, nor share memory with another argument.
        query: ``[R, W, H, D]``, float32, bfloat16 or float16, after the rotary embedding: the
            last W queries of each prompt. Any strides, last dimension contiguous.
        key_pages: ``[P, L, G, D]``, dtype of ``query`` or float8_e4m3fn; G divides H. P pages of
            L = 16, 32, 64, 128 or 256 tokens. Any strides, last dimension contiguous: a view of
            the keys in a cache that holds keys and values together is read where it is.
        block_table: ``[requests, blocks]``, int32: the pages of each request in the order of its
            tokens. What follows a prompt's last page is not read.
        lengths: ``[R]``, int32: the tokens of each prompt, at most ``M + W`` and what its row of
            ``block_table`` has room for; 0 or less where a row of a padded batch has no
            prompt.
        rows: ``[R]``, int32: the row of ``block_table`` of each prompt; row ``r`` if not given.
        kernel_size, pool_mode, scale, softcap, sink_logits: as in :func:`score_tokens`;
            ``kernel_size`` is at most 257.
        k_scale: one float32 number, the factor on keys of float8_e4m3fn; 1 if not given.

    Returns:
        None; ``running`` is updated.

    Raises:
        RuntimeError: a rank, size, dtype, device or stride is not as above, or ``kernel_size``
            is even. On the CPU also for a length or a page out of range; on CUDA lengths are cut
            to the room there is, and a page out of range reads other memory.
        ValueError: ``pool_mode`` is neither ``"avg"`` nor ``"max"``.

    Accumulates in float32. Deterministic: the bits of a row depend neither on the other prompts,
    nor on L, nor on M, nor on the number of threads. They are those of :func:`score_layer` on the
    prompt alone, but for keys of float8_e4m3fn, and on CUDA for 65 to 256 window queries of a key
    head's group and unaligned keys, where the last bits differ. Autograd does not see the update.

    Source: cross-layer attention aggregation, CLAA (arXiv 2602.16054, section 4).

    Example:
        Two equal heads of one group: each context token has 1/3 + 1/4 from each head. The second
        row has no prompt.

        >>> running = torch.zeros(2, 3)
        >>> query, key_pages = torch.zeros(2, 2, 2, 8), torch.zeros(5, 16, 1, 8)
        >>> block_table = torch.tensor([[4], [0]], dtype=torch.int32)
        >>> lengths = torch.tensor([4, 0], dtype=torch.int32)
        >>> score_layer_paged(running, query, key_pages, block_table, lengths, kernel_size=1)
        >>> running
        tensor([[1.1667, 1.1667, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    _op(
        running,
        query,
        key_pages,
        block_table,
        lengths,
        rows=rows,
        kernel_size=kernel_size,
        pool_mode=pool_mode_code(pool_mode),
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        k_scale=k_scale,
    )


@torch.library.register_fake("claa::score_layer_paged")
def _score_layer_paged_fake(
    running: Tensor,
    query: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    rows: Tensor | None = None,
    kernel_size: int = 7,
    pool_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> None:
    op = "score_layer_paged"
    check_pages(op, query, key_pages, block_table, lengths, rows, k_scale, "[R, W, H, D]")
    check(op, softcap >= 0, lambda: f"softcap must not be negative, got {softcap:g}")
    prompts, _, heads, _ = query.shape
    check_kernel_size(op, kernel_size)
    check(
        op,
        kernel_size <= 257,
        lambda: f"kernel_size must be at most 257, got {hint_of(kernel_size)}",
    )
    check_pool_mode(op, pool_mode)
    check_rank(op, "running", running, 2, "[R, M]")
    check_size(op, "running", running, 0, "R", prompts, "query")
    check_dtype(op, "running", running, torch.float32)
    check_device_like(op, "running", running, query, "query")
    check_last_dim_contiguous(op, "running", running)
    check(
        op,
        (prompts <= 1) | (running.stride(0) >= running.shape[1]),
        lambda: f"running must have rows that do not overlap, got strides {strides_of(running)}",
    )
    check_sink_logits(op, sink_logits, query, heads)
