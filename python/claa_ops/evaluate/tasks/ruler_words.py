"""RULER's tasks of aggregation: the most common words of a list, and of a text in code words."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from claa_ops.evaluate.tasks.layout import Draft, Source, Whole
from claa_ops.evaluate.tasks.words import coinage, different, letters, without_end

_COMMON = 10
_COMMON_TOKENS, _FREQUENT_TOKENS = 120, 50
_SHORT = 4096  # prompts below it repeat their words less often
_ALPHA = 2.0  # of the zeta distribution
_VOCABULARY = 2000
_LEAST = 74  # code words from which on the fourth is sure to come more often than the fifth


def common_words(source: Source) -> Draft:
    """Ten words come more often than all others of a numbered list, after an example."""
    draw = source.draw
    often, seldom = (30, 3) if source.length >= _SHORT else (6, 1)
    begin, end = (
        "Here is a numbered list of words.\n",
        "\n\nWhich 10 words come most often in it?\n",
    )
    prefix = "The 10 most common words of the list are:"
    words = (word for word in _words(draw, source.filler) if word not in begin + end + prefix)
    chosen: list[str] = []
    while len(chosen) < 2 * _COMMON:
        word = next(words)
        if not _overlap(word, chosen):
            chosen.append(word)
    example, common = chosen[:_COMMON], chosen[_COMMON:]
    others = (word for word in words if not _overlap(word, chosen))
    shown = _List(example, others, 3, 1, draw.random()).text(_COMMON)
    return Draft(
        head=f"{begin}{shown}{end}{prefix} {_numbered(example)}\n\n{begin}",
        body=_List(common, others, often, seldom, draw.random()),
        tail=end,
        prefix=prefix,
        answers=tuple(common),
        counted=tuple(common),
        new_tokens=_COMMON_TOKENS,
    )


def frequent_words(source: Source) -> Draft:
    """Code words whose frequencies fall with the square of their rank; the first rank is dots."""
    vocabulary = ["...", *different(letters(6), source.draw, _VOCABULARY - 1)]
    return Draft(
        head="The following text is in code words, and dots stand for what is left out. "
        "Count how often each code word comes.\n\n",
        body=_Coded(vocabulary, source.draw.random()),
        tail="\n\nWhich three code words come most often in the text above? Leave out the dots.\n",
        prefix="The three code words that come most often are",
        answers=tuple(vocabulary[1:4]),
        counted=tuple(vocabulary[1:4]),
        new_tokens=_FREQUENT_TOKENS,
    )


@dataclass(frozen=True)
class _List(Whole):
    """A numbered list in which some words come often and the others, its units, seldom."""

    common: Sequence[str]
    others: Iterator[str]
    often: int
    seldom: int
    seed: float
    least: int = _COMMON
    _drawn: list[str] = field(default_factory=list)

    def text(self, units: int) -> str:
        """The list with so many seldom words."""
        while len(self._drawn) < units:
            self._drawn.append(next(self.others))
        words = [*self.common] * self.often + self._drawn[:units] * self.seldom
        random.Random(self.seed).shuffle(words)
        return _numbered(words)


@dataclass(frozen=True)
class _Coded(Whole):
    """A text of code words; the unit is a word, before its frequencies are made whole."""

    vocabulary: Sequence[str]
    seed: float
    least: int = _LEAST

    def text(self, units: int) -> str:
        """The text with about so many words."""
        total = math.pi**2 / 6  # of the zeta distribution with this exponent
        words = [
            word
            for rank, word in enumerate(self.vocabulary, start=1)
            for _ in range(int(units * rank**-_ALPHA / total))
        ]
        random.Random(self.seed).shuffle(words)
        return " ".join(words)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{index}. {word}" for index, word in enumerate(words, start=1))


def _words(draw: random.Random, filler: Sequence[str]) -> Iterator[str]:
    """Words of the filler in random order, then invented ones, all different."""
    known = {word for text in filler for word in re.findall(r"\b[a-z]{4,9}\b", text)}
    real = sorted(known)
    draw.shuffle(real)
    return itertools.chain(real, (word for word in without_end(coinage, draw) if word not in known))


def _overlap(word: str, others: Sequence[str]) -> bool:
    """Whether an answer with one of them would seem to have another."""
    return any(word in other or other in word for other in others)
