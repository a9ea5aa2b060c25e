"""The unit of every statement about cost: multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one forward or more, for one prompt.

    Attributes:
        linear: by the weights of the layers.
        attention: of queries with keys, and of probabilities with values.
        head: by the weights of the head.
    """

    linear: int = 0
    attention: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.head

    def __add__(self, other: Work) -> Work:
        return Work(
            self.linear + other.linear, self.attention + other.attention, self.head + other.head
        )
