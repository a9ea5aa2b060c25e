"""What a model answers after a prefill: decoded greedily, or compared with the right answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.prefill import Prefilled
from claa_ops.prefill.passes import end_tokens


@torch.no_grad()
def force(model: PreTrainedModel, prefilled: Prefilled, target: Tensor) -> tuple[bool, float]:
    """Compare the model's choices with the tokens ``target`` ``[T]``, each after those before it.

    Returns:
        Whether each is the model's first choice, and the sum of their log-probabilities.
    """
    logits = prefilled.logits
    if target.numel() > 1:
        given = target[None, :-1].to(model.device)
        steps = torch.arange(given.shape[1], device=model.device)
        more = model(
            input_ids=given,
            position_ids=prefilled.next_position[:, None] + steps,
            past_key_values=prefilled.cache,
            use_cache=True,
        ).logits[0]
        logits = torch.cat([logits, more])
    target = target.to(logits.device)
    chosen = logits.float().log_softmax(dim=-1).gather(1, target[:, None]).sum()
    return bool((logits.argmax(dim=-1) == target).all()), float(chosen)


@torch.no_grad()
def decode_until(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefilled: Prefilled,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> str:
    """Decode one prompt greedily until a text of ``stop``, which is cut off, or the usual end."""
    ends = end_tokens(model)
    token = prefilled.logits.argmax(dim=-1, keepdim=True)
    position = prefilled.next_position[:, None]
    tokens: list[int] = []
    while True:
        if int(token) in ends:
            break
        tokens.append(int(token))
        text = _text(tokenizer, tokens)
        if any(mark in text for mark in stop) or len(tokens) == max_new_tokens:
            break
        logits = model(
            input_ids=token,
            position_ids=position,
            past_key_values=prefilled.cache,
            use_cache=True,
        ).logits
        token, position = logits[:, -1].argmax(dim=-1, keepdim=True), position + 1
    text = _text(tokenizer, tokens)
    return text[: min((text.index(mark) for mark in stop if mark in text), default=len(text))]


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
