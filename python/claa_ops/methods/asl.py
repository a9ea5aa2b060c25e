from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from claa_ops.methods.pruning import Pruning
from claa_ops.ops.rank_variance import rank_variance
from claa_ops.selection.budget import Budget, is_count, is_number
from claa_ops.selection.layer import Layer
from claa_ops.selection.padding import mask_padding
from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class ASL(Pruning):
    """Adaptive layer selection: select once successive layers agree on the ranking.

    From layer ``layer`` on, the variance of the tokens' ranks over the last ``last_n`` layers is
    compared with what it was at ``layer``. At the first layer where it is below ``tau`` times that,
    this layer's own scores, summed over all heads, select the tokens; if it never is, nothing is
    selected.

    Args:
        keep, first_full, num_sinks: see :class:`Pruning`; ``keep`` is one budget.
        layer: the first layer tested, with which the later ones are compared; None for a third
            of the model's depth.
        keep_kv: tokens that a layer's cache keeps (SnapKV); ``keep`` if not given.
        last_n: how many layers must agree; at most ``layer + 1``. None for 8, or as many as
            there are up to ``layer``.
        tau: share of the first variance; None selects at ``layer`` itself, as FastKV does.
        passes: 1, or 2 to start anew on the selected token ids, as GemFilter does, with new
            positions; then the last layer's ranking selects if the test never succeeds.
        full_before: leave the caches whole up to the selection layer.
        equal_cache: must be False, since the selection layer is not known beforehand.
        window, kernel_size, pool_mode: see :class:`Method`.

    Raises:
        ValueError: a setting is out of its range; or, in a prefill, the batch has several
            prompts: each would have its own selection layer.

    The test reads one number from the device in every tested layer.

    Source: ASL (arXiv 2601.07667) and its public code (TANIGUCHIREI/ASL, 9e1ec0c), defaults for
    a model of 32 layers. Its rows: ``ASL()``, ``ASL(passes=2)``, ``ASL(full_before=True)``.
    Departures: ties rank by position, kept tokens are in ascending order, and the
    top-p option, caches of varying length, is left out.

    Example:
        >>> method = ASL(keep=2048, layer=10, tau=0.3)
    """

    keep: float | int | tuple[float | int, ...] = 2048
    last_n: int | None = None
    tau: float | None = 0.3
    passes: int = 1
    full_before: bool = False
    window: int = field(default=32, kw_only=True)

    can_look_again: ClassVar[bool] = False  # which layer parks is known only when it selects

    def __post_init__(self) -> None:
        super().__post_init__()
        single = self.layer is None or isinstance(self.layer, int)
        self.require(single, "layer", "one layer")
        self.require(not self.equal_cache, "equal_cache", "False")
        self.require(not self.in_layer, "in_layer", "False")  # most tested layers select nothing
        given = self.last_n is None or is_count(self.last_n, 1)
        self.require(given, "last_n", "a positive integer")
        if self.tau is not None:
            self.require(is_number(self.tau) and self.tau > 0, "tau", "above 0, or None")
        if isinstance(self.layer, int):
            self._require_enough_layers(self.layer)
        self.require(self.passes in (1, 2), "passes", "1 or 2")
        self.require(isinstance(self.full_before, bool), "full_before", "True or False")

    def _require_enough_layers(self, first: int) -> None:
        enough = self.tau is None or self._last_n(first) <= first + 1
        self.require(enough, "last_n", f"at most layer + 1 = {first + 1}")

    @staticmethod
    def default_layer(num_layers: int) -> int:
        """A third of the depth: 10 of 32, 9 of 28."""
        return num_layers // 3

    def check(self, num_layers: int) -> None:
        """Raise ValueError if no layer follows the first tested one, or too few precede it."""
        super().check(num_layers)
        self._require_enough_layers(self._first(num_layers))

    @property
    def serves_batches(self) -> bool:
        """Only where the selection layer is known beforehand."""
        return self.tau is None

    @property
    def two_pass(self) -> bool:
        """If ``passes`` is 2."""
        return self.passes == 2

    def selection_layers(self, num_layers: int) -> tuple[int, ...]:
        """Any layer from the first tested one on."""
        first = self._first(num_layers)
        return (first,) if self.tau is None else tuple(range(first, num_layers))

    def stages(self, num_layers: int) -> dict[int, Budget]:
        """The one budget, under the first tested layer, wherever it is spent."""
        return {self._first(num_layers): self._keeps[0]}

    def last_layer(self, state: PrefillState) -> int | None:
        """The model's last layer, whose ranking selects if the test never succeeds."""
        return state.num_layers - 1 if self._drops(state, self._first(state.num_layers)) else None

    def ranks(self, state: PrefillState, layer: int) -> bool:
        """Any layer may be the last to see the whole prompt."""
        return True

    def informs(self, state: PrefillState, layer: int) -> bool:
        """The tested layers, and those before that they are compared with, until one selects."""
        first = self._first(state.num_layers)
        compared = layer > first - (1 if self.tau is None else self._last_n(first))
        return compared and self._selected(state) is None

    def observe(self, state: PrefillState, layer: Layer) -> None:
        """Rank the tokens, and test whether the last layers agree."""
        if not self._informs_drop(state, layer.index):
            return
        ranking = self.rank(layer, state.running)
        state.update_ranking(ranking)
        if self._agree(state, layer.index, ranking):
            state.notes["selected"] = layer.index

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """The most important tokens, ``[B, k]``, and the window, where the test succeeds."""
        first = self._first(state.num_layers)
        selected = self._selected(state)
        as_last = self.two_pass and layer == state.num_layers - 1 and selected is None
        if not self._drops(state, first) or not (as_last or selected == layer):
            return None
        return self._best_at(state, first)

    def compressible(self, state: PrefillState, layer: int) -> bool:
        """Whether the cache of this layer may be compressed at all."""
        selected = self._selected(state)
        after = selected is not None and layer > selected
        return layer >= self.first_full and (after or not self.full_before)

    def _agree(self, state: PrefillState, layer: int, scores: Tensor) -> bool:
        """Whether the last layers rank the tokens alike, these ``scores`` being the newest."""
        first = self._first(state.num_layers)
        if self.tau is None:
            return layer == first
        if scores.shape[0] > 1:
            raise ValueError(
                "ASL: a batch must be one prompt, which has its own selection layer, "
                f"got {scores.shape[0]}"
            )
        layers = state.notes.setdefault("layers", [])
        layers.append(mask_padding(scores, state.start, -torch.inf))
        del layers[: -self._last_n(first)]
        if layer < first:
            return False
        rows = state.row_sizes
        kept = self._tokens(state.sizes, first) if rows is None else int(self._tokens(rows, first))
        best = min(kept - self.window, scores.shape[1])
        variance = rank_variance(torch.stack(layers), best).item()
        return variance < self.tau * state.notes.setdefault("variance", variance)

    def _first(self, num_layers: int) -> int:
        """The first tested layer."""
        return super().selection_layers(num_layers)[0]

    def _last_n(self, first: int) -> int:
        return min(8, first + 1) if self.last_n is None else self.last_n

    def _selected(self, state: PrefillState) -> int | None:
        return state.notes.get("selected")

    def _next_stage(self, state: PrefillState, layer: int) -> int:
        return self._first(state.num_layers)
