from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from claa_ops.methods.pruning import Pruning
from claa_ops.ops.rank_variance import rank_variance
from claa_ops.selection.budget import is_count, is_number
from claa_ops.selection.padding import mask_padding

if TYPE_CHECKING:
    from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class ASL(Pruning):
    """Adaptive layer selection: select where the layers have come to agree on the ranking.

    From layer ``layer`` on, the variance of the tokens' ranks over the last ``last_n`` layers is
    compared with what it was at ``layer``. When it falls below ``tau`` of that, this layer's own
    scores, summed over all heads, select the tokens; if it never does, nothing is selected.

    Args:
        keep, first_full, num_sinks: see :class:`Pruning`; ``keep`` is one budget.
        layer: the first layer that is tested, the measure of the later ones.
        keep_kv: tokens that a layer's cache keeps (SnapKV); ``keep`` if not given.
        last_n: how many layers must agree; at most ``layer + 1``.
        tau: share of the first variance; None selects at ``layer`` itself, as FastKV does.
        passes: 1, or 2 to start anew on the selected token ids, as GemFilter does, with new
            positions; the last layer's ranking selects then if the test never succeeds.
        full_before: leave the caches whole up to the selection layer.
        equal_cache: must be False, since the selection layer is not known beforehand.
        window, kernel_size, pool_mode: see :class:`Method`.

    Raises:
        ValueError: a setting is out of its range; or, in a prefill, the batch has several
            prompts: each would have its own selection layer.

    The test reads one number from the device in every tested layer.

    Source: ASL (arXiv 2601.07667) and its public code (TANIGUCHIREI/ASL, 9e1ec0c), defaults for
    a model of 32 layers. Its rows: ``ASL()``, ``ASL(passes=2)``, ``ASL(full_before=True)``.
    Departures: ties rank by position, kept tokens are in ascending order, and the option of
    caches of varying length, top-p, is not there.

    Example:
        >>> method = ASL(keep=2048, layer=10, tau=0.3)
    """

    keep: float | int | tuple[float | int, ...] = 2048
    layer: int | tuple[int, ...] = 10
    last_n: int = 8
    tau: float | None = 0.3
    passes: int = 1
    full_before: bool = False
    window: int = field(default=32, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(isinstance(self.layer, int), "layer", "one layer")
        self.require(not self.equal_cache, "equal_cache", "False")
        first = min(self._stages)
        self.require(is_count(self.last_n, 1), "last_n", "a positive integer")
        if self.tau is not None:
            self.require(self.last_n <= first + 1, "last_n", f"at most layer + 1 = {first + 1}")
            self.require(is_number(self.tau) and self.tau > 0, "tau", "above 0, or None")
        self.require(self.passes in (1, 2), "passes", "1 or 2")
        self.require(isinstance(self.full_before, bool), "full_before", "True or False")

    @classmethod
    def defaults(cls, num_layers: int) -> dict[str, Any]:
        """A third of the depth: 10 of 32, 9 of 28; and no more layers than there are by then."""
        return {"layer": num_layers // 3, "last_n": min(8, num_layers // 3 + 1)}

    @property
    def two_pass(self) -> bool:
        """With two passes."""
        return self.passes == 2

    def ranks(self, layer: int) -> bool:
        """Any layer may be the last to see the whole prompt."""
        return True

    def informs(self, layer: int) -> bool:
        """The tested layers, and those before with which they are compared."""
        return layer > min(self._stages) - (1 if self.tau is None else self.last_n)

    def needs_scores(self, state: PrefillState, layer: int) -> bool:
        """Whether the selection is yet to come, or the layer's cache is compressed."""
        pending = self.informs(layer) and self._selected(state) is None
        if pending and self._drops(state, self._next_stage(layer)):
            return True
        return not self.two_pass and self._compresses(state, layer)

    def observe(self, state: PrefillState, layer: int) -> None:
        """Rank the tokens, and test whether the last layers agree."""
        if not self.informs(layer) or self._selected(state) is not None:
            return
        state.importance = self.rank(state, layer)
        if self._agree(state, layer, state.importance):
            state.notes["selected"] = layer

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """The most important tokens, ``[B, k]``, and the window, where the test succeeds."""
        stage = self._next_stage(layer)
        never = self.two_pass and layer == state.num_layers - 1 and self._selected(state) is None
        if not self._drops(state, stage) or not (never or self._selected(state) == layer):
            return None
        return self._best_at(state, stage)

    def compressible(self, state: PrefillState, layer: int) -> bool:
        """Whether the cache of this layer may be compressed at all."""
        selected = self._selected(state)
        behind = selected is not None and layer > selected
        return layer >= self.first_full and (behind or not self.full_before)

    def _agree(self, state: PrefillState, layer: int, scores: Tensor) -> bool:
        """Whether the last layers rank the tokens alike, these ``scores`` being the newest."""
        first = min(self._stages)
        if self.tau is None:
            return layer == first
        if not self._drops(state, first):
            return False
        if scores.shape[0] > 1:
            raise ValueError(
                "ASL: a batch must be one prompt, which has its own selection layer, "
                f"got {scores.shape[0]}"
            )
        layers = state.notes.setdefault("layers", [])
        layers.append(mask_padding(scores, state.start, -torch.inf))
        del layers[: -self.last_n]
        if layer < first:
            return False
        rows = state.row_sizes
        kept = self._tokens(state.sizes, first) if rows is None else int(self._tokens(rows, first))
        best = min(kept - self.window, scores.shape[1])
        variance = rank_variance(torch.stack(layers), best).item()
        return variance < self.tau * state.notes.setdefault("variance", variance)

    def _selected(self, state: PrefillState) -> int | None:
        return state.notes.get("selected")

    def _next_stage(self, layer: int) -> int:
        return min(self._stages)
