from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from claa_ops.methods.base import Budget, Method, is_count
from claa_ops.ops.aggregate_scores import aggregate_scores
from claa_ops.ops.select_topk import select_topk

if TYPE_CHECKING:
    from claa_ops.prefill.state import PrefillState


@dataclass(frozen=True)
class CLAA(Method):
    """Cross-layer attention aggregation: rank tokens by several layers, keep the best.

    The last ``window`` tokens of the prompt score all others by the attention they pay them. At
    the selection layer the scores of ``last_n`` layers are aggregated, by their maximum over
    layers and key/value heads, and only the best tokens go on to the deeper layers. Independently,
    each layer's decode cache keeps, for each key/value head, the tokens which that layer itself
    scores best.

    Args:
        keep: tokens that go on after the selection layer: a rate of the prompt in (0, 1], or a
            number. The window counts.
        layer: the selection layer, from 0; it still sees every token.
        keep_kv: tokens that a layer's cache keeps, likewise; ``keep`` if not given.
        last_n: how many layers are aggregated, the selection layer and those before it.
        first_full: the first layers, whose caches stay whole.
        zscore: standardise the scores of each layer and key/value head over the context tokens
            before the maximum, so that a layer of large scores does not drown the others.
        window, kernel_size, pooling: see :class:`Method`.

    Budgets are of the whole prompt at every layer, and never below the window: a prompt that is
    not longer than the window is kept whole. A layer with fewer tokens than its cache may keep
    is left alone and selects nothing.

    Raises:
        ValueError: a setting is out of its range.

    Source: CLAA (arXiv 2602.16054), defaults for a model of 32 layers, in the plain form of
    its public code at bae45c8 with the deferral ``first_full`` of the paper; ``zscore`` is the
    public code's later form. Departures: scores stay in float32, kept tokens are in ascending
    order, a rate is an exact fraction (the public code truncates a product of floats), left
    padding is neither scored nor counted in the statistics.

    Example:
        >>> method = CLAA(keep=0.2, layer=13)
        >>> CLAA(keep=1.5)
        Traceback (most recent call last):
        ValueError: CLAA: keep must be a rate in (0, 1] or a number of tokens, got 1.5
    """

    keep: float | int = 0.1
    layer: int = 15
    keep_kv: float | int | None = None
    last_n: int = 4
    first_full: int = 4
    zscore: bool = False

    _keep: Budget = field(init=False, repr=False, compare=False)
    _keep_kv: Budget = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_count(self.layer, 0), "layer", "an integer of at least 0")
        self.require(is_count(self.last_n, 1), "last_n", "a positive integer")
        self.require(is_count(self.first_full, 0), "first_full", "an integer of at least 0")
        self.require(isinstance(self.zscore, bool), "zscore", "True or False")
        # Parsed here, once: torch.compile traces what a prefill calls, but not fractions.
        object.__setattr__(self, "_keep", self.budget("keep"))
        same = self.keep_kv is None
        object.__setattr__(self, "_keep_kv", self.budget("keep" if same else "keep_kv"))

    def check(self, num_layers: int) -> None:
        """Raise ValueError if no layer comes after the selection layer."""
        allowed = f"in [0, {num_layers - 2}], before the last of the model's {num_layers} layers"
        self.require(self.layer <= num_layers - 2, "layer", allowed)

    def ranks(self, layer: int) -> bool:
        """The layers that see the whole prompt."""
        return layer <= self.layer

    def needs_scores(self, state: PrefillState, layer: int) -> bool:
        """Whether this layer is aggregated, or its cache compressed."""
        aggregated = self.layer - self.last_n < layer <= self.layer and self._propagates(state)
        return aggregated or self._compresses(state, layer)

    def observe(self, state: PrefillState, layer: int) -> None:
        """Fold the scores of an aggregated layer into ``state.importance``."""
        if not self.layer - self.last_n < layer <= self.layer:
            return
        scores = state.layer_scores
        if self.zscore:
            scores = _standardise(scores, state.start)
        running = state.importance
        if running is None:
            running = scores.new_full((scores.shape[0], scores.shape[2]), -torch.inf)
        state.importance = aggregate_scores(running, scores)

    def compress(self, state: PrefillState, layer: int) -> Tensor | None:
        """The tokens with this layer's best scores, ``[B, G, k]``, and the window."""
        if not self._compresses(state, layer):
            return None
        capacity = self._keep_kv.tokens(state.prompt_length, self.window)
        return select_topk(state.layer_scores, capacity, window=self.window, start=state.start)

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """At the selection layer, the most important tokens, ``[B, k]``, and the window."""
        if layer != self.layer or not self._propagates(state):
            return None
        kept = self._keep.tokens(state.prompt_length, self.window)
        assert state.importance is not None  # a layer that selects needs scores
        return select_topk(state.importance, kept, window=self.window, start=state.start)

    def _compresses(self, state: PrefillState, layer: int) -> bool:
        capacity = self._keep_kv.tokens(state.prompt_length, self.window)
        return layer >= self.first_full and state.length > capacity

    def _propagates(self, state: PrefillState) -> bool:
        """Whether the selection layer drops tokens; a prompt below the capacity is untouched."""
        capacity = self._keep_kv.tokens(state.prompt_length, self.window)
        kept = self._keep.tokens(state.prompt_length, self.window)
        return state.length >= capacity and state.length > kept


def _standardise(scores: Tensor, start: Tensor | None) -> Tensor:
    """Scores ``[B, G, M]`` less their mean, over their deviation; both of the valid tokens."""
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
