"""Statistics that ignore left padding."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_kept(x: Tensor, index: Tensor) -> Tensor:
    """``x[..., n]`` of each row at its kept tokens ``[B, k]``; 0 at padding, where they are -1."""
    at = index.view(index.shape[0], *[1] * (x.dim() - 2), -1).expand(*x.shape[:-1], -1)
    return x.gather(-1, at.clamp_min(0)).masked_fill(at < 0, 0)


def places_in_prompt(tokens: int, start: Tensor | None, device: torch.device) -> Tensor:
    """``[1 or B, n]``, int64: the place of each of n tokens, from 0; below 0 at padding."""
    place = torch.arange(tokens, device=device)[None]
    return place if start is None else place - start[:, None]


def mask_padding(scores: Tensor, start: Tensor | None, fill: float) -> Tensor:
    """Scores ``[B, ..., M]`` with ``fill`` at padding, before ``start`` ``[B]``."""
    if start is None:
        return scores
    position = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(position < start.view(-1, *[1] * (scores.dim() - 1)), fill)


def standardise(scores: Tensor, start: Tensor | None) -> Tensor:
    """Scores ``[B, G, M]`` less their mean, over their standard deviation, without padding."""
    context = scores.shape[-1]
    if start is None:
        valid, count = torch.ones_like(scores), scores.new_full((1, 1, 1), context)
    else:
        position = torch.arange(context, device=scores.device)
        valid = (position >= start[:, None]).to(scores.dtype)[:, None]
        count = valid.sum(dim=-1, keepdim=True)
    mean = (scores * valid).sum(dim=-1, keepdim=True) / count.clamp_min(1)
    centred = (scores - mean) * valid
    # Bessel's correction, as in the public code; a single token has no deviation.
    variance = centred.square().sum(dim=-1, keepdim=True) / (count - 1).clamp_min(1)
    return centred / (variance.sqrt() + 1e-8)
