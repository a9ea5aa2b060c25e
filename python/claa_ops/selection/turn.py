"""Tokens that were dropped and are taken up again, such as in a later turn of a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from claa_ops.selection.state import PrefillState

if TYPE_CHECKING:
    from claa_ops.selection.layer import Layer


@dataclass(frozen=True)
class TakenUp:
    """Tokens of the prompt that later layers take up again, beside those that they hold.

    Their hidden states were parked. They go through the later layers behind the entries that these
    hold, and before the tokens of the turn, if there is one. Who sees whom goes by position.

    Attributes:
        index: ``[B, r]``, int64, ascending: their places in the prompt, after -1 where a row takes
            up fewer.
        held: ``[B, k]``, likewise: the tokens of the prompt that the later layers held before.
        prompt_length: N, padding included.
        seen: how many tokens the conversation has, those of the turn included.
        new: how many of these are the turn's.
    """

    index: Tensor
    held: Tensor
    prompt_length: int
    seen: int
    new: int

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
        of_query = places[:, -queries:, None] if queries else places[:, :0, None]
        seen = (places[:, None] >= 0) & (places[:, None] <= of_query)
        itself = torch.eye(queries, dtype=torch.bool, device=places.device)
        return seen | torch.nn.functional.pad(itself, (places.shape[1] - queries, 0))

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


class Turn(PrefillState):
    """What a later turn of a conversation has seen, which may take up dropped tokens of the prompt.

    Made by :meth:`PrefillState.turn`. The layers up to the parked one hold all tokens, and the
    turn's last tokens rank those of the prompt there. In the layer loop of the turn, of these::

        turn.observe(layer, query, key)     # after its attention, of the turn's queries to all keys

    Behind the parked layer::

        taken = turn.take_up()
        if taken is not None:
            hidden = torch.cat([gather_tokens(parked, taken.index), hidden], dim=1)   # and angles

    In the layers after it, these tokens attend to what ``taken.visible()`` says, and afterwards
    the cache has to hold its entries in the order of their positions::

        key, value = gather_kv(key, value, taken.order())

    Attributes:
        turn_length: how many tokens the turn has.
        taken: what :meth:`take_up` returned.

    The other attributes are those of :class:`PrefillState`, for the layers up to the parked one.
    """

    def __init__(self, prefill: PrefillState, seen: int, new: int) -> None:
        vars(self).update(vars(prefill))
        _, self.start, self.positions = prefill.seen_when_parked
        self.turn_length, self.length = new, seen + new
        self.taken: TakenUp | None = None
        self.importance = self.running = None
        self.notes, self.lengths, self.scores, self.ahead = {}, [], {}, []
        self.layer, self._call = -1, "select"
        self._prefill = prefill

    @property
    def rows(self) -> int:
        """W: how many of the last query rows rank; all of a turn that has fewer."""
        return min(super().rows, self.turn_length)

    @property
    def held(self) -> Tensor:
        """``[B, k]``: the tokens of the prompt that the layers after the parked one hold."""
        held = self._prefill.positions
        assert held is not None  # something was dropped, or nothing would be parked
        return held

    def see(self, layer: Layer) -> None:
        """Like :meth:`observe`, with a view of the layer that the caller has made."""
        super().see(layer)
        self.release()

    def take_up(self) -> TakenUp | None:
        """The tokens of the prompt that continue with the turn's behind the parked layer.

        From then on the state of the prefill counts them among those that later layers hold.

        Returns:
            None if there are none.

        Raises:
            RuntimeError: the parked layer was not observed just before, or is asked a second time.
        """
        assert self.parked is not None  # or there would be no turn
        self._advance(self.parked, "select")
        index = self.method.take_up(self)
        if index is not None:
            self.taken = TakenUp(
                index, self.held, self.prompt_length, self.length, self.turn_length
            )
            self._prefill.hold(self.taken.all_held())
        return self.taken

    def not_held(self) -> Tensor:
        """``[B, N]``, bool: the tokens of the prompt that the later layers do not hold."""
        held = self.held
        beyond = 1 + self.prompt_length  # padding goes before the prompt
        missing = torch.ones(held.shape[0], beyond, dtype=torch.bool, device=held.device)
        missing = missing.scatter(1, 1 + held, False)[:, 1:]
        if self.start is None:
            return missing
        place = torch.arange(self.prompt_length, device=held.device)
        return missing & (place >= self.start[:, None])
