"""Needle in a haystack: facts planted in filler text, one of which is asked for."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from claa_ops.evaluate.guard import left_out
from claa_ops.evaluate.inputs import require_text
from claa_ops.evaluate.tasks.example import Example
from claa_ops.huggingface.models import InputError

CountTokens = Callable[[str], int]

_ADJECTIVES = (
    "amber brass cedar copper crimson dusty frozen golden hidden iron ivory marble narrow olive "
    "painted quiet rusty silver velvet winding"
).split()
_NOUNS = (
    "archive bakery boathouse bridge cellar chapel cottage foundry gallery gate greenhouse harbour "
    "library lighthouse mill observatory stable theatre tower vault"
).split()
_CITIES = "Aberdeen Bergen Bruges Cork Ghent Graz Lisbon Lyon Malmo Porto Seville Turin".split()
_PASTIMES = (
    "row a wooden boat under the old bridges",
    "taste warm bread at the harbour market",
    "watch the puppet show behind the town hall",
    "climb the bell tower before sunrise",
    "draw the lions on the library steps",
    "count the herons along the canal",
    "play chess with strangers in the park",
    "ride the yellow tram to the last stop",
    "look for amber on the northern beach",
    "listen to the organ on a rainy evening",
)
KINDS = ("number", "sentence", "four-keys")


def needle_examples(
    kind: str,
    count_tokens: CountTokens,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    prompts: int,
    seed: int,
    filler: Path | None = None,
    on_problem: Callable[[str], None],
) -> Iterator[Example]:
    """Yield ``prompts`` examples for each length and depth, the same ones for the same seed.

    Args:
        kind: ``number`` (one code), ``sentence`` (one pastime) or ``four-keys`` (four codes, one
            of which is asked for; the others lie anywhere).
        count_tokens: the number of tokens of a text.
        lengths: about how many tokens the prompts have.
        depths: the share of the filler before the fact.
        prompts: for each length and depth.
        seed: decides the facts and where the filler begins.
        filler: a .txt file or a folder of them; CPython's own manual if not given. Text that is
            shorter than a prompt is repeated.
        on_problem: told of a length that leaves no room for any text; the others are yielded.

    Raises:
        InputError: the folder has no text.
    """
    sentences = filler_sentences(filler)
    count = cache(count_tokens)
    for length in lengths:
        with left_out(f"needle-{kind}, {length:,} tokens", on_problem):
            yield from _of_length(kind, sentences, count, length, depths, prompts, seed)


def _of_length(
    kind: str,
    sentences: list[str],
    count: CountTokens,
    length: int,
    depths: Sequence[float],
    prompts: int,
    seed: int,
) -> Iterator[Example]:
    for depth in depths:
        for index in range(prompts):
            name = f"{length} tokens, depth {depth:g}, seed {seed}, {index}"
            draw = random.Random(f"{kind}, {name}")
            facts, question, prefix, target = _FACTS[kind](draw)
            frame = f"{_INSTRUCTION}\n\n\n\n{question}{prefix}{target}"
            room = length - count(frame) - sum(count(fact) + 1 for fact in facts)
            if room < 1:
                raise InputError(
                    f"a needle prompt must have more than {length - room} tokens, the facts "
                    f"and the question alone, got a length of {length}"
                )
            text = _fill(sentences, draw.randrange(len(sentences)), count, room)
            text.insert(round(depth * len(text)), facts[0])
            for other in facts[1:]:
                text.insert(draw.randrange(len(text) + 1), other)
            prompt = f"{_INSTRUCTION}\n\n{' '.join(text)}\n\n{question}"
            begin = prompt.index(facts[0])
            yield Example(
                task=f"needle-{kind}",
                name=name,
                prompt=prompt,
                answer_prefix=prefix,
                target=target,
                fact=facts[0],
                facts=((begin, begin + len(facts[0])),),
                place={"length": length, "depth": depth},
            )


def demo_example(count_tokens: CountTokens, tokens: int, depth: float = 0.5) -> Example:
    """One needle in whole paragraphs of CPython's own manual, for ``claa-ops demo``.

    Args:
        count_tokens: the number of tokens of a text.
        tokens: about how many the prompt has.
        depth: the share of the prose before the fact.

    Returns:
        An example whose one answer is part of its fact.
    """
    budget = tokens - count_tokens(_DEMO_FRAME.format(_DEMO_FACT))
    paragraphs: list[str] = []
    lengths: list[int] = []
    for paragraph in manual_prose():
        length = count_tokens(paragraph)
        if sum(lengths) + length > budget:
            break
        paragraphs.append(paragraph)
        lengths.append(length)
    # The paragraph border nearest to the wanted depth, in tokens.
    borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    middle = min(range(len(borders)), key=lambda i: abs(borders[i] - depth * borders[-1]))
    text = "\n\n".join([*paragraphs[:middle], _DEMO_FACT, *paragraphs[middle:]])
    return Example(
        task="demo",
        name=f"{tokens} tokens",
        prompt=_DEMO_FRAME.format(text),
        answers=(_DEMO_ANSWER,),
        fact=_DEMO_FACT,
    )


def manual_prose() -> Iterator[str]:
    """Paragraphs of CPython's manual in plain sentences: no headings, grammar, code or lists."""
    for name in sorted(topics):
        for block in topics[name].split("\n\n"):
            lines = block.split("\n")
            flush_left = all(line[:1].isalpha() for line in lines)
            if len(lines) > 1 and flush_left and block.endswith("."):
                yield " ".join(lines)


