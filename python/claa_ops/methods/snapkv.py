from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor

from claa_ops.selection.budget import Budget, Size, Sizes
from claa_ops.selection.layer import Layer
from claa_ops.selection.method import Method
from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class SnapKV(Method):
    """Compress the decode cache by the attention of the prompt's last tokens; prefill is full.

    Each layer keeps, for each key/value head, the window and the tokens to which it pays the most
    attention. Time to first token is no shorter than that of the plain model.

    Args:
        keep: tokens that each cache keeps: a rate of the prompt in (0, 1], or a number. The
            window is included.
        window, kernel_size, pool_mode: see :class:`Method`.

    Raises:
        ValueError: a setting is out of its range.

    Source: SnapKV (arXiv 2404.14469) and its public code (FasterDecoding/SnapKV, e216ddc), whose
    default configuration has a window of 32 and a kernel of 5; its LongBench runs pool by the
    maximum over 7. Departures: the public code keeps different tokens for every query head and so
    stores each key/value head once per query head; here the heads of a group vote together, as in
    FastKV's and NVIDIA kvpress' ports, and the cache keeps the model's form. Scores stay in
    float32, kept tokens are in ascending order, padding is not scored.

    Example:
        >>> method = SnapKV(keep=1024)
    """

    keep: float | int = 0.1
    window: int = field(default=32, kw_only=True)
    kernel_size: int = field(default=5, kw_only=True)

    capacity_grows: ClassVar[bool] = True  # whether a longer prompt always keeps as many or more

    _keep: Budget = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_keep", self.budget("keep"))

    def compresses(self, state: PrefillState, layer: int) -> bool:
        """Whether the layer sees more tokens than its cache may keep."""
        return state.length > self.capacity(state.sizes, layer)

    def compress(self, state: PrefillState, layer: Layer) -> Tensor | None:
        """The tokens with this layer's best scores, ``[B, G, k]``, and the window."""
        if not self.compresses(state, layer.index):
            return None
        tokens = partial(self.capacity, layer=layer.index)
        return self.keep_best(
            state, layer.scores, tokens, window=self.window, grows=self.capacity_grows
        )

    def capacity(self, sizes: Sizes[Size], layer: int) -> Size:
        """How many entries the cache of this layer may keep."""
        return self._keep.tokens(sizes.prompt, self.window)
