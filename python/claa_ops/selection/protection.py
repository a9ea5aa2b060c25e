"""Tokens that a selection never drops, whatever their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from claa_ops.selection.budget import Sizes


@dataclass(frozen=True)
class Protection:
    """What a selection has to keep beside the window. A budget is then one of the other tokens.

    Attributes:
        tokens: ``[B, M]``, bool: which of the tokens before the window.
        count: ``[B]``, int64: how many.
    """

    tokens: Tensor
    count: Tensor

    def first(self, scores: Tensor) -> Tensor:
        """Scores ``[B, ..., M]`` that rank these tokens before all others."""
        tokens = self.tokens.view(len(self.tokens), *[1] * (scores.dim() - 2), -1)
        most = torch.finfo(scores.dtype).max
        return scores.clamp_max(most).masked_fill(tokens, torch.inf)

    def others(self, sizes: Sizes[Any]) -> Sizes[Tensor]:
        """The lengths ``[B]`` without these tokens."""
        return Sizes(sizes.prompt - self.count, sizes.seen - self.count, sizes.num_layers)


def check_protect(caller: str, protect: object, tokens: int) -> None:
    """Raise unless it is None or a mask ``[B, N]`` of prompts of so many tokens."""
    if protect is None:
        return
    if not isinstance(protect, Tensor):
        raise TypeError(f"{caller}: protect must be a tensor, got {type(protect).__name__}")
    if protect.dtype != torch.bool:
        raise ValueError(f"{caller}: protect must be bool, got {protect.dtype}")
    if protect.dim() != 2 or protect.shape[1] != tokens:
        raise ValueError(
            f"{caller}: protect must have shape [batch, {tokens}], got {list(protect.shape)}"
        )
