"""Greedy decoding, one token after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from claa_ops.huggingface.cache import ClaaCache
from claa_ops.huggingface.transformers_api import cache_argument


def greedy(
    model: PreTrainedModel,
    logits: Tensor,
    cache: ClaaCache,
    position: Tensor,
    attention_mask: Tensor | None,
    ends: list[int],
) -> Iterator[Tensor]:
    """The tokens of :func:`decode` one by one, ``[B, 1]``, until all rows have ended.

    The first follows from the prompt's logits ``[B, V]``; every other one takes a forward.
    """
    end = torch.tensor(ends, dtype=torch.int64, device=logits.device)
    token = logits.argmax(dim=-1, keepdim=True)
    ended, position = torch.isin(token, end), position[:, None]
    yield token
    while not ended.all():
        if attention_mask is not None:
            one = torch.ones_like(attention_mask[:, :1])
            attention_mask = torch.cat([attention_mask, one], dim=1)
        output = model(
            input_ids=token,
            attention_mask=attention_mask,
            position_ids=position,
            use_cache=True,
            **cache_argument(model, cache),
        )
        token = torch.where(ended, token, output.logits[:, -1].argmax(dim=-1, keepdim=True))
        ended, position = ended | torch.isin(token, end), position + 1
        yield token


def end_tokens(
    model: PreTrainedModel, eos_token_id: int | Sequence[int] | None = None
) -> list[int]:
    """The tokens that end an answer: the given ones, else those of the model's configuration."""
    if eos_token_id is None:
        config = model.generation_config
        eos_token_id = () if config is None or config.eos_token_id is None else config.eos_token_id
    tokens: list[Any] = [eos_token_id]
    if isinstance(eos_token_id, (Sequence, Tensor)) and not isinstance(eos_token_id, str):
        tokens = list(eos_token_id)
    if not all(isinstance(token, (Integral, Tensor)) for token in tokens):
        raise TypeError(
            f"decode: eos_token_id must be a token or several of them, got {eos_token_id!r}"
        )
    return [int(token) for token in tokens]


def count_positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Positions ``[B, n]`` that count the tokens of each row from 0."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)
