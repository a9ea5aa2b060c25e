"""Tokens that were dropped and are taken up again: who sees whom, and where their entries go."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TakenUp:
    """Tokens of the prompt that later layers take up again, beside those that they hold.

    Their hidden states were parked. They go through the later layers behind the entries that these
    hold, and before the tokens of a turn, if there is one. Who sees whom goes by position.

    Attributes:
        index: ``[B, r]``, int64, ascending: their places in the prompt, after -1 where a row takes
            up fewer.
        among_parked: ``[B, r]``, likewise: their places among the tokens that were parked.
        held: ``[B, k]``, likewise: the tokens of the prompt that the later layers held before.
        prompt_length: N, padding included.
        seen: how many tokens the conversation has, those of the turn included.
        new: how many of these are the turn's.
        valid: ``[B, seen - prompt_length]``, bool: which tokens after the prompt are no padding;
            None if none is.
    """

    index: Tensor
    among_parked: Tensor
    held: Tensor
    prompt_length: int
    seen: int
    new: int
    valid: Tensor | None = None

    @property
    def start(self) -> Tensor:
        """``[B]``, int64: how many of ``index``, the first, are padding."""
        return (self.index < 0).sum(dim=1)

    @property
    def places(self) -> Tensor:
        """``[B, k + t + r + n]``: where the entries of a later layer stand in the conversation.

        These are the k held before, the t that came between prompt and turn, the r that are taken
        up and the n of the turn. Padding is at -1.
        """
        after = torch.arange(self.prompt_length, self.seen, device=self.held.device)
        after = after.expand(self.held.shape[0], -1)
        between, turn = after.tensor_split([after.shape[1] - self.new], dim=1)
        return torch.cat([self.held, between, self.index, turn], dim=1)

    def visible(self) -> Tensor:
        """``[B, r + n, k + t + r + n]``, bool: which entries each of these tokens attends to.

        To all that come before it in the conversation, and to itself; padding to itself alone.
        """
        places, queries = self.places, self.index.shape[1] + self.new
        before = places.shape[1] - queries
        seen = (places[:, None] >= 0) & (places[:, None] <= places[:, before:, None])
        if self.valid is not None:
            between, turn = self.valid.tensor_split([self.valid.shape[1] - self.new], dim=1)
            parts = torch.ones_like(self.held, dtype=torch.bool), between, self.index >= 0, turn
            seen = seen & torch.cat(parts, dim=1)[:, None]
        itself = torch.eye(queries, dtype=torch.bool, device=places.device)
        return seen | torch.nn.functional.pad(itself, (before, 0))

    def order(self) -> Tensor:
        """``[B, m]``, int64: the entries in the order of their places, without needless padding."""
        return self.places.sort(dim=1, stable=True).indices[:, self._spare :]

    def all_held(self) -> Tensor:
        """``[B, l]``, int64: the tokens of the prompt that the later layers hold from now on."""
        return self._sorted[:, self._spare :]

    @cached_property
    def _sorted(self) -> Tensor:
        return torch.cat([self.held, self.index], dim=1).sort(dim=1).values

    @cached_property
    def _spare(self) -> int:
        """How many entries of each row are padding that no row needs any more."""
        return int((self._sorted < 0).sum(dim=1).min())
