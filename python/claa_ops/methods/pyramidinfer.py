from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from typing import Any

import torch
from torch import Tensor

from claa_ops.ops.score_window import score_window
from claa_ops.selection.budget import Size, Sizes, is_count, is_number
from claa_ops.selection.layer import Layer
from claa_ops.selection.method import Method
from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class PyramidInfer(Method):
    """Drop some tokens after every layer, from the first on.

    The recent tokens, a share of the prompt, score those before them: the score is the mean
    attention of all heads, in which later queries weigh up to ``distance_weight`` times as much as
    the first. After layer l of N a share ``rho + (1 - rho) (1 + cos(pi l / N)) / 2`` of the
    remaining context tokens continues; the recent ones always do. A layer's cache is what reached
    it.

    Args:
        rho: the share that the last layers pass on, in (0, 1].
        recent: share of the prompt, in [0, 1), that scores and is never dropped.
        distance_weight: weight of the last query, that of the first being 1.
        num_sinks: first tokens that are never dropped.
        least: a layer drops nothing if no more context tokens than this would continue.
        window, kernel_size, pool_mode: unused: nothing is pooled.

    Raises:
        ValueError: a setting is out of its range.

    Scores are computed one query at a time, so this is for comparisons, not for speed: the public
    code needs the attention weights of all recent queries at once.

    Source: PyramidInfer (arXiv 2405.12532), in the form of FastKV's public code
    (dongwonjo/FastKV, b978769), which calls ``rho, recent`` of ``0.7, 0.2``, ``0.3, 0.2`` and
    ``0.01, 0.01`` caches of 60, 50 and 35 %. Departures: scores are in float32; caches are not
    compressed again while decoding.

    Example:
        >>> method = PyramidInfer(rho=0.3, recent=0.2)
    """

    rho: float = 0.3
    recent: float = 0.2
    distance_weight: float = 1.2
    num_sinks: int = 4
    least: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.rho) and 0 < self.rho <= 1, "rho", "in (0, 1]")
        self.require(is_number(self.recent) and 0 <= self.recent < 1, "recent", "in [0, 1)")
        weight = is_number(self.distance_weight) and self.distance_weight > 0
        self.require(weight, "distance_weight", "above 0")
        self.require(is_count(self.num_sinks, 0), "num_sinks", "an integer of at least 0")
        self.require(is_count(self.least, 0), "least", "an integer of at least 0")

    def rows(self, state: PrefillState) -> int:
        """The recent tokens, the last one always among them."""
        return self._recent(state.prompt_length)

    def selection_layers(self, num_layers: int) -> Sequence[int]:
        """All but the last."""
        return range(num_layers - 1)

    def _drops(self, state: PrefillState, layer: int) -> bool:
        """Whether this layer drops tokens, or may drop some of a row."""
        sizes = state.sizes
        if state.row_sizes is not None:
            return self._share(sizes, layer) < 1
        return self._tokens(sizes, layer) < sizes.seen

    def score(self, layer: Layer) -> Tensor:
        """The weighted mean attention, ``[B, 1, n - 1]``; infinite for recent tokens."""
        query, key, lse = layer.query, layer.key, layer.lse
        rows, total = query.shape[2], key.shape[2]
        sizes = layer.state.row_sizes
        recent = key.new_tensor([rows]) if sizes is None else self._recent(sizes.prompt)
        scores = torch.zeros(key.shape[0], total - 1, device=key.device)
        for row in range(rows):
            context = total - rows + row
            seen = score_window(
                query[:, :, row : row + 1],
                key[:, :, : context + 1],
                lse=None if lse is None else lse[:, :, row : row + 1],
                start=layer.start,
                **layer.attention,
            )
            ramp = (row - rows + recent) / (recent - 1).clamp_min(1)  # below 0: not recent
            weight = (1 + (self.distance_weight - 1) * ramp) * (ramp >= 0)
            scores[:, :context] += weight[:, None] * seen.mean(dim=1)
        scores = layer.reduce(scores, "sum")
        places = torch.arange(total - 1, device=key.device)
        scores = scores / recent[:, None]
        return scores.masked_fill(places >= total - recent[:, None], torch.inf)[:, None]

    def observe(self, state: PrefillState, layer: Layer) -> None:
        """The scores of one layer are the ranking."""
        if self._drops(state, layer.index):
            state.update_ranking(layer.scores[:, 0])

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """The best of the context tokens, and the recent ones, ``[B, k]``."""
        if not self._drops(state, layer):
            return None
        assert state.importance is not None  # a layer that selects was ranked
        tokens = partial(self._tokens, layer=layer)
        return self.keep_best(
            state, state.importance, tokens, window=1, num_sinks=self.num_sinks, grows=False
        )

    def _recent(self, prompt: Size) -> Size:
        """How many tokens are recent."""
        return 1 + _part(prompt, self.recent)

    def _share(self, sizes: Sizes[Any], layer: int) -> float:
        """The share of the context tokens that continue after this layer."""
        wave = (1 + cos(pi * layer / sizes.num_layers)) / 2
        return self.rho + (1 - self.rho) * wave

    def _tokens(self, sizes: Sizes[Size], layer: int) -> Size:
        """How many tokens continue after this layer."""
        recent = self._recent(sizes.prompt)
        context = sizes.seen - recent
        kept = _part(context, self._share(sizes, layer))
        if isinstance(kept, Tensor):
            return recent + torch.where(kept > self.least, kept, context)
        return recent + (kept if kept > self.least else context)


def _part(length: Size, share: float) -> Size:
    """The share of a length, cut to an integer."""
    return (length.double() * share).long() if isinstance(length, Tensor) else int(length * share)
