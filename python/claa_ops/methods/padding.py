from __future__ import annotations

import torch
from torch import Tensor


def mask_padding(scores: Tensor, start: Tensor | None, fill: float) -> Tensor:
    """Scores ``[B, ..., M]`` with ``fill`` before ``start`` ``[B]``, the first valid tokens."""
    if start is None:
        return scores
    position = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(position < start.view(-1, *[1] * (scores.dim() - 1)), fill)
