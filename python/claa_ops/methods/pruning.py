"""What most methods share: tokens dropped after some layers, and compressed caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from claa_ops.ops.select_topk import select_topk
from claa_ops.selection.budget import (
    Budget,
    Size,
    Sizes,
    either,
    equal_share,
    is_count,
    is_number,
    smaller,
)
from claa_ops.selection.layer import Layer
from claa_ops.selection.method import Method
from claa_ops.selection.padding import mask_padding
from claa_ops.selection.state import PrefillState, Turn

Keep = float | int
_LONG = 2**20  # tokens of a long prompt


@dataclass(frozen=True)
class Pruning(Method):
    """A method that drops tokens after one or more layers and compresses each layer's cache.

    A new ranking is a subclass that overrides one function. ``rank``, given what a layer saw and
    the ranking before it, says which tokens continue; :meth:`Method.score`, given what a layer
    saw, says which tokens each head's cache keeps. A ``rank`` that is not overridden sums these
    scores over the heads, as in FastKV.

    Args:
        keep: tokens that continue after the selection layer: a rate of the prompt in (0, 1], or a
            number. The window is included. A tuple for staged selection: each is of the whole
            prompt, and none is larger than the one before it.
        layer: the selection layer, from 0; it still sees every token. An ascending tuple, as
            long as ``keep``, selects once after each of these layers. None for
            :meth:`default_layer` of the model's depth. In a hybrid model it may be a layer without
            attention: see :meth:`Method.among`.
        keep_kv: tokens that a layer's cache keeps, a rate or a number; the last ``keep`` if None.
        first_full: how many first layers keep their whole caches.
        num_sinks: how many first tokens of the prompt are always kept; a budget that is a number
            must have room for them and the window.
        keep_least: tokens that continue, and that a cache keeps, at least, however short the
            prompt is: of a rate of a short prompt little is left but the window.
        mass: a rate in (0, 1): of each prompt as many tokens continue as hold this share of the
            sum of all scores, at least ``keep_least`` and at most ``keep``. None for ``keep``.
        equal_cache: choose the capacity of the compressed caches so that the caches of all
            layers together hold ``keep_kv`` of the entries of full prefill, whole caches
            included, so that the method can be compared at equal bytes with one that has
            ``first_full=0``.
        in_layer: select before the attention of the selection layer instead of after the layer,
            which then computes no more than keys and values of the tokens that are dropped. The
            result is the same but for rounding.
        attention_share: a rate in (0, 1): the layers that see the whole prompt attend to so many
            of its blocks of 128 keys, those most like their queries (block-sparse attention). 1
            for exact attention, which the layers with sliding windows, softcaps or sink logits
            keep.
        second_look: park the hidden states behind the selection layer. A later turn of the
            conversation then ranks the prompt anew, by its own last tokens, and the best of what
            the later layers do not hold, as many as ``keep`` says, are taken up again. All
            caches are whole (``keep_kv=1.0``), and there is one selection layer. The parked
            states take as much memory as keys and values of a few layers.
        window, kernel_size, pool_mode: see :class:`Method`.

    Budgets are of the whole prompt at every layer, and never below the window: a prompt that is
    not longer than the window is kept whole. A prompt shorter than ``keep_kv`` is left alone and
    nothing is selected. In a padded batch each row keeps what it would keep alone.

    Raises:
        ValueError: a setting is out of its range; or, when a prefill begins, ``equal_cache``
            is impossible, because the whole caches alone hold more than is allowed.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class KeyNorm(Pruning):
        ...     '''Keys of small norm are attended to most (arXiv 2406.11430).'''
        ...
        ...     def score(self, layer):
        ...         return -layer.key[:, :, : layer.context].float().norm(dim=-1)
        >>> method = KeyNorm(keep=0.2, layer=7)
    """

    keep: Keep | tuple[Keep, ...] = 0.1
    layer: int | tuple[int, ...] | None = None
    keep_kv: Keep | None = None
    first_full: int = 0
    num_sinks: int = 0
    equal_cache: bool = False
    in_layer: bool = field(default=False, kw_only=True)
    attention_share: float = field(default=1.0, kw_only=True)
    keep_least: int = field(default=0, kw_only=True)
    mass: float | None = field(default=None, kw_only=True)
    second_look: bool = field(default=False, kw_only=True)

    can_look_again: ClassVar[bool] = True  # whether it ranks by what the layers of a turn see

    # Parsed here, once: torch.compile traces what a prefill calls, but not fractions.
    _keeps: tuple[Budget, ...] = field(init=False, repr=False, compare=False)
    _keep_kv: Budget = field(init=False, repr=False, compare=False)
    _attention_share: Budget | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = [0] if self.layer is None else self._each("layer")
        keeps = self._each("keep")
        integers = all(is_count(layer, 0) for layer in layers)
        self.require(integers, "layer", "an integer of at least 0")
        self.require(layers == sorted(set(layers)), "layer", "in ascending order")
        budgets = [budget for budget in map(Budget.of, keeps) if budget is not None]
        valid = len(budgets) == len(keeps)
        self.require(valid, "keep", "a rate in (0, 1] or a number of tokens")
        unnamed = "one budget unless layer names several layers"
        stages = unnamed if self.layer is None else f"one for each selection layer of {self.layer}"
        self.require(len(keeps) == len(layers), "keep", stages)
        rises = any(later.exceeds(earlier) for earlier, later in pairwise(budgets))
        self.require(not rises, "keep", "no larger at a later layer")
        self.require(is_count(self.first_full, 0), "first_full", "an integer of at least 0")
        self.require(is_count(self.num_sinks, 0), "num_sinks", "an integer of at least 0")
        self.require(isinstance(self.equal_cache, bool), "equal_cache", "True or False")
        self.require(isinstance(self.in_layer, bool), "in_layer", "True or False")
        share = Budget.of(float(self.attention_share)) if is_number(self.attention_share) else None
        self.require(share is not None, "attention_share", "a rate in (0, 1]")
        object.__setattr__(self, "_attention_share", share if self.attention_share != 1 else None)
        self.require(is_count(self.keep_least, 0), "keep_least", "an integer of at least 0")
        rate = self.mass is None or (is_number(self.mass) and 0 < self.mass < 1)
        self.require(rate, "mass", "a rate in (0, 1), or None")
        self._check_second_look()
        whole = self.second_look and self.keep_kv is None
        last = Budget(1, 1) if whole else budgets[-1]
        cached = last if self.keep_kv is None else self.budget("keep_kv")
        budgets, cached = [self._floored(budget) for budget in budgets], self._floored(cached)
        object.__setattr__(self, "_keeps", tuple(budgets))
        object.__setattr__(self, "_keep_kv", cached)
        self._require_room_for_sinks("keep", budgets)
        self._require_room_for_sinks("keep_kv", [cached])

    def _each(self, name: str) -> list[Any]:
        value = getattr(self, name)
        values = list(value) if isinstance(value, tuple) else [value]
        self.require(len(values) > 0, name, "one value or more")
        return values

    def _floored(self, budget: Budget) -> Budget:
        return replace(budget, least=self.keep_least) if budget.per else budget

    def _check_second_look(self) -> None:
        self.require(isinstance(self.second_look, bool), "second_look", "True or False")
        if self.second_look:
            able = self.can_look_again and not self.reads_hidden
            self.require(able, "second_look", "False")
            whole = self.keep_kv in (None, 1.0) and not isinstance(self.keep_kv, int)
            self.require(whole, "keep_kv", "1.0 with second_look")
            self.require(not self.equal_cache, "equal_cache", "False with second_look")
            self.require(not self.in_layer, "in_layer", "False with second_look")

    def _require_room_for_sinks(self, name: str, budgets: list[Budget]) -> None:
        least = self.window + self.num_sinks
        room = all(budget.per or budget.count >= least for budget in budgets)
        self.require(
            self.num_sinks == 0 or room, name, f"at least window + num_sinks = {least} tokens"
        )

    # What a new method overrides.

    def rank(self, layer: Layer, before: Tensor | None) -> Tensor:
        """The ranking ``[B, M]``, float32, after a layer that informs it.

        Its values at padding, before ``layer.start``, do not matter.

        Args:
            layer: what the layer saw.
            before: ``[B, M]``, the ranking after the layers before it, which may be updated in
                place; None if no layer before ranked the tokens that this one sees.
        """
        return layer.reduce(layer.scores.sum(dim=1), "sum")

    def informs(self, state: PrefillState, layer: int) -> bool:
        """Whether the ranking at some selection layer depends on this layer."""
        return layer in self.stages(state.num_layers)

    def keep_notes(self, state: PrefillState, layer: int, index: Tensor) -> None:
        """Keep what ``state.notes`` has of the tokens at ``index``, ``[B, k]``, which continue.

        For rankings that go on from one selection layer to the next.
        """

    def reads_ranking(self, state: PrefillState, layer: int) -> bool:
        """Whether :meth:`select` reads the ranking after this layer."""
        return layer in self.stages(state.num_layers)

    def merge_maxima(self, layer: Layer, maxima: Tensor) -> Tensor:
        """Of maxima over layers and the heads of this device, those over the heads of all.

        A maximum may be taken in any order, so one merge serves all layers up to a selection.
        """
        read = self.reads_ranking(layer.state, layer.index)
        return layer.reduce(maxima, "max") if read else maxima

    def evidence(self, state: PrefillState) -> Tensor:
        """``[B, M]``, not negative: the scores whose ``mass`` says how many tokens continue."""
        assert state.importance is not None  # a layer that selects was ranked
        return state.importance.clamp_min(0)

    @staticmethod
    def default_layer(num_layers: int) -> int | tuple[int, ...]:
        """Where to select in a model of this depth: the last of the first half, 15 of 32."""
        return max(0, num_layers // 2 - 1)

    # What follows from the settings.

    @property
    def differs_by_row(self) -> bool:
        """With ``mass``."""
        return self.mass is not None

    def stages(self, num_layers: int) -> dict[int, Budget]:
        """The selection layers, ascending, and how many tokens continue after each."""
        return dict(zip(self.selection_layers(num_layers), self._keeps, strict=True))

    @property
    def cache_budget(self) -> Budget:
        """How many tokens of a prompt a layer's cache keeps: ``keep_kv``, or what stands for it."""
        return self._keep_kv

    def check(self, num_layers: int) -> None:
        """Raise ValueError if no layer comes after the last selection layer."""
        name = type(self).__name__
        if num_layers < 2:
            raise ValueError(f"{name}: the model must have at least 2 layers, got {num_layers}")
        allowed = f"in [0, {num_layers - 2}], before the last of the model's {num_layers} layers"
        stages = self.stages(num_layers)
        self.require(max(stages) <= num_layers - 2, "layer", allowed)
        self.require(not self.second_look or len(stages) == 1, "layer", "one with second_look")

    def expected_work(self, num_layers: int) -> float:
        """The share of full prefill's multiply-adds by weights, of a long prompt."""
        seen = self._seen(Sizes(_LONG, _LONG, num_layers))
        return sum(seen) / (_LONG * num_layers)

    def capacity(self, sizes: Sizes[Size], layer: int) -> Size:
        """How many entries the cache of this layer may keep."""
        nominal = self._keep_kv.tokens(sizes.prompt, self.window)
        if not self.equal_cache:
            return nominal
        # All caches together hold as much as if each held the nominal number.
        seen = self._seen(sizes)
        total = nominal * sizes.num_layers - sum(seen[: self.first_full])
        return equal_share(total, seen[self.first_full :])

    # The decisions.

    def begin(self, state: PrefillState) -> None:
        """Refuse ``equal_cache`` where the whole caches leave too little for the others."""
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

    def ranks(self, state: PrefillState, layer: int) -> bool:
        """The layers that see the whole prompt."""
        return layer <= min(self.stages(state.num_layers))

    def observe(self, state: PrefillState, layer: Layer) -> None:
        """Bring the ranking up to date, if a selection that drops tokens will read it."""
        if self._informs_drop(state, layer.index):
            state.update_ranking(self.rank(layer, state.running))

    def compress(self, state: PrefillState, layer: Layer) -> Tensor | None:
        """The tokens with this layer's best scores, ``[B, G, k]``, and the window."""
        if not self._compresses(state, layer.index):
            return None
        tokens = partial(self.capacity, layer=layer.index)
        return self._best(state, layer.scores, tokens, grows=not self.equal_cache)

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """At a selection layer, the most important tokens, ``[B, k]``, and the window."""
        if layer not in self.stages(state.num_layers) or not self._drops(state, layer):
            return None
        index = self._best_at(state, layer)
        self.keep_notes(state, layer, index)
        return index

    def selects_within(self, state: PrefillState, layer: int) -> bool:
        """At a selection layer that drops tokens, with ``in_layer``."""
        stages = self.stages(state.num_layers) if self.in_layer else ()
        return layer in stages and self._drops(state, layer)

    def key_share(self, state: PrefillState, layer: int) -> Budget | None:
        """``attention_share``, while all tokens of the prompt are there."""
        return self._attention_share if state.positions is None else None

    @property
    def alters_layers(self) -> bool:
        """With ``in_layer``, or with an ``attention_share`` below 1."""
        return self.in_layer or self._attention_share is not None

    @property
    def looks_again(self) -> bool:
        """Whether it takes a second look."""
        return self.second_look

    def parks(self, state: PrefillState, layer: int) -> bool:
        """Behind the selection layer, if a later turn may look again."""
        return self.second_look

    def take_up(self, state: PrefillState, layer: int) -> Tensor | None:
        """In a later turn the most important of what was dropped, as many as ``keep`` says."""
        if not isinstance(state, Turn):
            return None
        assert state.importance is not None  # every layer that informs it was observed
        missing = state.missing()
        ranking = state.importance[:, : state.prompt_length].masked_fill(~missing, -torch.inf)
        sizes: Sizes[Any] = state.row_sizes or state.sizes
        allowed = self._tokens(sizes, layer)
        counts = missing.sum(dim=1).clamp_max(allowed)
        most = int(counts.max())
        return select_topk(ranking, most, counts=counts) if most > 0 else None

    def _best_at(self, state: PrefillState, stage: int) -> Tensor:
        """The most important tokens, as many as continue after a selection layer."""
        assert state.importance is not None  # a layer that selects was ranked
        if self.mass is not None:
            return self._best(state, state.importance, self._by_mass(state, stage))
        kept, cached = self.stages(state.num_layers)[stage], self._keep_kv
        # A row that is left alone may keep more than a longer one.
        grows = bool(cached.per) or (not kept.per and kept.count >= cached.count)
        tokens = partial(self._tokens, stage=stage)
        return self._best(state, state.importance, tokens, grows=grows)

    def _best(
        self,
        state: PrefillState,
        scores: Tensor,
        tokens: Callable[[Sizes[Any]], Any] | Tensor,
        **how: bool,
    ) -> Tensor:
        """The sinks, the window and the tokens of best score; ``how`` is as in keep_best."""
        return self.keep_best(
            state, scores, tokens, window=self.window, num_sinks=self.num_sinks, **how
        )

    def _by_mass(self, state: PrefillState, stage: int) -> Tensor:
        """``[B]``: how many tokens hold ``mass`` of each prompt's evidence, within the bounds."""
        scores = mask_padding(self.evidence(state), state.start, 0.0).double()
        sizes: Sizes[Any] = state.row_sizes or state.sizes
        beside: Any = 0
        sure: Any = self.window + self.num_sinks
        protection = state.protection(scores.shape[1], self.num_sinks)
        if protection is not None:
            scores = scores.masked_fill(protection.tokens, 0.0)
            sizes, beside = protection.others(sizes), protection.count
            sure = self.window + self.num_sinks * (beside == 0)  # else the sinks are there
        held = scores.sort(dim=1, descending=True).values.cumsum(dim=1)
        assert self.mass is not None  # the caller has seen to it
        needed = 1 + (held < self.mass * held[:, -1:]).sum(dim=1)
        counts = (needed + sure).clamp_min(self.keep_least).clamp(max=self._tokens(sizes, stage))
        if isinstance(sizes.prompt, Tensor):
            counts = counts.where(~self._left_alone(sizes), sizes.seen)
        return beside + counts

    def compressible(self, state: PrefillState, layer: int) -> bool:
        """Whether the cache of this layer may be compressed at all."""
        return layer >= self.first_full

    def _compresses(self, state: PrefillState, layer: int) -> bool:
        if not self.compressible(state, layer) or state.length <= self.window:
            return False
        fits = state.length <= self.capacity(state.sizes, layer)
        return not fits or (state.start is not None and self._only_longest_fits(state, layer))

    def _only_longest_fits(self, state: PrefillState, layer: int) -> bool:
        """Whether a shorter row may need compression where the longest fits into its cache."""
        return self.equal_cache or self._uneven(state, self._keep_kv, layer)

    def _uneven(self, state: PrefillState, budget: Budget, layer: int) -> bool:
        """Whether a budget may drop tokens of a short row where it drops none of the longest.

        It may after a stage that kept a number of tokens, of which a rate of the prompt is a
        smaller share in a short row; and after one with nearly the same rate, since rounding may
        make the two equal for one length and not for another.
        """
        stages = self.stages(state.num_layers).items()
        before = [kept for stage, kept in stages if stage < layer]
        return bool(budget.per) and any(not kept.per or kept.exceeds(budget) for kept in before)

    def _tokens(self, sizes: Sizes[Size], stage: int) -> Size:
        """How many continue after a selection layer: all if the prompt is below ``keep_kv``."""
        kept = self.stages(sizes.num_layers)[stage].tokens(sizes.prompt, self.window)
        return either(self._left_alone(sizes), sizes.prompt, kept)

    def _left_alone(self, sizes: Sizes[Size]) -> Any:
        """Whether the prompt is shorter than the number of tokens that a cache keeps."""
        return sizes.prompt < self._keep_kv.tokens(sizes.prompt, self.window)

    def _drops(self, state: PrefillState, stage: int) -> bool:
        """Whether the selection layer drops tokens of the longest row, or may of a shorter one."""
        if state.length <= self.window:
            return False
        if self.mass is not None:
            return state.length > self.keep_least and not self._left_alone(state.sizes)
        budget = self.stages(state.num_layers)[stage]
        uneven = state.start is not None and self._uneven(state, budget, stage)
        return state.length > self._tokens(state.sizes, stage) or uneven

    def _informs_drop(self, state: PrefillState, layer: int) -> bool:
        """Whether the ranking of a selection that drops tokens depends on this layer."""
        return self.informs(state, layer) and self._drops(state, self._next_stage(state, layer))

    def _next_stage(self, state: PrefillState, layer: int) -> int:
        return min(stage for stage in self.stages(state.num_layers) if stage >= layer)

    def _seen(self, sizes: Sizes[Size]) -> list[Size]:
        """How many tokens each layer sees."""
        stages = self.stages(sizes.num_layers)
        seen = [sizes.prompt]
        for layer in range(sizes.num_layers - 1):
            selects = layer in stages
            seen.append(smaller(seen[-1], self._tokens(sizes, layer)) if selects else seen[-1])
        return seen
