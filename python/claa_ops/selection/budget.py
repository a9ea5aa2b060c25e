"""Arithmetic of budgets: how many tokens continue, and how many entries a cache keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Size = TypeVar("Size", int, Tensor)


@dataclass(frozen=True)
class Sizes(Generic[Size]):
    """The lengths that budgets are taken of: of a padded batch, or of each of its rows.

    Attributes:
        prompt: N, the length of the prompt; for rows ``[B]``, int64, without padding.
        seen: n, how many of these tokens the current layer sees, likewise.
        num_layers: how many layers the model has.
    """

    prompt: Size
    seen: Size
    num_layers: int


@dataclass(frozen=True)
class Budget:
    """How many tokens to keep: ``count`` of them, or ``count`` out of every ``per``.

    Of a short prompt never less than ``least``, as far as it has so many.

    Lengths are integers, or tensors ``[B]`` with the length of each row of a batch.

    A rate is held as two integers, the fraction that its decimal spells. The published code
    truncates ``int(length * rate)``; integer arithmetic has no rounding error (0.29 of 100 tokens
    is 29), and it alone stays symbolic where a length is, as in ``torch.export``.
    """

    count: int
    per: int = 0
    least: int = 0

    @classmethod
    def of(cls, keep: object) -> Budget | None:
        """A rate in (0, 1] or a number of tokens as a budget; None if ``keep`` is neither."""
        if isinstance(keep, float) and 0 < keep <= 1:
            rate = Fraction(str(float(keep)))
            return cls(rate.numerator, rate.denominator)
        return cls(keep) if isinstance(keep, int) and is_count(keep, 1) else None

    def tokens(self, length: Size, least: int) -> Size:
        """How many tokens to keep: at least ``least``, or ``length`` if that is shorter."""
        least = max(least, self.least)
        if isinstance(length, Tensor):
            wanted = length * self.count // self.per if self.per else length.new_tensor(self.count)
            return torch.where(length <= least, length, wanted.clamp_min(least))
        if length <= least:
            return length
        return max(least, length * self.count // self.per if self.per else self.count)

    def within(self, other: Budget) -> Budget:
        """This rate as a rate of the tokens that ``other``, also a rate, leaves; at most 1."""
        rate = min(Fraction(1), Fraction(self.count * other.per, self.per * other.count))
        return Budget(rate.numerator, rate.denominator, self.least)

    def exceeds(self, other: Budget) -> bool:
        """Whether this keeps more than ``other``; False between a rate and a number."""
        if bool(self.per) != bool(other.per):
            return False
        return self.count * (other.per or 1) > other.count * (self.per or 1)


def equal_share(total: Size, lengths: Sequence[Size]) -> Size:
    """The largest capacity with which layers of these lengths hold at most ``total`` entries.

    Layers shorter than their share hold all of their tokens and leave the rest of it to the
    others. ``lengths`` must descend.
    """
    share, left = total * 0, total
    for done, length in enumerate(reversed(lengths)):
        share = larger(share, left // (len(lengths) - done))
        left = left - length
    return share


def either(condition: Any, a: Size, b: Size) -> Size:
    """``a`` where the condition holds, else ``b``; row by row if they are tensors."""
    if isinstance(a, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def smaller(a: Size, b: Size) -> Size:
    """The minimum; row by row if they are tensors."""
    return torch.minimum(a, b) if isinstance(a, Tensor) else min(a, b)


def larger(a: Size, b: Size) -> Size:
    """The maximum; row by row if they are tensors."""
    return torch.maximum(a, b) if isinstance(a, Tensor) else max(a, b)


def is_count(value: object, least: int) -> bool:
    """Whether the value is an integer of at least ``least`` that a tensor can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def is_number(value: object) -> bool:
    """Whether the value is a number other than True and False."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """A setting with Python's own numbers in place of numpy's, and tuples in place of lists.

    A float becomes what its digits spell: ``float32(0.7)`` is 0.7, not 0.699999988.
    """
    if isinstance(value, list | tuple):
        numbers = bool(value) and all(isinstance(item, Real) for item in value)
        return tuple(map(plain, value)) if numbers else value
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Rational):
        return float(str(value))
    return value
