from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from claa_ops.methods.peak import Peak
from claa_ops.ops.pool_heads import pool_heads
from claa_ops.selection.budget import Size, Sizes, is_count, larger, smaller
from claa_ops.selection.layer import Layer
from claa_ops.selection.padding import places_in_prompt
from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class Coarse(Peak):
    """A part of the prompt runs ahead and says what of the whole is needed.

    The layers that rank well come after the first ones, which alone would be cheap. So they are
    run on every second token: behind the selection layer the hidden states of all tokens are
    held, and a part of them goes ahead to a later layer. The peaks of its tokens in these layers,
    averaged over neighbours in the prompt, rank the whole prompt, whose best tokens then continue
    behind the selection layer, as if no part had run ahead.

    Args:
        keep: tokens of the whole prompt that continue: see :class:`Pruning`.
        layer: the selection layer, behind which the prefill resumes. None for
            ``default_layer`` of the model's depth.
        ahead: the last layer of the part; None for Peak's default layer, or the one after
            ``layer`` if that is deeper.
        every: the part is every so many-th token of the prompt, the sinks and the window.
        keep_kv, first_full, num_sinks, equal_cache: see :class:`Peak`.
        window, kernel_size, pool_mode: see :class:`Peak`; the kernel is that of the mean over
            neighbours, of which those outside the part count as 0, so ``pool_mode`` is ``"avg"``.

    The caches of the layers that ran ahead are thrown away. A prompt of which nothing would be
    dropped is not run ahead.

    Raises:
        ValueError: a setting is out of its range.

    Source: ours (studies/early_signals/coarse.py, which took Peak's scores from the first layer
    on and cut the part to half of the prompt; here they are those of the part alone).

    Example:
        >>> method = Coarse(keep=0.1, layer=2, ahead=8)
    """

    ahead: int | None = None
    every: int = 2
    kernel_size: int = field(default=25, kw_only=True)

    can_look_again: ClassVar[bool] = False  # a turn has no part that runs ahead

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(not isinstance(self.layer, tuple), "layer", "one layer")
        self.require(self.pool_mode == "avg", "pool_mode", "'avg'")
        self.require(not self.in_layer, "in_layer", "False")  # all tokens go through that layer
        self.require(is_count(self.every, 1), "every", "a positive integer")
        if self.ahead is not None:
            first = 1 + self.layer if isinstance(self.layer, int) else 1
            later = f"an integer of at least {first}, after the selection layer"
            self.require(is_count(self.ahead, first), "ahead", later)

    @staticmethod
    def default_layer(num_layers: int) -> int:
        """Layer 2 of 28 to 32."""
        return num_layers // 14

    def check(self, num_layers: int) -> None:
        """Raise ValueError if no layer comes after the last one of the part."""
        if num_layers < 3:
            raise ValueError(f"Coarse: the model must have at least 3 layers, got {num_layers}")
        super().check(num_layers)
        first, last = self.stage(num_layers), self.last(num_layers)
        allowed = f"in [{first + 1}, {num_layers - 2}], before the last of {num_layers} layers"
        self.require(first < last <= num_layers - 2, "ahead", allowed)

    def stage(self, num_layers: int) -> int:
        """The selection layer."""
        return max(self.stages(num_layers))

    def last(self, num_layers: int) -> int:
        """The last layer of the part."""
        if self.ahead is not None:
            return self.ahead
        return max(Peak.default_layer(num_layers), self.stage(num_layers) + 1)

    def expected_work(self, num_layers: int) -> float:
        """That of the part too."""
        ran_ahead = self.last(num_layers) - self.stage(num_layers)
        return super().expected_work(num_layers) + ran_ahead / (self.every * num_layers)

    @property
    def may_park(self) -> bool:
        """True: the part is taken from all hidden states, to which the prefill comes back."""
        return True

    def parks(self, state: PrefillState, layer: int) -> bool:
        """At the selection layer, as long as a part runs ahead."""
        return "part" in state.notes

    def reads_ranking(self, state: PrefillState, layer: int) -> bool:
        """At the last layer of the part."""
        return layer == self.last(state.num_layers)

    def observe(self, state: PrefillState, layer: Layer) -> None:
        """Rank every so many-th token first where the part is taken; then the part by its peaks."""
        if "part" in state.notes:
            state.notes["highest"] = self.highest(layer)
        elif layer.index == self.stage(state.num_layers) and self._drops(state, layer.index):
            place = places_in_prompt(layer.context, layer.start, layer.key.device)
            in_part = (place % self.every == 0).float()
            state.update_ranking(in_part.expand(layer.key.shape[0], -1))

    def compress(self, state: PrefillState, layer: Layer) -> Tensor | None:
        """As Peak, but for the part, whose caches will be thrown away."""
        return None if "part" in state.notes else super().compress(state, layer)

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """The part at the selection layer; back to it with the best tokens at the last one."""
        if layer == self.stage(state.num_layers) and self._drops(state, layer):
            state.notes["part"] = True
            assert state.importance is not None  # it was observed
            return self._best(state, state.importance, self._part_tokens, protects=False)
        if layer != self.last(state.num_layers) or "part" not in state.notes:
            return None
        ranking = self._of_whole(state)
        for name in ("part", "peaks", "highest"):
            state.notes.pop(name)
        state.go_back()
        state.update_ranking(ranking)
        return self._best_at(state, state.layer)

    def _part_tokens(self, sizes: Sizes[Size]) -> Size:
        context = larger(sizes.seen - self.window, sizes.seen * 0)
        sinks = smaller(sizes.seen * 0 + self.num_sinks, context)
        of_context = -(-context // self.every) + sinks - -(-sinks // self.every)
        return sizes.seen - context + of_context

    def _of_whole(self, state: PrefillState) -> Tensor:
        """``[B, M]``: the part's peaks at their places in the prompt, averaged over neighbours."""
        highest, positions = state.notes["highest"], state.positions
        assert positions is not None  # a part ran ahead
        context = state.prompt_length - self.window
        places = 1 + positions[:, : highest.shape[1]]  # padding goes before the prompt
        ranking = highest.new_zeros(highest.shape[0], 1 + context).scatter(1, places, highest)
        return pool_heads(ranking[:, None, 1:], 1, kernel_size=self.kernel_size)[:, 0]
