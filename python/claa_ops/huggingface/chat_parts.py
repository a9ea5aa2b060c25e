"""Which tokens of prompts are never dropped: a mask, or what a chat template has put there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from claa_ops.chat import NAMES, learn, part_names
from claa_ops.selection.protection import check_protect

Protect = Tensor | Callable[[Tensor], Tensor]


class ChatParts:
    """Finds parts of chats in their tokens, so that they can be protected.

    The marks of the chat template are learnt by rendering it once; the messages need not be known.

    Args:
        tokenizer: of the model, with a chat template.
        names: which parts, in a list or with commas between. ``"system"`` is all that precedes the
            first message of the user: the system prompt, and tool definitions if they are there;
            ``"tools"`` are the tool definitions, wherever the template puts them; ``"template"``
            are the tokens of the template itself: role markers, special tokens.
        chat_template: in place of the tokenizer's own.

    A part that a prompt does not have is not protected. Called with ``input_ids`` ``[B, N]`` it
    returns a mask, bool, of the same shape and on the same device; on a GPU it waits for the ids.

    Raises:
        ValueError: there is no such part, or the template can have none.

    Example::

        protect = ChatParts(tokenizer, "system,tools")
        with claa_ops.attached(model, CLAA(keep=0.1), protect=protect):
            model.generate(**chat, max_new_tokens=64)
    """

    def __init__(
        self, tokenizer: Any, names: str | Sequence[str], chat_template: str | None = None
    ) -> None:
        found = part_names(names)
        if found is None:
            raise ValueError(f"ChatParts: names must be any of {', '.join(NAMES)}, got {names!r}")
        self.names = found
        try:
            self._chat = learn(tokenizer, chat_template)
            self._chat.spans(found, [])
        except ValueError as error:
            raise ValueError(f"ChatParts: {error}") from None

    def __call__(self, input_ids: Tensor) -> Tensor:
        """``[B, N]``, bool: which tokens of the prompts belong to the named parts."""
        mask = torch.zeros(input_ids.shape, dtype=torch.bool)
        for row, prompt in zip(mask, input_ids.tolist(), strict=True):
            flat = self._chat.spans(self.names, prompt)
            for begin, end in zip(flat[::2], flat[1::2], strict=True):
                row[begin:end] = True
        return mask.to(input_ids.device)


def protected_of(protect: Protect | None, tokens: Tensor) -> Tensor | None:
    """The mask ``[B, N]`` for these prompts, on their device.

    Args:
        protect: the mask, or a function of ``input_ids`` that makes it.
        tokens: ``[B, N]``, the ids; or their embeddings, ``[B, N, C]``.

    Raises:
        TypeError: it is no mask.
        ValueError: it is none of these prompts; or a function is to make it, and there are no ids.
    """
    if callable(protect) and tokens.dim() == 3:
        raise ValueError(
            "ClaaCache: protect must be a mask where a prompt comes as embeddings, got a function "
            "of token ids"
        )
    mask = protect(tokens) if callable(protect) else protect
    if mask is None:
        return None
    batch, length = tokens.shape[:2]
    check_protect("ClaaCache", mask, length)
    if len(mask) != batch:
        raise ValueError(
            f"ClaaCache: protect must have shape [{batch}, {length}], got {list(mask.shape)}"
        )
    return mask.to(tokens.device)
