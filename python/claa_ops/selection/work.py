"""Multiply-adds, the unit of every statement about cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one forward or more, for one prompt.

    Attributes:
        linear: with the weights of the layers.
        attention: of queries with keys, and of probabilities with values.
        head: with the weights of the language-model head.
    """

    linear: int = 0
    attention: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return self.linear + self.attention + self.head

    def __add__(self, other: Work) -> Work:
        return Work(
            self.linear + other.linear, self.attention + other.attention, self.head + other.head
        )
