import torch
from torch import Tensor

from claa_ops.ops._autograd import without_gradient
from claa_ops.ops._checks import (
    check,
    check_device_like,
    check_dtype,
    check_float_dtype,
    check_kernel_size,
    check_last_dim_contiguous,
    check_not_negative,
    check_pool_mode,
    check_rank,
    check_row_integers,
    check_size,
    hint_of,
)
from claa_ops.ops._pool_mode import PoolMode, pool_mode_code

_op = torch.ops.claa.hop_tokens.default


def hop_tokens(
    scores: Tensor,
    states: Tensor,
    *,
    hops: int = 4,
    num_seeds: int = 64,
    temperature: float = 0.1,
    gap: int = 8,
    kernel_size: int = 25,
    pool_mode: PoolMode = "avg",
    start: Tensor | None = None,
) -> Tensor:
    """Scores of the tokens that a chain of facts leads to, hop by hop.

    The seeds of the first hop are the ``num_seeds`` best tokens by ``scores``. A token's link to a
    seed is the softmax, over all tokens more than ``gap`` positions from the seed, of the cosine of
    their states over ``temperature``, after the mean state of the prompt is taken off. A token's
    score is its largest link to a seed, pooled over ``kernel_size`` neighbours as in
    :func:`claa_ops.pool_heads`. The seeds of the next hop are the best tokens by this score that
    were no seeds before. A tie goes to the lower position. A hop has fewer seeds where fewer
    tokens are left, and scores of 0 where none is.

    Args:
        scores: ``[B, M]``, float32: a direct ranking of the context tokens; any strides, last
            dimension contiguous.
        states: ``[B, G, N, D]``, N >= M, float32, bfloat16 or float16: a vector for each token, in
            G pieces of D channels, such as the values of a layer, or its hidden states with G = 1.
            Those of tokens from M on are not read. Any strides, last dimension contiguous.
        hops: number of hops; at least 1.
        num_seeds: number of tokens that each hop starts from; at least 1.
        temperature: of the softmax; at least 0.025.
        gap: tokens up to so many positions from a seed have no link to it.
        kernel_size: neighbours of a token that are pooled, itself included; odd.
        pool_mode: ``"avg"``, where neighbours that do not exist count as zeros, or ``"max"``.
        start: ``[B]``, int64 or int32: the first valid token of each row; those before it (left
            padding) are not read and have scores of 0.

    Returns:
        ``[B, hops, M]``, float32.

    Raises:
        RuntimeError: a rank, size, dtype or stride is not as above, or a number is out of range.
        ValueError: ``pool_mode`` is unknown.

    Accumulates in float32; deterministic. Not differentiable: a backward pass through the result is
    an error.

    Source: our own.

    Example:
        Tokens 0 and 3 point one way, 1 and 2 the other. From the best token, 0, the first hop
        leads to 3, and from there, the best of the others, the second hop leads back to 0.

        >>> states = torch.tensor([[1.0], [-1.0], [-1.0], [1.0]])[None, None]
        >>> hop_tokens(
        ...     torch.tensor([[9.0, 1.0, 1.0, 1.0]]), states,
        ...     hops=2, num_seeds=1, gap=0, kernel_size=1,
        ... ).round(decimals=3)
        tensor([[[0., 0., 0., 1.],
                 [1., 0., 0., 0.]]])
    """
    found = _op(
        scores,
        states,
        hops=hops,
        num_seeds=num_seeds,
        temperature=temperature,
        gap=gap,
        kernel_size=kernel_size,
        pool_mode=pool_mode_code(pool_mode),
        start=start,
    )
    return without_gradient("hop_tokens", found)


@torch.library.register_fake("claa::hop_tokens")
def _hop_tokens_fake(
    scores: Tensor,
    states: Tensor,
    *,
    hops: int = 4,
    num_seeds: int = 64,
    temperature: float = 0.1,
    gap: int = 8,
    kernel_size: int = 25,
    pool_mode: int = 0,
    start: Tensor | None = None,
) -> Tensor:
    op = "hop_tokens"
    check_rank(op, "scores", scores, 2, "[B, M]")
    check_rank(op, "states", states, 4, "[B, G, N, D]")
    check_dtype(op, "scores", scores, torch.float32)
    check_float_dtype(op, "states", states)
    check_device_like(op, "states", states, scores, "scores")
    batch, context = scores.shape
    _, pieces, total, dim = states.shape
    check_size(op, "states", states, 0, "B", batch, "scores")
    check(
        op,
        total >= context,
        lambda: f"N must be at least M = {hint_of(context)}, got {hint_of(total)}",
    )
    check(op, pieces > 0, lambda: "G must be at least 1, got 0")
    check(op, dim > 0, lambda: "D must be at least 1, got 0")
    check_last_dim_contiguous(op, "scores", scores)
    check_last_dim_contiguous(op, "states", states)
    check(op, hops > 0, lambda: f"hops must be at least 1, got {hint_of(hops)}")
    check(op, num_seeds > 0, lambda: f"num_seeds must be at least 1, got {hint_of(num_seeds)}")
    check(
        op,
        temperature >= 0.025,
        lambda: f"temperature must be at least 0.025, got {temperature:g}",
    )
    check_not_negative(op, "gap", gap)
    check_kernel_size(op, kernel_size)
    check_pool_mode(op, pool_mode)
    check_row_integers(op, "start", start, batch, scores, "scores")
    return scores.new_empty((batch, hops, context))
