"""The base class of methods: what a method decides about a prompt."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from claa_ops.ops._pool_mode import PoolMode
from claa_ops.ops.select_topk import select_topk
from claa_ops.selection.answer import Reader
from claa_ops.selection.budget import Budget, Sizes, is_count, plain
from claa_ops.selection.work import Work

if TYPE_CHECKING:
    from typing_extensions import Self

    from claa_ops.selection.layer import Layer
    from claa_ops.selection.state import PrefillState


class Preparation(NamedTuple):
    """What a method found out about a prompt before its prefill."""

    ranking: Tensor  # [B, N], float32: how important each token is
    work: Work  # the multiply-adds of finding out


@dataclass(frozen=True, kw_only=True)
class Method:
    """Settings, and the decisions of a prefill: which tokens are ranked, kept and dropped.

    By default a method keeps everything, and it overrides the decisions in which it differs. Each
    layer asks for three: :meth:`observe` takes in what the layer saw, :meth:`compress` says what
    its cache keeps, and :meth:`select` says which tokens the next layers see. Most methods
    override none of these: they subclass :class:`claa_ops.methods.Pruning` and override
    :meth:`score` or ``rank``.

    A method is immutable and holds nothing of a request. What it has learned so far is on the
    :class:`~claa_ops.prefill.PrefillState`, which it may read, whose ranking it updates
    and whose ``notes`` it may write; so one method serves any number of requests.

    Args:
        window: how many of the prompt's last tokens rank the others by their attention.
        kernel_size: odd number of neighbouring tokens over which scores are pooled.
        pool_mode: ``"avg"`` or ``"max"``.

    Raises:
        ValueError: a setting is out of its range.
    """

    window: int = 8
    kernel_size: int = 7
    pool_mode: PoolMode = "avg"

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.init:
                object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        self.require(is_count(self.window, 1), "window", "a positive integer")
        odd = is_count(self.kernel_size, 1) and self.kernel_size % 2 == 1
        self.require(odd, "kernel_size", "a positive odd integer")
        # Every score is pooled over this many tokens: far more would run forever.
        self.require(self.kernel_size < 2**16, "kernel_size", "below 65,536")
        self.require(self.pool_mode in ("avg", "max"), "pool_mode", "'avg' or 'max'")

    # What is known without a prompt.

    def at_depth(self, num_layers: int) -> Self:
        """The same method with the settings that depend on the model's depth filled in.

        A prefill applies the same rule by itself; this is for reports, which name the layers.

        Raises:
            ValueError: a model of ``num_layers`` layers cannot be served.
        """
        self.check(num_layers)
        if getattr(self, "layer", ()) is not None:
            return self
        return replace(self, layer=self.default_layer(num_layers))  # type: ignore[call-arg]

    def check(self, num_layers: int) -> None:
        """Raise ValueError if a model of ``num_layers`` layers cannot be served."""

    @staticmethod
    def default_layer(num_layers: int) -> int | tuple[int, ...]:
        """What the setting ``layer``, if a method has one, stands for where it is None."""
        return ()

    def selection_layers(self, num_layers: int) -> Sequence[int]:
        """The layers after which tokens may be dropped, ascending."""
        layer: int | tuple[int, ...] | None = getattr(self, "layer", ())
        layer = self.default_layer(num_layers) if layer is None else layer
        return layer if isinstance(layer, tuple) else (layer,)

    def among(self, attending: Sequence[int], num_layers: int) -> tuple[Self, dict[int, int]]:
        """The method for a model in which some layers only have attention.

        Methods rank by attention and compress caches of keys and values, so all that they count
        are the layers that have these: ``last_n``, ``first_full``, the depth of a pyramid.
        Only the setting ``layer`` names any layer of the model: tokens are dropped after it, by
        the ranking of the layers with attention up to it. A default that comes before the first
        of these, or after all but the last, is moved to the nearest one.

        Args:
            attending: the layers that have attention, ascending.
            num_layers: how many layers the model has.

        Returns:
            The method, whose ``layer`` counts the layers with attention alone; and of each of
            those, by the model's numbers, the layer after which tokens are dropped.

        Raises:
            ValueError: such a model cannot be served.

        Example:
            >>> from claa_ops.methods import CLAA
            >>> method, after = CLAA(layer=5).among([3, 7, 11], num_layers=12)
            >>> method.layer, after
            (0, {0: 5, 1: 7, 2: 11})
        """
        self.check(num_layers)
        after = dict(enumerate(attending))
        given = getattr(self, "layer", ())
        named = self.default_layer(num_layers) if given is None else given
        if len(attending) == num_layers or named == ():
            return self, after
        counted = []
        for layer in named if isinstance(named, tuple) else (named,):
            place = bisect_right(attending, layer) - 1
            nearest = max(0, min(place, len(attending) - 2)) if given is None else place
            if place == nearest:
                after[place] = layer
            if given is not None or nearest not in counted:
                counted.append(nearest)
        try:
            moved = replace(self, layer=tuple(counted) if isinstance(named, tuple) else counted[0])  # type: ignore[call-arg]
            moved.check(len(attending))
        except ValueError as error:
            raise ValueError(
                f"{error}, as counted among the layers that have attention: "
                f"{', '.join(map(str, attending))} of {num_layers}"
            ) from None
        return moved, after

    @property
    def serves_batches(self) -> bool:
        """Whether one prefill may serve several prompts."""
        return True

    @property
    def differs_by_row(self) -> bool:
        """Whether it may keep more of one prompt than of another of the same length."""
        return False

    @property
    def reads_hidden(self) -> bool:
        """Whether it reads ``layer.hidden``, which an adapter holds only for such methods."""
        return False

    def for_prompt(self, key: str) -> Self:
        """The method for one prompt of an evaluation: a random method draws anew for each key."""
        return self

    # Before the prefill.

    @property
    def two_pass(self) -> bool:
        """Whether the model starts anew, from its first layer, on the chosen tokens alone."""
        return False

    @property
    def keeps_positions(self) -> bool:
        """Whether the tokens of a second pass keep the positions that they had in the prompt."""
        return False

    @property
    def needs_ranking(self) -> bool:
        """Whether a prefill needs ``state.ranking``, which :meth:`prepare` makes."""
        return False

    def prepare(
        self, reader: Reader, input_ids: Tensor, attention_mask: Tensor | None
    ) -> Preparation | None:
        """Rank the prompt before its prefill, by asking a model; None if the method does not.

        Args:
            reader: the model, which can be asked for an answer.
            input_ids: ``[B, N]``, int64.
            attention_mask: ``[B, N]``, 0 where there is padding; None without padding.
        """
        return None

    def begin(self, state: PrefillState) -> None:
        """Prepare a new state; raise ValueError if its prompt cannot be served."""

    def choose(self, state: PrefillState) -> Tensor | None:
        """The tokens of a second pass, ``[B, k]``, if no first pass is needed to choose them."""
        return None

    def last_layer(self, state: PrefillState) -> int | None:
        """The last layer that a first pass needs; None if it would drop nothing."""
        return None

    # In each layer.

    def rows(self, state: PrefillState) -> int:
        """How many of the last query rows the method reads."""
        return self.window

    def score(self, layer: Layer) -> Tensor:
        """Scores ``[B, G, M]``, float32, of the context tokens for each key/value head.

        They rank the tokens for the layer's own cache, and are what a plot shows. Called at most
        once for each layer, and only if a decision or a plot needs them.
        """
        return layer.window_scores

    def ranks(self, state: PrefillState, layer: int) -> bool:
        """Whether this layer's scores belong in a plot of the method's ranking."""
        return True

    def observe(self, state: PrefillState, layer: Layer) -> None:
        """Take in what a layer saw, for instance by ``state.update_ranking``."""

    def compress(self, state: PrefillState, layer: Layer) -> Tensor | None:
        """The tokens that this layer's cache keeps, ``[B, G, k]`` or ``[B, k]``; None for all."""
        return None

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """The tokens that continue to the layers after this one, ``[B, k]``; None for all.

        A method that parked an earlier layer may call ``state.go_back()`` here; then it returns
        the tokens that continue to the layers after that one.
        """
        return None

    def parks(self, state: PrefillState, layer: int) -> bool:
        """Whether the hidden states behind a layer that dropped tokens are held, all of them.

        A method for which this may be true says so by :attr:`may_park`.
        """
        return False

    # Of what was dropped and parked.

    @property
    def looks_again(self) -> bool:
        """Whether tokens that were dropped may be taken up, now or in a later turn."""
        return False

    @property
    def may_park(self) -> bool:
        """Whether it may need hidden states of tokens that it drops."""
        return self.looks_again

    def take_up(self, state: PrefillState, layer: int) -> Tensor | None:
        """The parked tokens that were dropped and now join those that this layer sees.

        In the prefill it is asked at each layer after the parked one, before ``select``; in a
        later turn, whose state is a :class:`Turn`, at the parked one.

        Returns:
            ``[B, r]``, int64, ascending places in the prompt, of which ``state.missing()`` says
            which may be there, after -1 where a row takes up fewer; None if there are none.
        """
        return None

    def selects_within(self, state: PrefillState, layer: int) -> bool:
        """Whether :meth:`select` may be asked before this layer's attention, not after the layer.

        Then only the selected tokens need the attention's output, and the rest of the layer.
        """
        return False

    def key_share(self, state: PrefillState, layer: int) -> Budget | None:
        """Of its blocks of keys, the share that this layer's queries attend to; None for all."""
        return None

    @property
    def alters_layers(self) -> bool:
        """Whether layers that see the whole prompt compute otherwise than in a full prefill."""
        return False

    # Help for overriding the decisions.

    def keep_best(
        self,
        state: PrefillState,
        scores: Tensor,
        tokens: Callable[[Sizes[Any]], Any] | Tensor,
        *,
        window: int = 0,
        num_sinks: int = 0,
        grows: bool = True,
        protects: bool = True,
    ) -> Tensor:
        """The best of the tokens that a layer sees, chosen by :func:`claa_ops.select_topk`.

        What is protected is kept beside them: see :func:`claa_ops.prefill.begin`.

        Args:
            state: the prefill.
            scores: ``[B, ..., M]``, float32.
            tokens: how many to keep, as a function of the lengths in :class:`Sizes`; or ``[B]``,
                int64, protected ones included, where that depends on what was seen of each prompt
                (``differs_by_row``). The host then reads the largest.
            window, num_sinks: see :func:`claa_ops.select_topk`.
            grows: whether a longer prompt always keeps at least as many. If not, the host has to
                read how many the rows of a padded batch keep.
            protects: False for tokens that are not kept for long, among which none is protected.

        Returns:
            ``[B, ..., k]``, int64. A row of a padded batch keeps what it would keep alone, after
            -1 where other rows keep more.
        """
        protection = state.protection(scores.shape[-1], num_sinks) if protects else None
        if protection is not None:
            scores = protection.first(scores)
            if not isinstance(tokens, Tensor):
                others: Sizes[Any] = protection.others(state.row_sizes or state.sizes)
                tokens = protection.count + tokens(others)
        if isinstance(tokens, Tensor):
            counts, most = tokens, int(tokens.max())
        elif state.row_sizes is None:
            counts, most = None, tokens(state.sizes)
        else:
            counts = tokens(state.row_sizes)
            most = tokens(state.sizes) if grows else int(counts.max())
        kept = min(state.length, most)
        return select_topk(
            scores, kept, window=window, num_sinks=num_sinks, start=state.start, counts=counts
        )

    # Help for checking settings.

    def budget(self, name: str) -> Budget:
        """The named setting, a rate in (0, 1] or a number of tokens, as a budget."""
        budget = Budget.of(getattr(self, name))
        if budget is None:
            raise self.refusal(name, "a rate in (0, 1] or a number of tokens")
        return budget

    def require(self, satisfied: bool, name: str, requirement: str) -> None:
        """Raise the ValueError that names the setting, what it must be and what it is."""
        if not satisfied:
            raise self.refusal(name, requirement)

    def refusal(self, name: str, requirement: str) -> ValueError:
        """The error that names the setting, what it must be and what it is."""
        method = type(self).__name__
        return ValueError(f"{method}: {name} must be {requirement}, got {getattr(self, name)!r}")
