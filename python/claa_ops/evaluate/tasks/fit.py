"""Examples of an exact length in tokens, from prompts whose length is open."""

from __future__ import annotations

import random
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from claa_ops.evaluate.guard import left_out
from claa_ops.evaluate.tasks.example import Example
from claa_ops.evaluate.tasks.layout import Draft, Make, Source
from claa_ops.evaluate.tasks.needle import filler_sentences
from claa_ops.huggingface.models import InputError

_LONGEST = 400  # characters of a piece of filler; a file without full stops is one sentence
_AROUND = 300  # characters on both sides of an insertion that may share tokens with it
_NEAR = 40  # characters more or less that an opening may have than the shortest of its tokens
_SKIPPED = 4  # sentences that an opening may skip
_SAMPLE = 16  # units that tell how many tokens one has
_OPENING_UNITS = 3  # as many tokens an opening may have
_FEWER = 3  # units that may make room for an opening


class TokenCounter(Protocol):
    """How many tokens texts have, by the tokenizer of a model."""

    def __call__(self, text: str) -> int:
        """Tokens of a text alone, without special tokens."""

    def finished(self, prompt: str, answer_prefix: str) -> int:
        """Tokens that a model gets for a prompt: with template, prefix and special tokens."""


@dataclass(frozen=True)
class Recall:
    """The share of the right answers that stand in what a model says, whatever their case."""

    answers: tuple[str, ...]

    def __call__(self, answer: str) -> float:
        """The score of an answer, in [0, 1]."""
        said = answer.lower()
        return sum(right.lower() in said for right in self.answers) / len(self.answers)

    def is_full(self, answer: str) -> bool:
        """Whether all are there, whatever may follow."""
        return self(answer) == 1.0


def drafted_examples(
    task: str,
    make: Make,
    count: TokenCounter,
    *,
    lengths: Sequence[int],
    prompts: int,
    seed: int,
    filler: Path | None,
    on_problem: Callable[[str], None],
) -> Iterator[Example]:
    """Yield ``prompts`` examples of each length, the same ones for the same seed.

    A prompt among the sentences of a filler has exactly as many tokens as asked for, counted in
    the chat template if there is one, with the answer's prefix, by the tokenizer of ``count``; it
    begins within a sentence. Should no such cut give that number, and where a prompt is a list, it
    has as many as whole lines give, and never more.

    Args:
        task: the name of the task.
        make: makes a draft of it.
        count: how many tokens texts have.
        lengths: tokens of the prompts.
        prompts: for each length.
        seed: decides the facts, their places and where the filler begins.
        filler: a .txt file or a folder of them; CPython's own manual if not given.
        on_problem: told of a length that has no room for the facts; the others are yielded.

    Raises:
        InputError: there is no filler.
    """
    pieces = [
        piece
        for sentence in filler_sentences(filler)
        for piece in (
            [sentence]
            if len(sentence) <= _LONGEST
            else textwrap.wrap(sentence, _LONGEST, break_on_hyphens=False)
        )
    ]
    for length in lengths:
        with left_out(f"{task}, {length:,} tokens", on_problem):
            for index in range(prompts):
                name = f"{length} tokens, seed {seed}, {index}"
                draft = make(Source(random.Random(f"{task}, {name}"), length, pieces))
                yield _example(task, name, draft, count, length)


def _example(task: str, name: str, draft: Draft, count: TokenCounter, length: int) -> Example:
    prompt = fit(draft, count, length)
    then = None
    if draft.then is not None:
        then = Example(
            task=task,
            name=f"{name}, second question",
            prompt=draft.then.text,
            answer_prefix=draft.then.prefix,
            grade=Recall(draft.then.answers),
            answers=draft.then.answers,
            max_new_tokens=_answer_tokens(draft.then.answers, count, draft.new_tokens),
            enough=Recall(draft.then.answers).is_full,
            facts=_spans(prompt, draft.then.needed),
        )
    body = range(len(draft.head), len(prompt) - len(draft.tail))
    return Example(
        task=task,
        name=name,
        prompt=prompt,
        answer_prefix=draft.prefix,
        grade=Recall(draft.answers),
        answers=draft.answers,
        max_new_tokens=_answer_tokens(draft.answers, count, draft.new_tokens),
        # A second question comes after the whole answer.
        enough=None if then else Recall(draft.answers).is_full,
        fact=draft.needed[0] if len(draft.needed) == 1 else None,
        facts=_spans(prompt, draft.needed) + _occurrences(prompt, body, draft.counted),
        protected=_spans(prompt, draft.protected),
        place={"length": length},
        then=then,
    )


