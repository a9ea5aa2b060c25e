"""What a model answers after a prefill: decoded greedily, or compared with the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.huggingface.decoding import end_tokens, greedy
from claa_ops.huggingface.transformers_api import cache_argument
from claa_ops.prefill import Prefilled


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
            use_cache=True,
            **cache_argument(model, prefilled.cache),
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
    stop = [mark for mark in stop if mark]  # an empty text is in every answer
    ends = end_tokens(model)
    steps = greedy(model, prefilled.logits, prefilled.cache, prefilled.next_position, None, ends)
    tokens: list[int] = []
    for token in islice(steps, max_new_tokens):
        if int(token) in ends:
            break
        tokens.append(int(token))
        if any(mark in _text(tokenizer, tokens) for mark in stop):
            break
    text = _text(tokenizer, tokens)
    return text[: min((text.index(mark) for mark in stop if mark in text), default=len(text))]


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
