"""A long prompt that every machine can build: CPython's own manual with one fact planted in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INSTRUCTION = "Some facts are hidden within the following text. Memorize them."
_ANSWER = "feed the ducks at the lake"
_FACT = f"The best thing to do in Boston is to {_ANSWER}."
_QUESTION = "According to the text, what is the best thing to do in Boston?"


@dataclass(frozen=True)
class Task:
    """A prompt and, where they are known, the fact in it and the answer that shows it was found."""

    prompt: str
    fact: str | None = None
    answer: str | None = None


def needle_task(tokenizer: PreTrainedTokenizerBase, tokens: int, depth: float = 0.5) -> Task:
    """Build a prompt of about `tokens` tokens with the fact after a share `depth` of the prose."""
    frame = f"{_INSTRUCTION}\n\n{_FACT}\n\n{_QUESTION}"
    budget = tokens - _count(tokenizer, frame)
    paragraphs: list[str] = []
    lengths: list[int] = []
    for paragraph in manual_prose():
        length = _count(tokenizer, paragraph)
        if sum(lengths) + length > budget:
            break
        paragraphs.append(paragraph)
        lengths.append(length)
    # The paragraph border nearest to the wanted depth, in tokens.
    borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    middle = min(range(len(borders)), key=lambda i: abs(borders[i] - depth * borders[-1]))
    text = "\n\n".join([*paragraphs[:middle], _FACT, *paragraphs[middle:]])
    return Task(f"{_INSTRUCTION}\n\n{text}\n\n{_QUESTION}", _FACT, _ANSWER)


def manual_prose() -> Iterator[str]:
    """Paragraphs of plain sentences: no headings, grammar, code, lists or signatures."""
    for name in sorted(topics):
        for block in topics[name].split("\n\n"):
            lines = block.split("\n")
            flush_left = all(line[:1].isalpha() for line in lines)
            if len(lines) > 1 and flush_left and block.endswith("."):
                yield " ".join(lines)


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)