def filler_sentences(folder: Path | None) -> list[str]:
    """The sentences of a .txt file, or of all of a folder, by name; for None CPython's manual."""
    if folder is None:
        texts = list(manual_prose())
    else:
        try:
            files = [folder] if folder.is_file() else sorted(folder.glob("*.txt"))
            texts = [_text(file) for file in files if file.suffix == ".txt"]
        except OSError as error:
            raise InputError(f"cannot read the filler in {folder}: {error}") from error
    joined = (" ".join(text.split()) for text in texts)
    sentences = [part for text in joined for part in re.split(r"(?<=[.!?]) ", text) if part]
    if not sentences:
        raise InputError(f"the filler {folder} must be a folder with text in .txt files, or one")
    return sentences


def _text(file: Path) -> str:
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    require_text(f"the filler {file}", text)
    return text


def _fill(sentences: list[str], first: int, count: CountTokens, room: int) -> list[str]:
    """Sentences from `first` on, as many as fit."""
    text: list[str] = []
    used = 0
    while True:
        sentence = sentences[(first + len(text)) % len(sentences)]
        used += count(sentence) + 1
        if used > room and text:
            return text
        text.append(sentence)


_INSTRUCTION = "Read the following text carefully. You will be asked about a detail of it."

_DEMO_ANSWER = "feed the ducks at the lake"
_DEMO_FACT = f"The best thing to do in Boston is to {_DEMO_ANSWER}."
_DEMO_FRAME = (
    "Some facts are hidden within the following text. Memorize them.\n\n{}\n\n"
    "According to the text, what is the best thing to do in Boston?"
)

# What is planted (the fact asked for first), the question, how its answer begins, and its end.
_Facts = tuple[list[str], str, str, str]


def _codes(draw: random.Random, number: int) -> _Facts:
    places: list[str] = []
    while len(places) < number:
        place = f"{draw.choice(_ADJECTIVES)} {draw.choice(_NOUNS)}"
        if place not in places:
            places.append(place)
    codes = [str(draw.randrange(10_000, 100_000)) for _ in places]
    pairs = zip(places, codes, strict=True)
    facts = [f"The access code for the {place} is {code}." for place, code in pairs]
    question = f"What is the access code for the {places[0]} mentioned in the text?"
    return facts, question, f"The access code for the {places[0]} is", f" {codes[0]}"


def _pastime(draw: random.Random) -> _Facts:
    begin = f"The best thing to do in {draw.choice(_CITIES)} is to"
    answer = draw.choice(_PASTIMES)
    city = begin.split(" is to")[0].rpartition(" ")[2]
    question = f"According to the text, what is the best thing to do in {city}?"
    return [f"{begin} {answer}."], question, begin, f" {answer}"


_FACTS: dict[str, Callable[[random.Random], _Facts]] = {
    "number": lambda draw: _codes(draw, 1),
    "sentence": _pastime,
    "four-keys": lambda draw: _codes(draw, 4),
}
