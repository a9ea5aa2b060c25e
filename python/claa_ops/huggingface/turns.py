"""A later turn of a conversation, on the cache as the turn before it left it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from claa_ops.huggingface.prefill import Prefilled
from claa_ops.huggingface.transformers_api import cache_argument

_Prefilled = TypeVar("_Prefilled", bound=Prefilled)


@torch.no_grad()
def ask_again(
    model: PreTrainedModel,
    prefilled: _Prefilled,
    answers: Sequence[Tensor],
    turns: Sequence[Tensor],
) -> _Prefilled:
    """Give each prompt of a prefilled and decoded batch a further turn, in one forward.

    Each row goes on after its own answer, which may be shorter than others: what was decoded
    behind its end is hidden from then on, and takes no position. The last token of an answer,
    which no step of decoding has fed, comes before the turn.

    Args:
        model: the model of the prefill.
        prefilled: the batch, from whose cache these answers were decoded.
        answers: for each prompt the tokens of its answer that the conversation has, ``[T]``,
            int64: those that were decoded, up to an end that may be earlier.
        turns: for each prompt the tokens of the turn, ``[n]``, int64, one or more.

    Returns:
        The same batch, with the logits of the turns' last tokens; its cache has taken the turns
        in. Positions and work are still those of the prompt.

    Raises:
        ValueError: a prompt has no turn, a longer answer than was decoded, or a batch of uneven
            answers or turns has layers with sliding windows, which go by the place in the batch.

    Example::

        prefilled = prefill(model, ids, CLAA(keep=0.1))
        answer = decode(model, prefilled, max_new_tokens=32)
        again = ask_again(model, prefilled, [answer[0]], [more_ids])
    """
    cache, device = prefilled.cache, model.device
    mask = prefilled.attention_mask
    if mask is None:
        assert cache.state is not None  # it is prefilled
        mask = torch.ones(len(turns), cache.state.prompt_length, dtype=torch.int64, device=device)
    decoded = cache.get_seq_length() - mask.shape[1]
    fed = [min(len(answer), decoded) for answer in answers]
    for answer, turn in zip(answers, turns, strict=True):
        if not len(turn) or len(answer) > decoded + 1:
            raise ValueError(
                f"ask_again: a turn must have a token and come after at most {decoded + 1} that "
                f"were decoded, got {len(turn)} after {len(answer)}"
            )
    rows = [
        torch.cat([answer[held:].cpu(), turn.cpu()])
        for answer, held, turn in zip(answers, fed, turns, strict=True)
    ]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    valid = torch.zeros(len(rows), decoded + width, dtype=torch.int64)
    for index, (row, held) in enumerate(zip(rows, fed, strict=True)):
        ids[index, width - len(row) :] = row
        valid[index, :held] = 1
        valid[index, decoded + width - len(row) :] = 1
    if not valid.all() and any(layer.is_sliding for layer in cache.layers):
        raise ValueError(
            "ask_again: prompts of a batch must have answers and turns of one length where layers "
            "have sliding windows, got several lengths"
        )
    mask = torch.cat([mask, valid.to(mask)], dim=1)
    passed = torch.tensor(fed)[:, None] + valid[:, decoded:].cumsum(dim=1) - 1
    positions = prefilled.next_position[:, None] + passed.to(device)
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask,
        position_ids=positions.clamp_min(0),
        use_cache=True,
        logits_to_keep=1,
        **cache_argument(model, cache),
    )
    return replace(
        prefilled,
        logits=output.logits[:, -1],
        next_position=positions[:, -1] + 1,
        attention_mask=mask,
    )
