"""Checks of prompts, masks and positions, before the model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError with the message unless the one element of ``condition`` is true.

    A graph that is being compiled, exported or captured cannot look at it, and asserts it when it
    runs: a failure is then a RuntimeError with the message on the CPU, and a device-side assertion
    on a GPU.
    """
    if torch.compiler.is_compiling() or _capturing(condition):
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def first_valid(attention_mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """``[B]``: the first token of each row that is not padding; None where there is no padding.

    Raises:
        TypeError: the mask is not a tensor.
        ValueError: the mask is not ``[B, N]``, or not 0s and then at least one 1 in each row.
    """
    if attention_mask is None:
        return None
    check_mask(attention_mask)
    if tuple(attention_mask.shape) != (batch, tokens):
        raise ValueError(
            f"ClaaCache: attention_mask of the prompt must have shape [{batch}, {tokens}], "
            f"got {list(attention_mask.shape)}"
        )
    valid = attention_mask.bool()
    last, rises = valid[:, -1:].all(), (valid[:, 1:] | ~valid[:, :-1]).all()
    require(
        last & rises,
        "ClaaCache: prompts must be padded on the left and have a token in each row, got an "
        "attention_mask that is not 0s and then 1s",
    )
    if not torch.compiler.is_compiling() and not _capturing(valid) and valid.all():
        return None
    return tokens - valid.sum(dim=1)


def check_mask(attention_mask: object) -> None:
    """Raise TypeError unless it is a tensor: models also take one for each type of layer."""
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            "ClaaCache: attention_mask must be a tensor [batch, tokens], "
            f"got {type(attention_mask).__name__}"
        )


def check_same_padding(attention_mask: Tensor, start: Tensor | None) -> None:
    """Raise ValueError unless a later mask of the prompt, ``[B, N]``, is that of its prefill.

    Args:
        attention_mask: 0 where there is padding.
        start: ``[B]``: the first token of each row that was not padding; None without padding.
    """
    valid = attention_mask.bool()
    if start is not None:
        valid = valid == (torch.arange(valid.shape[1], device=valid.device) >= start[:, None])
    require(
        valid.all(),
        "ClaaCache: attention_mask must have the padding of the prompt where it was prefilled, "
        "got other padding",
    )


def check_positions(position_ids: Tensor, mask: Tensor | None, seen: int) -> None:
    """Raise ValueError unless positions ascend, from 0 or more, in a later turn from 1 or more.

    Args:
        position_ids: ``[B, n]`` or ``[1, n]``.
        mask: ``[B, n]``, 0 where there is padding, whose positions do not matter.
        seen: how many tokens came before these.
    """
    ascend = position_ids[:, 1:] > position_ids[:, :-1]
    first = position_ids[:, :1] > (0 if seen else -1)
    if mask is not None:
        ascend = ascend | ~mask[:, :-1].bool()
        first = first | ~mask[:, :1].bool()
    after = "after the tokens that the cache has seen" if seen else "over the prompt"
    require(
        ascend.all() & first.all(), f"ClaaCache: position_ids must ascend {after}, got other ones"
    )


def check_prompt(caller: str, model: PreTrainedModel, input_ids: Tensor) -> None:
    """Raise unless these are token ids ``[B, N]`` of the model, which has room for them.

    On a GPU it waits for the ids.
    """
    if not hasattr(model, "get_input_embeddings"):  # a compiled one is of another class
        raise TypeError(
            f"{caller}: model must be a model of transformers, got {type(model).__name__}"
        )
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"{caller}: input_ids must be a tensor [batch, tokens], got {type(input_ids).__name__}"
        )
    if input_ids.dim() != 2:
        raise ValueError(
            f"{caller}: input_ids must have shape [batch, tokens], got {list(input_ids.shape)}"
        )
    batch, tokens = input_ids.shape
    if batch < 1:
        raise ValueError(f"{caller}: input_ids must have one row or more, got {batch}")
    if tokens < 1:
        raise ValueError(f"{caller}: prompt_length must be at least 1, got {tokens}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{caller}: input_ids must be int64 or int32, got {input_ids.dtype}")
    check_vocabulary(caller, model, input_ids)
    check_room(caller, model, tokens)


def check_vocabulary(caller: str, model: PreTrainedModel, input_ids: Tensor) -> None:
    """Raise ValueError unless the model embeds each of these tokens."""
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if size is None or input_ids.is_meta or _capturing(input_ids):
        return
    extremes: list[int] = torch.stack(input_ids.aminmax()).tolist()
    for token in extremes:
        if not 0 <= token < size:
            raise ValueError(
                f"{caller}: input_ids must be in [0, {size - 1}], the vocabulary of the model, "
                f"got {token}"
            )


def check_room(caller: str, model: PreTrainedModel, tokens: int, new_tokens: int = 1) -> None:
    """Raise ValueError unless the model has positions for a prompt and the tokens after it.

    The last new token is not fed to the model.
    """
    context = context_length(model.config)
    if context is not None and tokens + new_tokens - 1 > context:
        after = f" and {new_tokens:,} may follow" if new_tokens > 1 else ""
        raise ValueError(
            f"{caller}: the prompt must fit into the model's context of {context:,} tokens, "
            f"got one of {tokens:,}{after}"
        )


def context_length(config: PreTrainedConfig) -> int | None:
    """How many positions a model has; None if it does not say.

    Scaled rotary embeddings reach ``factor`` times as far as the original ones. Some
    configurations have that in ``max_position_embeddings``, others do not.
    """
    config = config.get_text_config(decoder=True)
    stated: int | None = getattr(config, "max_position_embeddings", None)
    if not stated:
        return None
    scaled = [
        int((rope.get("original_max_position_embeddings") or stated) * (rope.get("factor") or 1))
        for rope in _rope_parameters(config)
    ]
    return max([stated, *scaled])


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary settings of the model, or of each kind of its layers."""
    found: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in found.values() if isinstance(kind, dict)]
    return kinds or [found]
