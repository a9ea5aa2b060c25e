"""From text to token ids, with the place of a known fact among them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.models import InputError


@dataclass(frozen=True)
class Prompt:
    """Token ids [1, N] and, where a fact is known to decide the answer, its tokens' range."""

    ids: Tensor
    fact: range | None = None


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    chat: bool | None = None,
    fact: str | None = None,
    answer_prefix: str = "",
) -> Prompt:
    """Tokenise `text`, as a user's turn if `chat` (None: if the tokenizer has a chat template).

    The answer is made to begin with `answer_prefix`, the last thing in the prompt.
    """
    if chat and not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template: use --no-chat")
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if chat:
        turn = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    text += answer_prefix
    # A template writes the special tokens itself.
    encoding = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
    place = None
    if fact is not None:
        begin = text.index(fact)
        first = encoding.char_to_token(begin)
        last = encoding.char_to_token(begin + len(fact) - 1)
        place = range(first, last + 1)
    return Prompt(encoding.input_ids, place)


def check_fits(model: PreTrainedModel, prompt: Prompt, max_new_tokens: int) -> None:
    """Refuse a prompt that leaves the model's context no room for the answer."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = prompt.ids.shape[1]
    if tokens == 0:
        raise InputError("the prompt has no tokens")
    if context and tokens + max_new_tokens > context:
        raise InputError(
            f"the prompt has {tokens:,} tokens and {max_new_tokens:,} may follow, but the model's "
            f"context holds {context:,}"
        )
