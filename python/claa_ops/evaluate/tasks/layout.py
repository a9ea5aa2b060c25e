"""Prompts whose length is still open: facts planted in a text that grows by units."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Body(Protocol):
    """The part of a prompt that is as long as there is room.

    Attributes:
        least: the number of units that it has at least.
    """

    @property
    def least(self) -> int:
        """The smallest number of units."""

    def text(self, units: int) -> str:
        """The text with so many units of filler, the same whenever it is asked for."""

    def before(self, characters: int, skip: int) -> str:
        """So much text that ends before the first unit, or units before it; empty if none."""

    def opening(self, text: str) -> str:
        """The end of the text before the first unit, as it stands before the unit."""


@dataclass(frozen=True)
class Question:
    """A second question about a prompt, which comes after the answer to the first.

    Attributes:
        text: the user's turn.
        prefix: how its answer is made to begin.
        answers: the texts that a right answer has.
        needed: the parts of the first prompt that decide it.
    """

    text: str
    prefix: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]


@dataclass(frozen=True)
class Draft:
    """A prompt whose length is still open.

    Attributes:
        head, body, tail: the prompt, in this order.
        prefix: how the answer is made to begin.
        answers: the texts that a right answer has.
        needed: the parts of the prompt that decide the answer, each of which stands in it once.
        protected: the parts that a caller knows and may have kept whole, likewise.
        counted: words of the body of which every occurrence decides the answer.
        new_tokens: the length of an answer, unless the right ones are longer.
        then: a second question.
    """

    head: str
    body: Body
    tail: str
    prefix: str
    answers: tuple[str, ...]
    needed: tuple[str, ...] = ()
    protected: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()
    new_tokens: int = 32
    then: Question | None = None

    def prompt(self, units: int, opening: str = "") -> str:
        """The prompt with so many units."""
        return f"{self.head}{opening}{self.body.text(units)}{self.tail}"


@dataclass(frozen=True)
class Source:
    """What a draft is made from.

    Attributes:
        draw: decides everything random.
        length: the tokens that the prompt will have.
        filler: sentences, in their order.
    """

    draw: random.Random
    length: int
    filler: Sequence[str]


Make = Callable[[Source], Draft]


@dataclass(frozen=True)
class Prose:
    """Sentences of a filler, in which facts are planted.

    Attributes:
        filler: the sentences, as many times as it takes.
        first: the index of the first one.
        planted: what is planted, and the share of the sentences before it.
        unit: how a sentence stands in the text.
        joint: what stands between two units.
    """

    filler: Sequence[str]
    first: int
    planted: Sequence[tuple[float, str]]
    unit: Callable[[str], str] = str
    joint: str = " "
    least: int = 0

    def text(self, units: int) -> str:
        """The text with so many sentences."""
        parts = [
            self.unit(self.filler[(self.first + index) % len(self.filler)])
            for index in range(units)
        ]
        for depth, fact in sorted(self.planted, reverse=True):
            parts.insert(round(depth * units), fact)
        return self.joint.join(parts)

    def before(self, characters: int, skip: int) -> str:
        """The end of the sentences before the first, or before those that are skipped."""
        text, index = "", self.first - skip
        while len(text) < characters:
            index -= 1
            text = f"{self.filler[index % len(self.filler)]} {text}".rstrip()
        return text[len(text) - characters :]

    def opening(self, text: str) -> str:
        """The end of a sentence, as a unit."""
        return self.unit(text) + self.joint


class Whole:
    """A body whose units all count, so that none is cut."""

    def before(self, characters: int, skip: int) -> str:
        """No text."""
        return ""

    def opening(self, text: str) -> str:
        """The text, which is never asked for."""
        return text


@dataclass(frozen=True)
class Lines(Whole):
    """Lines that are all of one kind, one of which is asked for."""

    others: Iterator[str]
    planted: Sequence[tuple[float, str]]
    joint: str = "\n"
    least: int = 0
    _drawn: list[str] = field(default_factory=list)

    def text(self, units: int) -> str:
        """The text with so many lines beside those planted."""
        while len(self._drawn) < units:
            self._drawn.append(next(self.others))
        parts = self._drawn[:units]
        for depth, fact in sorted(self.planted, reverse=True):
            parts.insert(round(depth * units), fact)
        return self.joint.join(parts)


def scatter(draw: random.Random, facts: Iterable[str]) -> list[tuple[float, str]]:
    """Facts at random depths, in any order."""
    return [(draw.random(), fact) for fact in facts]


def scatter_in_order(draw: random.Random, facts: Sequence[str]) -> list[tuple[float, str]]:
    """Facts at random depths, in their own order."""
    return list(zip(sorted(draw.random() for _ in facts), facts, strict=True))


def prose(source: Source, planted: Sequence[tuple[float, str]]) -> Prose:
    """The filler from a random sentence on."""
    return Prose(source.filler, source.draw.randrange(len(source.filler)), planted)
