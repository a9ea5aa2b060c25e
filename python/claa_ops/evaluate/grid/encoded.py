"""Prompts as token ids: how they are encoded, told apart and put together into batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.grid.journal import Json
from claa_ops.evaluate.provenance import ids_digest
from claa_ops.evaluate.tasks import Example
from claa_ops.evaluate.tasks.prompt import check_fits, encode_prompt, encode_turn
from claa_ops.huggingface.models import InputError

_MARGIN = 16  # tokens that a text may gain when it is decoded and encoded again
_AHEAD = 8  # batches of prompts that are sorted by length together


@dataclass(frozen=True)
class EncodedPrompt:
    """An example as a model gets it.

    Attributes:
        index: of the example.
        example: the example.
        ids: ``[1, N]``, int64, of the prompt.
        target: ``[T]``, of the right answer, if the example has one.
        turn: ``[n]``, of the turn with the second question, if there is one.
        facts: where in the prompt the facts of all questions stand.
        protected: where in it stands what is not to be dropped.
    """

    index: int
    example: Example
    ids: Tensor
    target: Tensor | None
    turn: Tensor | None
    facts: tuple[range, ...]
    protected: tuple[range, ...] = ()

    @classmethod
    def encode(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        index: int,
        example: Example,
        chat: bool | None,
        max_length: int | None,
        protect: bool = False,
    ) -> EncodedPrompt:
        """Token ids of prompt and target; a prompt too long is cut in the middle, or refused."""
        example.check()
        target, new_tokens = None, example.max_new_tokens
        if example.target is not None:
            encoded = tokenizer(example.target, return_tensors="pt", add_special_tokens=False)
            target = encoded.input_ids[0]
            new_tokens = len(target)
        chat = chat if example.chat is None else example.chat
        text, then, turn = example.prompt, example.then, None
        if then is not None:
            turn = encode_turn(
                tokenizer, text, then.prompt, chat=chat, answer_prefix=then.answer_prefix
            )
            new_tokens += len(turn) + then.max_new_tokens
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        limits = [max_length or torch.inf, (context or torch.inf) - new_tokens]
        facts = [fact for question in example.questions for fact in question.facts]
        protected = example.protected if protect else ()
        prompt = encode_prompt(
            tokenizer,
            text,
            chat=chat,
            facts=[*facts, *protected],
            answer_prefix=example.answer_prefix,
        )
        excess = prompt.ids.shape[1] - min(limits)
        if excess > 0 and example.may_cut:
            text = _cut(tokenizer, text, int(excess) + _MARGIN, new_tokens)
            prompt = encode_prompt(tokenizer, text, chat=chat, answer_prefix=example.answer_prefix)
        check_fits(model, prompt, new_tokens)
        if max_length is not None and prompt.ids.shape[1] > max_length:
            raise InputError(
                f"the prompt has {prompt.ids.shape[1]:,} tokens, more than the {max_length:,} "
                "allowed"
            )
        found, kept = prompt.facts[: len(facts)], prompt.facts[len(facts) :]
        return cls(index, example, prompt.ids, target, turn, found, kept)

    @property
    def tokens(self) -> int:
        """How many the prompt has."""
        return self.ids.shape[1]

    @property
    def kind(self) -> tuple[bool, bool]:
        """How it is answered."""
        return self.target is None, self.turn is not None

    @property
    def draw(self) -> str:
        """What tells the draws of a random method from those for other prompts."""
        return f"{self.example.task} {self.example.name}"

    @cached_property
    def key(self) -> Json:
        """All of the prompt that an answer depends on; the name for the draws of a method."""
        facts = torch.tensor([[fact.start, fact.stop] for fact in self.facts])
        protected = torch.tensor([[part.start, part.stop] for part in self.protected])
        return {
            "task": self.example.task,
            "name": self.example.name,
            "prompt": ids_digest(self.ids),
            "target": None if self.target is None else ids_digest(self.target),
            "turn": None if self.turn is None else ids_digest(self.turn),
            "facts": ids_digest(facts),
            **({"protected": ids_digest(protected)} if self.protected else {}),
            "answers": [
                {
                    "max_new_tokens": question.max_new_tokens,
                    "stop": list(question.stop),
                    # An answer may end where it is right, which a corrected grade would not see.
                    "enough": list(question.answers) if question.enough else None,
                }
                for question in self.example.questions
            ],
        }


def batches(prompts: Iterator[EncodedPrompt], size: int) -> Iterator[list[EncodedPrompt]]:
    """Prompts that are answered in the same way, of about one length where there is a choice."""
    if size == 1:
        yield from ([prompt] for prompt in prompts)
        return
    while ahead := list(itertools.islice(prompts, _AHEAD * size)):
        for kind in sorted({prompt.kind for prompt in ahead}):
            alike = [prompt for prompt in ahead if prompt.kind == kind]
            alike.sort(key=lambda prompt: (prompt.tokens, prompt.example.max_new_tokens))
            yield from (alike[first : first + size] for first in range(0, len(alike), size))


def protection(prompts: list[EncodedPrompt], tokens: int) -> Tensor | None:
    """``[B, tokens]``, bool: what is not to be dropped of left-padded prompts; None if nothing."""
    if not any(prompt.protected for prompt in prompts):
        return None
    mask = torch.zeros(len(prompts), tokens, dtype=torch.bool)
    for row, prompt in zip(mask, prompts, strict=True):
        for part in prompt.protected:
            row[tokens - prompt.tokens :][part.start : part.stop] = True
    return mask


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Token ids ``[B, N]``, padded on the left, and their mask; None without padding."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return ids, None if mask.all() else mask


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, new_tokens: int) -> str:
    """The text without that many tokens in its middle, as LongBench shortens its prompts."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    kept = len(ids) - tokens
    if kept < _MARGIN:
        raise InputError(
            f"the prompt has {len(ids):,} tokens, of which {max(0, kept):,} would be left beside "
            f"the {new_tokens:,} that may follow"
        )
    head, tail = ids[: kept // 2], ids[len(ids) - (kept - kept // 2) :]
    # A character of several tokens may be cut through: what is left of it is none.
    return str(tokenizer.decode(head)).rstrip("\ufffd") + str(tokenizer.decode(tail)).lstrip(
        "\ufffd"
    )
