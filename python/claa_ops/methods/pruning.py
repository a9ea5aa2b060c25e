"""What most systems share: tokens dropped after some layers, and compressed caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

from claa_ops.selection.budget import Budget, Size, Sizes, either, equal_share, is_count, smaller
from claa_ops.selection.method import Method

if TYPE_CHECKING:
    from claa_ops.selection.state import PrefillState

Keep = float | int


@dataclass(frozen=True)
class Pruning(Method):
    """A system that drops tokens after one or more layers and compresses each layer's cache.

    A subclass says how tokens are ranked at a selection layer; FastKV's way, the sum of that
    layer's scores over its heads, stands here.

    Args:
        keep: tokens that go on after the selection layer: a rate of the prompt in (0, 1], or a
            number. The window counts. A tuple for staged selection, all of the whole prompt, none
            larger than the one before it.
        layer: the selection layer, from 0; it still sees every token. A tuple, ascending, of
            the length of ``keep``, selects once after each of these layers.
        keep_kv: tokens that a layer's cache keeps, likewise; the last ``keep`` if not given.
        first_full: the first layers, whose caches stay whole.
        num_sinks: first tokens of the prompt that are always kept; a number of tokens has room for
            them and the window.
        equal_cache: choose the capacity of the compressed caches so that the caches of all
            layers together hold ``keep_kv`` of the entries of full prefill, whole caches
            included: what a method needs to be compared at equal bytes with one that has
            ``first_full=0``.
        window, kernel_size, pool_mode: see :class:`Method`.

    Budgets are of the whole prompt at every layer, and never below the window: a prompt that is
    not longer than the window is kept whole. A prompt shorter than ``keep_kv`` is left alone and
    nothing is selected. In a padded batch each row keeps what it keeps alone.

    Raises:
        ValueError: a setting is out of its range; or, when a prefill begins, ``equal_cache``
            is impossible, because the whole caches alone hold more than is allowed.
    """

    keep: Keep | tuple[Keep, ...] = 0.1
    layer: int | tuple[int, ...] = 15
    keep_kv: Keep | None = None
    first_full: int = 0
    num_sinks: int = 0
    equal_cache: bool = False

    # Parsed here, once: torch.compile traces what a prefill calls, but not fractions.
    _stages: dict[int, Budget] = field(init=False, repr=False, compare=False)
    _keep_kv: Budget = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        layers, keeps = self._each("layer"), self._each("keep")
        integers = all(is_count(layer, 0) for layer in layers)
        self.require(integers, "layer", "an integer of at least 0")
        self.require(layers == sorted(set(layers)), "layer", "in ascending order")
        budgets = [budget for budget in map(Budget.of, keeps) if budget is not None]
        valid = len(budgets) == len(keeps)
        self.require(valid, "keep", "a rate in (0, 1] or a number of tokens")
        stages = f"one for each selection layer of {self.layer!r}"
        self.require(len(keeps) == len(layers), "keep", stages)
        rises = any(later.exceeds(earlier) for earlier, later in pairwise(budgets))
        self.require(not rises, "keep", "no larger at a later layer")
        self.require(is_count(self.first_full, 0), "first_full", "an integer of at least 0")
        self.require(is_count(self.num_sinks, 0), "num_sinks", "an integer of at least 0")
        self.require(isinstance(self.equal_cache, bool), "equal_cache", "True or False")
        object.__setattr__(self, "_stages", dict(zip(layers, budgets, strict=True)))
        cached = budgets[-1] if self.keep_kv is None else self.budget("keep_kv")
        object.__setattr__(self, "_keep_kv", cached)
        self._require_room_for_sinks("keep", budgets)
        self._require_room_for_sinks("keep_kv", [cached])

    def _each(self, name: str) -> list[Any]:
        value = getattr(self, name)
        values = list(value) if isinstance(value, tuple) else [value]
        self.require(len(values) > 0, name, "one value or more")
        return values

    def _require_room_for_sinks(self, name: str, budgets: list[Budget]) -> None:
        least = self.window + self.num_sinks
        room = all(budget.per or budget.count >= least for budget in budgets)
        self.require(
            self.num_sinks == 0 or room, name, f"at least window + num_sinks = {least} tokens"
        )

    @classmethod
    def defaults(cls, num_layers: int) -> dict[str, Any]:
        """The last layer of the first half selects: 15 of 32."""
        return {"layer": max(0, num_layers // 2 - 1)}

    def check(self, num_layers: int) -> None:
        """Raise ValueError if no layer comes after the last selection layer."""
        allowed = f"in [0, {num_layers - 2}], before the last of the model's {num_layers} layers"
        self.require(max(self._stages) <= num_layers - 2, "layer", allowed)

    def begin(self, state: PrefillState) -> None:
        """Refuse equal caches where the whole ones leave the others too little."""
        sizes = state.sizes
        if not self.equal_cache or sizes.prompt <= self.window:
            return
        if self.capacity(sizes, 0) < self.window:
            nominal = self._keep_kv.tokens(sizes.prompt, self.window)
            whole = sum(self._seen(sizes)[: self.first_full])
            raise ValueError(
                f"{type(self).__name__}: equal_cache must leave each layer its window of "
                f"{self.window}: {nominal} of {sizes.prompt} tokens in {sizes.num_layers} "
                f"layers are {nominal * sizes.num_layers} entries, and the first "
                f"{self.first_full} layers alone hold {whole}"
            )

    def ranks(self, layer: int) -> bool:
        """The layers that see the whole prompt."""
        return layer <= min(self._stages)

    def informs(self, layer: int) -> bool:
        """Whether the scores of this layer enter the ranking of a selection layer."""
        return layer in self._stages

    def rank(self, state: PrefillState, layer: int) -> Tensor:
        """The ranking ``[B, M]`` after this layer, which informs it."""
        return state.layer_scores.sum(dim=1)

    def needs_scores(self, state: PrefillState, layer: int) -> bool:
        """Whether this layer informs a selection, or its cache is compressed."""
        return self._informs_drop(state, layer) or self._compresses(state, layer)

    def observe(self, state: PrefillState, layer: int) -> None:
        """Bring ``state.importance`` up to date."""
        if self._informs_drop(state, layer):
            state.importance = self.rank(state, layer)

    def compress(self, state: PrefillState, layer: int) -> Tensor | None:
        """The tokens with this layer's best scores, ``[B, G, k]``, and the window."""
        if not self._compresses(state, layer):
            return None
        tokens = partial(self.capacity, layer=layer)
        return self._best(state, state.layer_scores, tokens, grows=not self.equal_cache)

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """At a selection layer, the most important tokens, ``[B, k]``, and the window."""
        if layer not in self._stages or not self._drops(state, layer):
            return None
        return self._best_at(state, layer)

    def _best_at(self, state: PrefillState, stage: int) -> Tensor:
        """The most important tokens, as many as go on after a selection layer."""
        assert state.importance is not None  # a layer that selects needs scores
        kept, cached = self._stages[stage], self._keep_kv
        # A row that is left alone may keep more than a longer one.
        grows = bool(cached.per) or (not kept.per and kept.count >= cached.count)
        tokens = partial(self._tokens, stage=stage)
        return self._best(state, state.importance, tokens, grows=grows)

    def _best(
        self,
        state: PrefillState,
        scores: Tensor,
        tokens: Callable[[Sizes[Any]], Any],
        grows: bool = True,
    ) -> Tensor:
        """The sinks, the window and the tokens of best score."""
        return self.keep_best(
            state, scores, tokens, window=self.window, num_sinks=self.num_sinks, grows=grows
        )

    def capacity(self, sizes: Sizes[Size], layer: int) -> Size:
        """How many entries the cache of this layer may keep."""
        nominal = self._keep_kv.tokens(sizes.prompt, self.window)
        if not self.equal_cache:
            return nominal
        # All caches together hold as much as if each held the nominal number.
        seen = self._seen(sizes)
        total = nominal * sizes.num_layers - sum(seen[: self.first_full])
        return equal_share(total, seen[self.first_full :])

    def compressible(self, state: PrefillState, layer: int) -> bool:
        """Whether the cache of this layer may be compressed at all."""
        return layer >= self.first_full

    def _compresses(self, state: PrefillState, layer: int) -> bool:
        if not self.compressible(state, layer) or state.length <= self.window:
            return False
        fits = state.length <= self.capacity(state.sizes, layer)
        return not fits or (state.start is not None and self._only_longest_fits(layer))

    def _only_longest_fits(self, layer: int) -> bool:
        """Whether a shorter row may see more than its cache may hold where the longest does not."""
        return self.equal_cache or self._uneven(self._keep_kv, layer)

    def _uneven(self, budget: Budget, layer: int) -> bool:
        """Whether earlier stages leave rows of different lengths different shares of a budget.

        Of a number that went on, a rate of the prompt is less for a short row than for a long one;
        and of two rates that are nearly the same, integers may be the same for one length alone.
        """
        before = [kept for stage, kept in self._stages.items() if stage < layer]
        return bool(budget.per) and any(not kept.per or kept.exceeds(budget) for kept in before)

    def _tokens(self, sizes: Sizes[Size], stage: int) -> Size:
        """How many go on after a selection layer: all of a prompt that is below the capacity."""
        kept = self._stages[stage].tokens(sizes.prompt, self.window)
        capacity = self._keep_kv.tokens(sizes.prompt, self.window)
        return either(sizes.prompt < capacity, sizes.prompt, kept)

    def _drops(self, state: PrefillState, stage: int) -> bool:
        """Whether the selection layer drops tokens, or may drop some of a row."""
        if state.length <= self.window:
            return False
        uneven = state.start is not None and self._uneven(self._stages[stage], stage)
        return state.length > self._tokens(state.sizes, stage) or uneven

    def _informs_drop(self, state: PrefillState, layer: int) -> bool:
        """Whether this layer's scores enter the ranking of a selection that drops tokens."""
        return self.informs(layer) and self._drops(state, self._next_stage(layer))

    def _next_stage(self, layer: int) -> int:
        return min(stage for stage in self._stages if stage >= layer)

    def _seen(self, sizes: Sizes[Size]) -> list[Size]:
        """How many tokens each layer sees."""
        seen = [sizes.prompt]
        for layer in range(sizes.num_layers - 1):
            selects = layer in self._stages
            seen.append(smaller(seen[-1], self._tokens(sizes, layer)) if selects else seen[-1])
        return seen
