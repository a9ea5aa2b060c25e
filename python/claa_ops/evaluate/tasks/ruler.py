"""RULER's synthetic tasks, made here for any length and tokenizer (arXiv 2404.06654).

The kinds of facts, their numbers, the metric and the lengths of answers are those of the paper's
thirteen tasks; words, sentences and questions are our own, so that scores are to be compared
between methods, not with published ones. Its two tasks of questions about Wikipedia need records:
``ruler/qa:PATH``. The metric is the share of the right answers that stand in what a model says,
in capitals or not.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable, Sequence

from claa_ops.evaluate.tasks.layout import (
    Draft,
    Lines,
    Make,
    Prose,
    Source,
    prose,
    scatter,
    scatter_in_order,
)
from claa_ops.evaluate.tasks.ruler_words import common_words, frequent_words
from claa_ops.evaluate.tasks.words import different, identifier, key, letters, number, without_end

_NEEDLE_TOKENS, _VARIABLE_TOKENS = 128, 30
_NOISE = (
    "The kettle is warm.",
    "The road is long.",
    "Clouds pass by.",
    "Here we are.",
    "Some come and some go.",
)
_NUMBER, _CODE = number(7), identifier


def _hyphenated(draw: random.Random) -> str:
    return key(draw).replace(" ", "-")


def _long_key(draw: random.Random) -> str:
    """One of 400,000, enough for a text of nothing else."""
    return f"{_hyphenated(draw)}-{key(draw).split()[1]}"


def _needle(kind: str, name: str, value: str) -> str:
    return f"One of the secret {kind} of {name} is {value}."


def _asked(kind: str, names: Sequence[str], values: Sequence[str]) -> tuple[str, str, str]:
    """What comes before the text and after it, and how the answer begins."""
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    if len(values) == 1:
        one = kind.removesuffix("s")
        question = f"Which secret {one} of {listed} does the text above give?"
        prefix = f"The secret {one} of {listed} that the text gives is"
    else:
        question = f"Which secret {kind} of {listed} does the text above give? Name them all."
        prefix = f"The secret {kind} of {listed} that the text gives are"
    head = f"There are secret {kind} in the following text. Keep them in mind for a question.\n\n"
    return head, f"\n\n{question}\n", prefix


def _needles(
    *,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    value: Callable[[random.Random], str] = _NUMBER,
    noise: bool = False,
) -> Make:
    """Needles in filler: ``queries`` of ``keys`` keys are asked for, each with its values."""

    def make(source: Source) -> Draft:
        draw, kind = source.draw, "numbers" if value is _NUMBER else "codes"
        names = different(_hyphenated, draw, keys)
        drawn = iter(different(value, draw, keys * values))
        facts = {name: [next(drawn) for _ in range(values)] for name in names}
        asked = names[:queries]
        answers = tuple(answer for name in asked for answer in facts[name])
        planted = scatter(draw, (_needle(kind, name, one) for name in names for one in facts[name]))
        head, tail, prefix = _asked(kind, asked, answers)
        return Draft(
            head=head,
            body=Prose(_NOISE, 0, planted) if noise else prose(source, planted),
            tail=tail,
            prefix=prefix,
            answers=answers,
            needed=tuple(_needle(kind, name, one) for name in asked for one in facts[name]),
            new_tokens=_NEEDLE_TOKENS,
        )

    return make


def _all_needles(
    name: Callable[[random.Random], str], value: Callable[[random.Random], str]
) -> Make:
    """One needle among as many others as there is room for, and nothing else."""

    def make(source: Source) -> Draft:
        draw, kind = source.draw, "numbers" if value is _NUMBER else "codes"
        names, values = without_end(name, draw), without_end(value, draw)
        asked, answer = next(names), next(values)
        fact = _needle(kind, asked, answer)
        head, tail, prefix = _asked(kind, [asked], [answer])
        return Draft(
            head=head,
            body=Lines(map(_needle, itertools.repeat(kind), names, values), scatter(draw, [fact])),
            tail=tail,
            prefix=prefix,
            answers=(answer,),
            needed=(fact,),
            new_tokens=_NEEDLE_TOKENS,
        )

    return make


def _variables(*, chains: int, hops: int = 4) -> Make:
    """Chains of assignments in noise, one of which is asked for, after an example."""

    def make(source: Source) -> Draft:
        draw = source.draw
        names = different(letters(5, string.ascii_uppercase), draw, (chains + 1) * (hops + 1))
        values = different(number(5), draw, chains + 1)
        series = [names[first : first + hops + 1] for first in range(0, len(names), hops + 1)]
        facts = [_assignments(*chain) for chain in zip(series, values, strict=True)]
        # The last chain is the example's.
        example = Prose(_NOISE, 0, scatter_in_order(draw, facts[-1])).text(2 * len(_NOISE))
        question, prefix = _asked_value(values[-1], hops + 1)
        begin = "Follow the variables through this text.\n\n"
        shown = f"{begin}{example}\n\n{question}\n{prefix} {', '.join(series[-1])}.\n\n"
        question, prefix = _asked_value(values[0], hops + 1)
        planted = [place for chain in facts[:-1] for place in scatter_in_order(draw, chain)]
        return Draft(
            head=f"{shown}{begin}",
            body=Prose(_NOISE, 0, planted),
            tail=f"\n\n{question}\n",
            prefix=prefix,
            answers=tuple(series[0]),
            needed=tuple(facts[0]),
            new_tokens=_VARIABLE_TOKENS,
        )

    return make


def _assignments(names: Sequence[str], value: str) -> list[str]:
    first = f"VAR {names[0]} = {value}."
    return [first, *(f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(names))]


def _asked_value(value: str, count: int) -> tuple[str, str]:
    return (
        f"Which {count} variables have the value {value}, directly or through others?",
        f"The {count} variables that have the value {value} are",
    )


RULER: dict[str, Make] = {
    "ruler-niah-single-1": _needles(noise=True),
    "ruler-niah-single-2": _needles(),
    "ruler-niah-single-3": _needles(value=_CODE),
    "ruler-niah-multikey-1": _needles(keys=4),
    "ruler-niah-multikey-2": _all_needles(_long_key, _NUMBER),
    "ruler-niah-multikey-3": _all_needles(identifier, _CODE),
    "ruler-niah-multivalue": _needles(values=4),
    "ruler-niah-multiquery": _needles(keys=4, queries=4),
    "ruler-vt": _variables(chains=1),
    "ruler-vt-chains": _variables(chains=3),
    "ruler-cwe": common_words,
    "ruler-fwe": frequent_words,
}