def _answer_tokens(answers: Sequence[str], count: TokenCounter, least: int) -> int:
    """Room for all answers in a list, whatever the tokenizer makes of them."""
    return max(least, count(", ".join(answers)) + 8)


def _spans(prompt: str, needed: Sequence[str]) -> tuple[tuple[int, int], ...]:
    for fact in needed:
        if prompt.count(fact) != 1:
            raise InputError(f"a prompt must have its fact once, this one has it more: {fact!r}")
    begins = [prompt.index(fact) for fact in needed]
    return tuple((at, at + len(fact)) for at, fact in zip(begins, needed, strict=True))


def _occurrences(prompt: str, body: range, words: Sequence[str]) -> tuple[tuple[int, int], ...]:
    if not words:
        return ()
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})\b")
    return tuple(found.span() for found in pattern.finditer(prompt, body.start, body.stop))


def fit(draft: Draft, count: TokenCounter, length: int) -> str:
    """The draft's prompt of that length, or the longest shorter one.

    Raises:
        InputError: without any filler it is longer.
    """

    def tokens(units: int, opening: str = "") -> int:
        return count.finished(draft.prompt(units, opening), draft.prefix)

    least = tokens(draft.body.least)
    if least > length:
        raise InputError(
            f"a prompt of this task must have at least {least:,} tokens, got a length of {length:,}"
        )
    has_openings = draft.body.before(1, 0) != ""
    enough = _OPENING_UNITS if has_openings else 0
    units, used = _most_units(tokens, draft.body.least, least, length, enough)
    if not has_openings:
        return draft.prompt(units)
    # Where no opening has the tokens that are missing, one may have them and those of a unit more.
    for fewer in range(min(_FEWER, units - draft.body.least) + 1):
        shorter = draft.prompt(units - fewer)
        missing = length - (tokens(units - fewer) if fewer else used)
        if missing == 0:
            return shorter
        for opening in _openings(draft, shorter, count, missing):
            if tokens(units - fewer, opening) == length:
                return draft.prompt(units - fewer, opening)
    return draft.prompt(_most_units(tokens, units, used, length, 0)[0])


def _most_units(
    tokens: Callable[[int], int], least: int, used: int, length: int, enough: int
) -> tuple[int, int]:
    """The most units whose prompt is not longer, or some that lack no more than ``enough``.

    ``used`` are the tokens of the least units; returns the units and their tokens.
    """
    low, low_used = least, used
    high: int | None = None
    rate = 0.0  # tokens of a unit
    while high is None or high - low > 1:
        if rate == 0:
            guess = low + _SAMPLE
        else:
            guess = low + max(1, round((length - low_used) / rate - enough / 2))
        if high is not None:
            guess = min(guess, high - 1)
        found = tokens(guess)
        rate = max((found - low_used) / (guess - low), 1.0)
        if found > length:
            high = guess
        else:
            low, low_used = guess, found
            if length - low_used <= enough * rate:
                break
    return low, low_used


def _openings(draft: Draft, whole: str, count: TokenCounter, missing: int) -> Iterator[str]:
    """Ends of the text before the first unit that add so many tokens, whole words first."""
    body, at = draft.body, len(draft.head)
    left, right = whole[max(0, at - _AROUND) : at], whole[at : at + _AROUND]
    alone = count(left + right)

    def gain(text: str) -> int:
        return count(left + body.opening(text) + right) - alone

    for skip in range(_SKIPPED):
        text = body.before(4 * missing + _NEAR, skip)
        while text and gain(text) < missing:
            text = body.before(2 * len(text), skip)
        low, high = 0, len(text)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if gain(text[-middle:]) < missing else (low, middle)
        near = range(max(1, high - _NEAR), min(high + _NEAR, len(text)))
        starts = [length for length in near if text[-length].isalnum()]
        for length in sorted(starts, key=lambda length: text[-length - 1].isalnum()):
            if gain(text[-length:]) == missing:
                yield body.opening(text[-length:])
