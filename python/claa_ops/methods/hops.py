from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from claa_ops.methods.peak import Peak
from claa_ops.ops.hop_tokens import hop_tokens
from claa_ops.ops.pool_heads import pool_heads
from claa_ops.selection.budget import is_count, is_number
from claa_ops.selection.layer import Layer
from claa_ops.selection.padding import gather_kept, mask_padding, places_in_prompt
from claa_ops.selection.state import PrefillState

_BEFORE = 8  # tokens before an echo that are as important as the echo


@dataclass(frozen=True)
class Hops(Peak):
    """Peak, the echo of the question in the prompt, and what both lead to: a chain of facts.

    A question names what it asks for, and early states of the same words are alike. So a token is
    an echo if its state is like that of one of the prompt's last tokens, and what comes after an
    echo is likely the answer; no attention of the first layers has to find it. The best tokens by
    :class:`Peak` and by the echo are seeds, and so are the prompt's first ones, since a question
    may stand before the text too. Tokens whose states are like theirs are the first hop and the
    seeds of the second, and so on (:func:`claa_ops.hop_tokens`): the next links of a chain share
    words with the ones before, which the question does not name.

    Each ranking has a share of the budget, Peak and the echo two, each hop one; and Peak and the
    echo have the first ``least`` tokens. In stages each selection ranks what is left, by the peaks
    of all layers so far, and by the echo and the hops of the first selection layer: the states of
    later ones are less alike for the same words.

    Args:
        keep, layer, keep_kv, first_full, equal_cache, keep_least, mass: see :class:`Pruning`.
            The defaults are those with which docs/quality.md measures it, but for ``opening``:
            three tenths of the prompt continue after the layer at a ninth of the depth, and caches
            hold whatever reached their layer.
        num_sinks, window, kernel_size, pool_mode: see :class:`Peak`.
        hops: how many hops; 0 for none.
        question: how many of the prompt's last tokens the echo is of; 0 for no echo.
        reach: tokens after an echo that are as important as the echo itself; even.
        num_seeds: tokens that a hop starts from.
        opening: whether half of the first hop's seeds are the prompt's first tokens. The question
            is among them where nothing but a short system prompt stands before it.
        temperature: of the similarity; the lower, the fewer tokens a seed leads to.
        least: tokens of the budget that no hop has a share of.
        states: what of a token is compared: its ``"value"`` in the selection layer, which is small
            and in every cache; or its ``"hidden"`` state, the layer's input, which is whole on each
            device of a tensor-parallel model.

    Raises:
        ValueError: a setting is out of its range; or, in a prefill, ``states`` is ``"value"`` and
            the heads are on several devices.

    Source: ours. docs/quality.md measures what it keeps and what it does not.

    Example:
        >>> method = Hops(keep=0.3, layer=3)
    """

    keep: float | int | tuple[float | int, ...] = 0.3
    keep_kv: float | int | None = 1.0
    hops: int = 3
    question: int = 32
    reach: int = field(default=48, kw_only=True)
    num_seeds: int = field(default=64, kw_only=True)
    opening: bool = field(default=True, kw_only=True)
    temperature: float = field(default=0.05, kw_only=True)
    least: int = field(default=160, kw_only=True)
    keep_least: int = field(default=256, kw_only=True)
    states: Literal["value", "hidden"] = field(default="value", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_count(self.hops, 0), "hops", "an integer of at least 0")
        self.require(is_count(self.question, 0), "question", "an integer of at least 0")
        even = is_count(self.reach, 0) and self.reach % 2 == 0 and self.reach < 2**15
        self.require(even, "reach", "an even number of tokens below 32,768")
        self.require(is_count(self.num_seeds, 1), "num_seeds", "a positive integer")
        warm = is_number(self.temperature) and self.temperature >= 0.025
        self.require(warm, "temperature", "at least 0.025")
        self.require(is_count(self.least, 0), "least", "an integer of at least 0")
        self.require(self.states in ("value", "hidden"), "states", "'value' or 'hidden'")

    @staticmethod
    def default_layer(num_layers: int) -> int:
        """A ninth of the depth: 3 of 28 to 32."""
        return num_layers // 9

    @property
    def reads_hidden(self) -> bool:
        """If hidden states are compared."""
        return self.states == "hidden"

    def begin(self, state: PrefillState) -> None:
        """Refuse values of a part of the heads."""
        super().begin(state)
        compares = self.hops or self.question
        if state.reduce is not None and self.states == "value" and compares:
            raise ValueError(
                "Hops: states must be 'hidden' where the heads are on several devices, "
                f"got {self.states!r}"
            )

    def rank(self, layer: Layer, before: Tensor | None) -> Tensor:
        """Peak's ranking; at a selection layer, the order in which tokens enter the budget."""
        peaks = super().rank(layer, before)
        layer.state.notes["evidence"] = peaks
        if not (self.hops or self.question) or not self._selects(layer):
            return peaks
        notes = layer.state.notes
        if "led" not in notes:
            notes["led"] = self._led(layer, peaks)
        places = _places(torch.cat([peaks[:, None], notes["led"]], dim=1), layer.start)
        direct = 2 if self.question else 1
        return -self._entries(places[:, :direct], places[:, direct:] if self.hops else None)

    def keep_notes(self, state: PrefillState, layer: int, index: Tensor) -> None:
        """What the first selection found of the tokens that continue, for a later one."""
        super().keep_notes(state, layer, index)
        if layer < max(self.stages(state.num_layers)) and "led" in state.notes:
            context = index[:, : -self.window]
            state.notes["led"] = gather_kept(state.notes["led"], context)

    def evidence(self, state: PrefillState) -> Tensor:
        """Peak's scores: the order of a budget has no mass."""
        return state.notes["evidence"]

    def _selects(self, layer: Layer) -> bool:
        return layer.index in self.stages(layer.state.num_layers)

    def _led(self, layer: Layer, peaks: Tensor) -> Tensor:
        """``[B, r, M]``: what the echo reaches, if there is one, and what each hop leads to."""
        seeds, found = peaks, []
        if self.question:
            echo = self._echo(layer)
            found.append(self._reached(echo)[:, None])
            places = _places(torch.stack([peaks, echo], dim=1), layer.start)
            seeds = -places.amin(dim=1)
        if self.hops:
            if self.opening:
                place = places_in_prompt(layer.context, layer.start, seeds.device)
                first = (place >= 0) & (place < self.num_seeds // 2)
                seeds = seeds.masked_fill(first, torch.inf)
            settings = {"num_seeds": self.num_seeds, "kernel_size": self.kernel_size}
            found.append(self._similar(layer, seeds, hops=self.hops, **settings))
        return torch.cat(found, dim=1)

    def _echo(self, layer: Layer) -> Tensor:
        """``[B, M]``: how like a token is to one of the question; 0 in the question itself."""
        tokens = layer.key.shape[2]
        place = torch.arange(tokens, dtype=torch.float32, device=layer.key.device)
        last = place.expand(layer.key.shape[0], -1).contiguous()
        found = self._similar(layer, last, hops=1, num_seeds=self.question, kernel_size=7)
        echo = found[:, 0].masked_fill(place >= tokens - self.question, 0)
        return echo[:, : layer.context]

    def _reached(self, echo: Tensor) -> Tensor:
        """``[B, M]``: the best echo from ``reach`` tokens before each token to a few behind it."""
        half = (self.reach + _BEFORE) // 2
        padded = F.pad(echo, (half, half))[:, None]
        best = pool_heads(padded, 1, kernel_size=2 * half + 1, pool_mode="max")
        return best[:, 0, _BEFORE : _BEFORE + echo.shape[1]]

    def _similar(self, layer: Layer, scores: Tensor, **settings: int) -> Tensor:
        """:func:`hop_tokens` from the best tokens by these scores."""
        states = layer.value if self.states == "value" else layer.hidden[:, None]
        return hop_tokens(
            scores,
            states,
            temperature=self.temperature,
            pool_mode=self.pool_mode,
            start=layer.start,
            **settings,
        )

    def _entries(self, direct: Tensor, linked: Tensor | None) -> Tensor:
        """With how large a budget each token is kept, ``[B, M]``.

        Args:
            direct: ``[B, 1 or 2, M]``: the tokens' places in the rankings that have two shares.
            linked: ``[B, hops, M]``: those in the hops' rankings; None without hops.
        """
        many, hops = direct.shape[1], 0 if linked is None else linked.shape[1]
        shares = 2 * many + hops
        # Direct rankings alone fill the first tokens, in turn; then the hops take theirs, until
        # each has its share; from then on all grow alike. Of two that come at once the direct one
        # is first.
        place = direct.amin(dim=1)
        grown = (place * (shares / 2)).clamp_min(self.least)
        entry = torch.where(place * many < self.least, place * many, grown)
        if linked is None:
            return entry
        place = linked.amin(dim=1)
        return torch.minimum(entry, torch.maximum(self.least + hops * place, shares * place) + 0.25)


def _places(rankings: Tensor, start: Tensor | None) -> Tensor:
    """The place of each token in each ranking ``[B, ..., M]``, from 0, float32."""
    rankings = mask_padding(rankings, start, -torch.inf)
    order = rankings.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(rankings.shape[-1], device=order.device, dtype=torch.float32)
    return torch.empty_like(rankings).scatter_(-1, order, place.expand_as(rankings))
