"""What a ranking system decides about a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from claa_ops.ops._pool_mode import PoolMode
from claa_ops.ops.score_tokens import score_tokens
from claa_ops.ops.select_topk import select_topk
from claa_ops.selection.budget import Budget, Sizes, is_count, plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from claa_ops.selection.state import PrefillState
    from claa_ops.selection.work import Work


class Preparation(NamedTuple):
    """What a method found out about a prompt before its prefill."""

    ranking: Tensor  # [B, N], float32: how important each token is
    work: Work  # what that took


@dataclass(frozen=True, kw_only=True)
class Method:
    """A ranking system: settings, and its decisions for each layer of a prefill.

    The decisions below are those that keep everything; a system overrides the ones it makes
    otherwise. A method is immutable and holds nothing of a request: what it has learned so far
    stands on the :class:`~claa_ops.prefill.PrefillState`, which it may read, and whose
    ``importance`` and ``notes`` it may write. So one method serves any number of requests.

    Args:
        window: the last tokens of the prompt, whose attention ranks the others.
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
        # Every score is pooled over so many: far more would run for ever.
        self.require(self.kernel_size < 2**16, "kernel_size", "below 65,536")
        self.require(self.pool_mode in ("avg", "max"), "pool_mode", "'avg' or 'max'")

    @classmethod
    def defaults(cls, num_layers: int) -> dict[str, Any]:
        """The settings that follow the depth of the model, for :func:`make_method`."""
        return {}

    def check(self, num_layers: int) -> None:
        """Raise ValueError if a model of ``num_layers`` layers cannot be served."""

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
        self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None
    ) -> Preparation | None:
        """Rank the prompt by other means than its prefill; None if the method does not."""
        return None

    def begin(self, state: PrefillState) -> None:
        """Prepare a new state; raise ValueError if its prompt cannot be served."""

    def choose(self, state: PrefillState) -> Tensor | None:
        """The tokens of a second pass, ``[B, k]``, if no first pass is needed to choose them."""
        return None

    # In each layer.

    def ranks(self, layer: int) -> bool:
        """Whether this layer's scores belong in a plot of the system's ranking."""
        return True

    def needs_scores(self, state: PrefillState, layer: int) -> bool:
        """Whether a decision of this prefill depends on the scores of this layer."""
        return False

    def rows(self, state: PrefillState) -> int:
        """How many queries, the last ones, score the tokens."""
        return self.window

    def score(self, state: PrefillState, query: Tensor, key: Tensor, **attention: Any) -> Tensor:
        """Scores ``[B, G, M]`` of the context tokens, from the queries of the window.

        Args:
            state: the prefill.
            query: ``[B, H, W, D]``, the last :meth:`rows` queries.
            key: ``[B, G, n, D]``.
            attention: ``lse, scale, start, sliding_window, softcap, sink_logits``, as
                :func:`claa_ops.score_tokens` takes them.
        """
        return score_tokens(
            query, key, kernel_size=self.kernel_size, pool_mode=self.pool_mode, **attention
        )

    def observe(self, state: PrefillState, layer: int) -> None:
        """Take note of ``state.layer_scores``, the scores of this layer."""

    def compress(self, state: PrefillState, layer: int) -> Tensor | None:
        """Tokens that this layer's cache keeps, ``[B, G, k]`` or ``[B, k]``; None for all."""
        return None

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """Tokens, ``[B, k]``, that go on to the layers after this one; None for all."""
        return None

    # For what a system keeps.

    def keep_best(
        self,
        state: PrefillState,
        scores: Tensor,
        tokens: Callable[[Sizes[Any]], Any],
        *,
        window: int = 0,
        num_sinks: int = 0,
        grows: bool = True,
    ) -> Tensor:
        """The best of the tokens that a layer sees, as :func:`claa_ops.select_topk` has them.

        Args:
            state: the prefill.
            scores: ``[B, ..., M]``, float32.
            tokens: how many to keep, as a function of the numbers of tokens that there are.
            window, num_sinks: see :func:`claa_ops.select_topk`.
            grows: whether no shorter prompt ever keeps more. If not, the host has to read how
                much the rows of a padded batch keep.

        Returns:
            ``[B, ..., k]``, int64. A row of a padded batch keeps what it keeps alone, and -1
            stands before it.
        """
        counts = None if state.row_sizes is None else tokens(state.row_sizes)
        most = tokens(state.sizes) if counts is None or grows else int(counts.max())
        kept = min(state.length, most)
        return select_topk(
            scores, kept, window=window, num_sinks=num_sinks, start=state.start, counts=counts
        )

    # For the settings of a system.

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
        system = type(self).__name__
        return ValueError(f"{system}: {name} must be {requirement}, got {getattr(self, name)!r}")
