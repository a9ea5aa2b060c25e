from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from claa_ops.methods.snapkv import SnapKV
from claa_ops.selection.budget import Size, Sizes, is_number, smaller
from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with more room in the first layers and less in the last.

    The capacity falls linearly over the layers, and its average is that of SnapKV: from nearly
    twice the average number of context tokens in the first layer to a ``beta``-th of it in the
    last.

    Args:
        keep: tokens that a cache keeps on average: a rate of the prompt in (0, 1], or a number.
            The window is included.
        beta: how many times less than the average the last layer keeps; 1 for SnapKV.
        window, kernel_size, pool_mode: see :class:`Method`.

    Raises:
        ValueError: a setting is out of its range.

    Source: PyramidKV (arXiv 2406.02069), as NVIDIA/kvpress computes the budgets. Departures: those
    of :class:`SnapKV`; the public KVCache-Factory truncates where kvpress and this round.

    Example:
        >>> method = PyramidKV(keep=0.1, beta=20)
    """

    beta: float | int = 20

    capacity_grows = False

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = is_number(self.beta) and self.beta >= 1
        self.require(valid, "beta", "a number of at least 1")

    def compresses(self, state: PrefillState, layer: int) -> bool:
        """Whether the layer sees more tokens than its cache may keep, or a row of it may."""
        if state.row_sizes is not None:
            return state.length > self.window
        return super().compresses(state, layer)

    def capacity(self, sizes: Sizes[Size], layer: int) -> Size:
        """How many entries the cache of this layer may keep."""
        average = super().capacity(sizes, layer) - self.window
        context = sizes.prompt - self.window
        if isinstance(average, Tensor):
            share = self._share(average.double(), context.double(), layer / (sizes.num_layers - 1))
            return torch.where(average < context, self.window + share.round().long(), sizes.prompt)
        if average >= context:
            return sizes.prompt
        return self.window + round(self._share(average, context, layer / (sizes.num_layers - 1)))

    def _share(self, average: Any, context: Any, depth: float) -> Any:
        """Context tokens of the layer at a depth of 0 to 1."""
        last = average / self.beta
        first = smaller(2 * average - last, context)
        last = 2 * average - first
        return first - depth * (first - last)
