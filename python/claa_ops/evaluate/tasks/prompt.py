"""From text to token ids, with the place of a known fact among them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.inputs import require_text
from claa_ops.huggingface.models import InputError


@dataclass(frozen=True)
class Prompt:
    """Token ids [1, N] and, where it is known what decides the answer, the ranges of its tokens."""

    ids: Tensor
    fact: range | None = None
    facts: tuple[range, ...] = ()


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    chat: bool | None = None,
    fact: str | None = None,
    facts: Sequence[tuple[int, int]] = (),
    answer_prefix: str = "",
) -> Prompt:
    """Tokenise `text`, as a user's turn if `chat` (None: if the tokenizer has a chat template).

    The answer is made to begin with `answer_prefix`, the last thing in the prompt. Each of `facts`
    is a part of `text`: its first character, and the one after its last.

    Raises:
        InputError: the text is not Unicode, or the chat template is missing, fails or leaves the
            text out, or changes one that has facts.
    """
    user_text = text
    require_text("the prompt", text + answer_prefix)
    chat = _in_chat(tokenizer, chat)
    if chat:
        text = _as_chat(tokenizer, text)
        require_text("the prompt in the chat template", text)
    text += answer_prefix
    # A template writes the special tokens itself.
    encoding = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
    place = None
    if fact is not None:
        begin = text.index(fact)
        first = encoding.char_to_token(begin)
        last = encoding.char_to_token(begin + len(fact) - 1)
        place = range(first, last + 1)
    ranges = []
    if facts:
        kept = user_text.strip()  # templates may trim a text
        if kept not in text:
            raise InputError(
                "the chat template changes the prompt, which has facts: use chat=False"
            )
        shift = text.index(kept) - user_text.index(kept)
        for begin, end in facts:
            first = encoding.char_to_token(begin + shift)
            ranges.append(range(first, encoding.char_to_token(end + shift - 1) + 1))
    return Prompt(encoding.input_ids, place, tuple(ranges))


_ANSWER = "This stands for an answer of the model"


def encode_turn(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    question: str,
    *,
    chat: bool | None = None,
    answer_prefix: str = "",
) -> Tensor:
    """Tokenise all that stands between the answer to a prompt and the next answer, ``[n]``.

    In a chat that is what the template writes after the assistant's turn: its end, the user's
    second turn and the beginning of the assistant's. In plain text the question is a paragraph.

    Args:
        tokenizer: of the model.
        text: the prompt, as :func:`encode_prompt` takes it.
        question: the user's second turn.
        chat, answer_prefix: as :func:`encode_prompt` takes them.

    Raises:
        InputError: as :func:`encode_prompt`; or the template leaves the answer out.
    """
    require_text("the question", question + answer_prefix)
    if not _in_chat(tokenizer, chat):
        between = f"\n\n{question}\n"
    else:
        _, found, between = _as_chat(tokenizer, text, _ANSWER, question).rpartition(_ANSWER)
        if not found:
            raise InputError("the chat template leaves the answer out: use chat=False")
    encoded = tokenizer(between + answer_prefix, return_tensors="pt", add_special_tokens=False)
    return encoded.input_ids[0]


@dataclass(frozen=True)
class PromptCounter:
    """How many tokens texts have by a tokenizer, alone and as prompts.

    Attributes:
        tokenizer: of the model that will read them.
        chat: whether the chat template applies; None: if the tokenizer has one.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool | None = None

    def __call__(self, text: str) -> int:
        """Tokens of a text alone, without special tokens."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def finished(self, prompt: str, answer_prefix: str) -> int:
        """Tokens that the model gets for a prompt: with template, prefix and special tokens."""
        encoded = encode_prompt(self.tokenizer, prompt, chat=self.chat, answer_prefix=answer_prefix)
        return encoded.ids.shape[1]


def _in_chat(tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Whether the chat template applies; InputError if it should and there is none."""
    if chat and not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template: use chat=False")
    return bool(tokenizer.chat_template) if chat is None else chat


def _as_chat(tokenizer: PreTrainedTokenizerBase, *texts: str) -> str:
    """Turns of user and assistant; templates are programs, and may do anything with them."""
    roles = itertools.cycle(["user", "assistant"])
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    try:
        chat = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        reason = f"the chat template fails: {str(error) or type(error).__name__}"
        raise InputError(f"{' '.join(reason.split())}: use chat=False") from error
    # Templates may trim a text or escape characters in it, but words stay.
    longest = [max(re.findall(r"\w+", text), key=len, default="") for text in texts[::2]]
    if not chat.strip() or not all(word in chat for word in longest):
        raise InputError("the chat template leaves the prompt out: use chat=False")
    return chat


def check_fits(
    model: PreTrainedModel, prompt: Prompt, max_new_tokens: int, of: str = "the model"
) -> None:
    """Refuse a prompt that leaves the context no room for the answer, or has unknown tokens.

    `of` is what the message calls the model.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = prompt.ids.shape[1]
    if tokens == 0:
        raise InputError("the prompt has no tokens")
    if context and tokens + max_new_tokens > context:
        raise InputError(
            f"the prompt has {tokens:,} tokens and {max_new_tokens:,} may follow, but {of}'s "
            f"context holds {context:,}"
        )
    highest, table = int(prompt.ids.max()), model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    if highest >= len(table):
        raise InputError(
            f"token {highest} of the prompt lies beyond {of}'s embedding of {len(table)}: the "
            "tokenizer is of another model, or has tokens that this one never had"
        )
