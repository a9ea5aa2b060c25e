from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from claa_ops.methods.pruning import Pruning
from claa_ops.ops.aggregate_scores import aggregate_scores
from claa_ops.selection.budget import is_count
from claa_ops.selection.layer import Layer
from claa_ops.selection.padding import standardise
from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class CLAA(Pruning):
    """Cross-layer attention aggregation: rank tokens by several layers, keep the best.

    A token's score is the attention that it receives from the last ``window`` tokens of the
    prompt. At the selection layer the scores of ``last_n`` layers are aggregated, by their maximum
    over layers and key/value heads, and only the best tokens continue to the later layers.
    Independently, each layer's decode cache keeps, for each key/value head, the tokens that the
    layer itself scores best.

    Args:
        keep, layer, keep_kv, num_sinks, equal_cache: see :class:`Pruning`.
        first_full: how many first layers keep their whole caches.
        last_n: how many layers are aggregated, the selection layer and those before it, but
            none before an earlier selection.
        zscore: standardise the scores of each layer and key/value head over the context tokens
            before they are aggregated, so that a layer with large scores does not drown the others.
        over_heads: ``"max"``, or ``"sum"`` to add up the heads of each layer before all of that.
        over_layers: ``"max"``, or ``"mean"``.
        window, kernel_size, pool_mode: see :class:`Method`.

    Raises:
        ValueError: a setting is out of its range.

    Source: CLAA (arXiv 2602.16054), defaults for a model of 32 layers, in the plain form of
    its public code (BradMcDanel/kv-exps) at bae45c8 with the deferral ``first_full`` of the
    paper, where that code has 3. Its latest form, 6b96ed8, is ``zscore=True``; its ranking script
    is ``zscore=True, over_heads="sum", kernel_size=13``; ``over_layers="mean"`` and staged
    selection are ours. Departures: scores stay in float32, kept tokens are in ascending order, a
    rate is an exact fraction (the public code truncates a product of floats) and never below the
    window (where the public code fails), and left padding is neither scored nor counted in the
    statistics.

    Example:
        >>> method = CLAA(keep=0.2, layer=13)
        >>> staged = CLAA(keep=(0.5, 0.2, 0.1), layer=(7, 15, 23))
        >>> CLAA(keep=1.5)
        Traceback (most recent call last):
        ValueError: CLAA: keep must be a rate in (0, 1] or a number of tokens, got 1.5
    """

    first_full: int = 4
    last_n: int = 4
    zscore: bool = False
    over_heads: Literal["max", "sum"] = "max"
    over_layers: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_count(self.last_n, 1), "last_n", "a positive integer")
        self.require(isinstance(self.zscore, bool), "zscore", "True or False")
        self.require(self.over_heads in ("max", "sum"), "over_heads", "'max' or 'sum'")
        self.require(self.over_layers in ("max", "mean"), "over_layers", "'max' or 'mean'")

    def rank(self, layer: Layer, before: Tensor | None) -> Tensor:
        """The scores of the layers that are aggregated, up to this one."""
        if not self.zscore and self.over_heads == self.over_layers == "max":
            return self.merge_maxima(layer, layer.running_max(before))
        scores = layer.scores
        if self.over_heads == "sum":
            scores = layer.reduce(scores.sum(dim=1, keepdim=True), "sum")
        if self.zscore:
            scores = standardise(scores, layer.start)
        if self.over_layers == "mean":  # their sum, which ranks alike
            scores = layer.reduce(scores.amax(dim=1), "max")
            return scores if before is None else before + scores
        if before is None:
            before = scores.new_full((scores.shape[0], scores.shape[2]), -torch.inf)
        return self.merge_maxima(layer, aggregate_scores(before, scores))

    def informs(self, state: PrefillState, layer: int) -> bool:
        """The selection layer, and those before it that are aggregated."""
        stages = self.stages(state.num_layers)
        return any(stage - self.last_n < layer <= stage for stage in stages)
