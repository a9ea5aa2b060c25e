from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from claa_ops.selection.budget import Budget, Size, Sizes, is_count
from claa_ops.selection.layer import Layer
from claa_ops.selection.method import Method
from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class StreamingLLM(Method):
    """The first tokens and the last ones stay in the cache, regardless of content; prefill is full.

    Args:
        keep: tokens that each cache keeps, the sinks included: a rate of the prompt in (0, 1], or
            a number.
        num_sinks: how many first tokens stay: many heads attend to them whatever they say.
        window, kernel_size, pool_mode: unused: nothing is scored.

    Raises:
        ValueError: a setting is out of its range.

    Source: StreamingLLM (arXiv 2309.17453), in the form of the comparisons of FastKV: the prompt
    is prefilled in full, and the kept tokens keep their positions, where the original gives them
    new ones inside the cache.

    Example:
        >>> method = StreamingLLM(keep=1024)
    """

    keep: float | int = 0.1
    num_sinks: int = 4

    _keep: Budget = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_count(self.num_sinks, 0), "num_sinks", "an integer of at least 0")
        budget = self.budget("keep")
        more = bool(budget.per) or budget.count > self.num_sinks
        self.require(more, "keep", f"more than the num_sinks of {self.num_sinks} tokens")
        object.__setattr__(self, "_keep", budget)

    def ranks(self, state: PrefillState, layer: int) -> bool:
        """No layer: what is kept does not depend on what a layer saw."""
        return False

    def compress(self, state: PrefillState, layer: Layer) -> Tensor | None:
        """The first tokens and the last, ``[B, k]``."""
        if state.length <= self._capacity(state.sizes):
            return None
        later = torch.arange(state.length, device=layer.key.device, dtype=torch.float32)
        scores = later.expand(layer.key.shape[0], -1)
        return self.keep_best(state, scores, self._capacity, num_sinks=self.num_sinks)

    def _capacity(self, sizes: Sizes[Size]) -> Size:
        return self._keep.tokens(sizes.prompt, self.num_sinks + 1)
