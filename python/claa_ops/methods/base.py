"""What a ranking system decides about a prompt, and how it states its budgets."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import Tensor

from claa_ops.ops._pool_mode import PoolMode
from claa_ops.ops.score_tokens import score_tokens

if TYPE_CHECKING:
    from claa_ops.prefill.state import PrefillState


@dataclass(frozen=True, kw_only=True)
class Method:
    """A ranking system: settings, and its decisions for each layer of a prefill.

    The decisions below are those that keep everything; a system overrides the ones it makes
    otherwise. A method is immutable and holds nothing of a request: what it has learned so far
    stands on the :class:`~claa_ops.prefill.PrefillState`, which it may read and whose
    ``importance`` it may write. So one method serves any number of requests.

    Args:
        window: the last tokens of the prompt, whose attention ranks the others.
        kernel_size: odd number of neighbouring tokens over which scores are pooled.
        pooling: ``"avg"`` or ``"max"``.

    Raises:
        ValueError: a setting is out of its range.
    """

    window: int = 8
    kernel_size: int = 7
    pooling: PoolMode = "avg"

    def __post_init__(self) -> None:
        self.require(is_count(self.window, 1), "window", "a positive integer")
        odd = is_count(self.kernel_size, 1) and self.kernel_size % 2 == 1
        self.require(odd, "kernel_size", "a positive odd integer")
        self.require(self.pooling in ("avg", "max"), "pooling", "'avg' or 'max'")

    def check(self, num_layers: int) -> None:
        """Raise ValueError if a model of ``num_layers`` layers cannot be served."""

    def ranks(self, layer: int) -> bool:
        """Whether this layer's scores belong in a plot of the system's ranking."""
        return True

    def needs_scores(self, state: PrefillState, layer: int) -> bool:
        """Whether a decision of this prefill depends on the scores of this layer."""
        return False

    def score(self, query: Tensor, key: Tensor, **attention: Any) -> Tensor:
        """Scores ``[B, G, M]`` of the context tokens, from the queries of the window."""
        return score_tokens(
            query, key, kernel_size=self.kernel_size, mode=self.pooling, **attention
        )

    def observe(self, state: PrefillState, layer: int) -> None:
        """Take note of ``state.layer_scores``, the scores of this layer."""

    def compress(self, state: PrefillState, layer: int) -> Tensor | None:
        """Tokens that this layer's cache keeps, ``[B, G, k]`` or ``[B, k]``; None for all."""
        return None

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """Tokens, ``[B, k]``, that go on to the layers after this one; None for all."""
        return None

    def budget(self, name: str) -> Budget:
        """The named setting, a rate in (0, 1] or a number of tokens, as a budget."""
        keep = getattr(self, name)
        if isinstance(keep, float) and 0 < keep <= 1:
            rate = Fraction(str(float(keep)))
            return Budget(rate.numerator, rate.denominator)
        self.require(is_count(keep, 1), name, "a rate in (0, 1] or a number of tokens")
        return Budget(keep)

    def require(self, satisfied: bool, name: str, requirement: str) -> None:
        """Raise the ValueError that names the setting, what it must be and what it is."""
        if not satisfied:
            system = type(self).__name__
            raise ValueError(f"{system}: {name} must be {requirement}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Budget:
    """How many tokens to keep: ``count`` of them, or ``count`` out of every ``per``.

    A rate is held as two integers, the fraction that its decimal spells. The published code
    truncates ``int(length * rate)``; with a symbolic length, as in ``torch.export``, only integer
    arithmetic stays symbolic, and it has no rounding: 0.3 of 10 tokens is 3.
    """

    count: int
    per: int = 0

    def tokens(self, prompt_length: int, window: int) -> int:
        """The number of tokens; never less than the window, or the prompt if that is shorter."""
        if prompt_length <= window:
            return prompt_length
        return max(window, prompt_length * self.count // self.per if self.per else self.count)


def is_count(value: object, least: int) -> bool:
    """Whether the value is an integer of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
