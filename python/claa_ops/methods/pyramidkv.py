from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from claa_ops.methods.budget import is_number
from claa_ops.methods.snapkv import SnapKV

if TYPE_CHECKING:
    from claa_ops.prefill.state import PrefillState


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with more room in the first layers and less in the last.

    The capacity falls linearly over the layers, and its average is that of SnapKV: from nearly
    twice as many context tokens in the first layer to one in ``beta`` of the average in the last.

    Args:
        keep: tokens that a cache keeps on average: a rate of the prompt in (0, 1], or a number.
            The window counts.
        beta: how much less than the average the last layer keeps; 1 for SnapKV.
        window, kernel_size, pooling: see :class:`Method`.

    Raises:
        ValueError: a setting is out of its range.

    Source: PyramidKV (arXiv 2406.02069), as NVIDIA/kvpress computes the budgets. Departures: those
    of :class:`SnapKV`; the public KVCache-Factory truncates where kvpress and this round.

    Example:
        >>> method = PyramidKV(keep=0.1, beta=20)
    """

    beta: float | int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = is_number(self.beta) and self.beta >= 1
        self.require(valid, "beta", "a number of at least 1")

    def capacity(self, state: PrefillState, layer: int) -> int:
        """How many entries the cache of this layer may keep."""
        average = super().capacity(state, layer) - self.window
        context = state.prompt_length - self.window
        if average >= context:
            return state.prompt_length
        last = average / self.beta
        first = min(2 * average - last, context)
        last = 2 * average - first
        step = (first - last) / max(1, state.num_layers - 1)
        return self.window + round(first - layer * step)
