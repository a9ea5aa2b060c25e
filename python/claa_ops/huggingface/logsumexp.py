"""Causal attention that also returns the logsumexp, which its kernel computes anyway."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

Kernel = Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor] | None]

# For more tokens cuDNN 9.19 takes 2 % longer with the logsumexp, 5 ms a layer at 128k on an H100,
# where scoring without it takes 0.09 ms longer.
CUDNN_TOKENS = 65_536


def attention_and_logsumexp(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor] | None:
    """Causal attention of a whole prompt, by the kernel that SDPA would run, and its logsumexp.

    With the logsumexp, :func:`claa_ops.score_tokens` reads the keys once instead of twice.

    Args:
        query: ``[B, H, N, D]``.
        key: ``[B, G, N, D]``; G divides H, and the heads of a group are not repeated.
        value: ``[B, G, N, D]``.
        scale: factor on the products; ``D ** -0.5`` if not given.

    Returns:
        What ``scaled_dot_product_attention(..., is_causal=True, enable_gqa=True)`` returns, bit
        for bit, and ``[B, H, N]``, float32: the natural logarithm of the sum of exponentials of
        each query's logits. None where SDPA's kernel gives no logsumexp: on the CPU, for float32,
        and while torch.compile traces, which cannot follow SDPA's choice; and where it costs more
        than it saves: from cuDNN for more than ``CUDNN_TOKENS`` tokens.
    """
    if not query.is_cuda or torch.compiler.is_compiling() or not _fit(query, key, value):
        return None
    # SDPA's own choice, which also obeys torch.nn.attention.sdpa_kernel.
    choice = torch._fused_sdp_choice(
        query, key, value, None, 0.0, True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    kernel = _KERNELS.get(SDPBackend(choice))
    return None if kernel is None else kernel(query, key, value, scale)


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels take these shapes as they are; SDPA pads or repeats others first."""
    width = query.shape[3]
    return width % 8 == 0 and width == value.shape[3] and query.shape[2] == key.shape[2]


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, True, scale=scale
    )
    return output, lse


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    if query.shape[2] > CUDNN_TOKENS:
        return None
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, True, scale=scale
    )
    return output, lse.view(query.shape[:3])


_KERNELS: dict[SDPBackend, Kernel] = {
    SDPBackend.FLASH_ATTENTION: _flash,
    SDPBackend.CUDNN_ATTENTION: _cudnn,
}
