from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from claa_ops.methods.peak import Peak
from claa_ops.ops.hop_tokens import hop_tokens
from claa_ops.selection.budget import is_count, is_number
from claa_ops.selection.layer import Layer
from claa_ops.selection.padding import mask_padding
from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class Hops(Peak):
    """Peak, and the tokens that what it finds leads to: the links of a chain of facts.

    A question names the first link of a chain, and no attention of its tokens reaches the others
    in the first layers. But each link shares words with the next, so that the early states of
    their tokens are alike. At a selection layer the best tokens by :class:`Peak` are seeds; tokens
    whose states are like theirs are the first hop and the seeds of the second, and so on
    (:func:`claa_ops.hop_tokens`). Each hop has a share of the budget: Peak's own ranking the first
    ``least`` tokens and at least two shares, each hop one.

    Args:
        keep, layer, keep_kv, first_full, num_sinks, equal_cache, window, kernel_size, pool_mode:
            see :class:`Peak`.
        hops: how many hops; 0 for Peak alone.
        num_seeds: tokens that a hop starts from.
        temperature: of the similarity; the lower, the fewer tokens a seed leads to.
        least: tokens of the budget that Peak's own ranking gets before any hop.
        states: what of a token is compared: its ``"value"`` in the selection layer, which is small
            and in every cache; or its ``"hidden"`` state, the layer's input, which is whole on each
            device of a tensor-parallel model.

    Raises:
        ValueError: a setting is out of its range; or, in a prefill, ``states`` is ``"value"`` and
            the heads are on several devices.

    Source: ours. docs/quality.md measures what it keeps and what it does not.

    Example:
        >>> method = Hops(keep=0.2, layer=3)
    """

    hops: int = 4
    num_seeds: int = 64
    temperature: float = field(default=0.1, kw_only=True)
    least: int = field(default=160, kw_only=True)
    states: Literal["value", "hidden"] = field(default="value", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_count(self.hops, 0), "hops", "an integer of at least 0")
        self.require(is_count(self.num_seeds, 1), "num_seeds", "a positive integer")
        warm = is_number(self.temperature) and self.temperature >= 0.025
        self.require(warm, "temperature", "at least 0.025")
        self.require(is_count(self.least, 0), "least", "an integer of at least 0")
        self.require(self.states in ("value", "hidden"), "states", "'value' or 'hidden'")

    @property
    def reads_hidden(self) -> bool:
        """If hidden states are compared."""
        return self.states == "hidden"

    def begin(self, state: PrefillState) -> None:
        """Refuse values of a part of the heads."""
        super().begin(state)
        if state.reduce is not None and self.states == "value" and self.hops:
            raise ValueError(
                "Hops: states must be 'hidden' where the heads are on several devices, "
                f"got {self.states!r}"
            )

    def rank(self, layer: Layer, before: Tensor | None) -> Tensor:
        """Peak's ranking; at a selection layer, the order in which tokens enter the budget."""
        peaks = super().rank(layer, before)
        if not self.hops or layer.index not in self.stages(layer.state.num_layers):
            return peaks
        found = hop_tokens(
            peaks,
            layer.value if self.states == "value" else layer.hidden[:, None],
            hops=self.hops,
            num_seeds=self.num_seeds,
            temperature=self.temperature,
            kernel_size=self.kernel_size,
            pool_mode=self.pool_mode,
            start=layer.start,
        )
        places = _places(mask_padding(torch.cat([peaks[:, None], found], dim=1), layer.start, -1))
        return -self._entries(places)

    def _entries(self, places: Tensor) -> Tensor:
        """With how large a budget each token is kept, ``[B, M]``, from its places in each ranking.

        Args:
            places: ``[B, 1 + hops, M]``: in Peak's ranking and in that of each hop.
        """
        peak, hops = places[:, 0], places[:, 1:].amin(dim=1)
        shares = self.hops + 2
        # Peak alone fills the first tokens; then the hops take theirs in turn, until each has its
        # share; from then on all grow alike. Of two that come at once Peak's is first.
        direct = torch.where(peak < self.least, peak, (peak * (shares / 2)).clamp_min(self.least))
        linked = torch.maximum(self.least + self.hops * hops, shares * hops) + 0.25
        return torch.minimum(direct, linked)


def _places(rankings: Tensor) -> Tensor:
    """The place of each token in each ranking ``[..., M]``, from 0, float32."""
    order = rankings.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(rankings.shape[-1], device=order.device, dtype=torch.float32)
    return torch.empty_like(rankings).scatter_(-1, order, place.expand_as(rankings))
