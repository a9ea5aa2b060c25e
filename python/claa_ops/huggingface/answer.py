"""What a model tells before a prefill: the attention of its own answer, and what it expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from claa_ops.huggingface.attach import attach
from claa_ops.huggingface.cache import ClaaCache
from claa_ops.huggingface.decoding import count_positions, end_tokens, greedy
from claa_ops.huggingface.prompt import check_prompt, context_length, first_valid
from claa_ops.huggingface.transformers_api import cache_argument
from claa_ops.huggingface.work import count_work
from claa_ops.methods.full import FullKV
from claa_ops.selection.answer import Answer, pool
from claa_ops.selection.layer import Layer
from claa_ops.selection.state import PrefillState, check_count
from claa_ops.selection.work import Work

_PART = 512  # tokens of a prompt whose logits are in memory at a time


@dataclass(frozen=True)
class ModelReader:
    """A model that a method may ask: see :class:`~claa_ops.selection.answer.Reader`."""

    model: PreTrainedModel

    @property
    def vocab_size(self) -> int:
        """The size of its vocabulary."""
        return self.model.config.get_text_config().vocab_size

    def drafted_by(self, draft: PreTrainedModel | None) -> ModelReader:
        """The reader of a draft model; this reader itself if ``draft`` is None."""
        return self if draft is None else ModelReader(draft)

    def answer(
        self, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None
    ) -> Answer:
        """Its greedy answer to a prompt ``[B, N]`` on any device."""
        device = self.model.device
        mask = None if attention_mask is None else attention_mask.to(device)
        return record_answer(self.model, input_ids.to(device), max_new_tokens, attention_mask=mask)

    def self_information(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Work]:
        """How little it expected each token of a prompt ``[B, N]`` on any device."""
        device = self.model.device
        mask = None if attention_mask is None else attention_mask.to(device)
        return self_information(self.model, input_ids.to(device), attention_mask=mask)


@torch.no_grad()
def record_answer(
    model: PreTrainedModel,
    input_ids: Tensor,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    *,
    attention_mask: Tensor | None = None,
) -> Answer:
    """Prefill in full, answer greedily, and keep the queries.

    Args:
        model: a decoder that :func:`claa_ops.prefill.attach` serves; it is attached if need be.
        input_ids: ``[B, N]``, int64, padded on the left.
        max_new_tokens: the longest answer, in tokens; less where the model's context ends.
        eos_token_id: the tokens that end an answer; the model's own if not given.
        attention_mask: ``[B, N]``, 0 where there is padding.

    Raises:
        ValueError: all layers have sliding windows, ``max_new_tokens`` is below 1, the padding is
            not on the left, a token is not in the model's vocabulary, or prompt and answer do not
            fit into its context.
    """
    check_count("record_answer", "max_new_tokens", max_new_tokens)
    check_prompt("record_answer", model, input_ids)
    batch, length = input_ids.shape
    context = context_length(model.config)
    if context is not None:  # the last token is not fed
        max_new_tokens = min(max_new_tokens, context - length + 1)
    start = first_valid(attention_mask, batch, length)
    attach(model)
    mask = None if start is None else attention_mask
    positions = count_positions(input_ids, mask)
    cache = _RecordingCache(model.config, FullKV(window=1))
    whole = [kind.name != "sliding_attention" for kind in cache.kinds if kind.attends]
    layers = [count for count, attends_in_full in enumerate(whole) if attends_in_full]
    if not layers:
        raise ValueError("record_answer: a layer must attend to the whole prompt, got none")
    logits = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **cache_argument(model, cache),
    ).logits[:, -1]
    ends = end_tokens(model, eos_token_id)
    steps = greedy(model, logits, cache, positions[:, -1] + 1, mask, ends)
    tokens = torch.cat(list(islice(steps, max_new_tokens)), dim=1)
    ended = torch.isin(tokens, torch.tensor(ends, dtype=torch.int64, device=tokens.device))
    votes = torch.ones(tokens.shape, device=tokens.device)
    votes[:, 1:] -= ended[:, :-1].cummax(dim=1).values.float()
    forwards = tokens.shape[1]
    return Answer(
        tokens=tokens,
        queries=[torch.cat(cache.queries[count], dim=2) for count in layers],
        keys=[cache.layers[cache.attending[count]].keys[:, :, :length] for count in layers],
        scales=[cache.scales[count] for count in layers],
        votes=votes,
        start=start,
        work=count_work(model, [length + forwards - 1] * len(cache.layers), logits=forwards),
        reduce=cache.reduce,
    )


def answer_attention(
    model: PreTrainedModel,
    input_ids: Tensor,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    *,
    attention_mask: Tensor | None = None,
    pooled: bool = False,
    kernel_size: int = 13,
) -> tuple[Tensor, Tensor]:
    """The model's answer, and how much attention it paid to each token of the prompt.

    Args:
        model, input_ids, max_new_tokens, eos_token_id, attention_mask: as
            :func:`record_answer` takes them.
        pooled: average the ranking over ``kernel_size`` neighbouring tokens, zeros beyond the
            ends.
        kernel_size: odd.

    Returns:
        The answer, ``[B, T]``, int64, and the ranking, ``[B, N]``, float32: for each query the
        softmax over the prompt, its maximum over layers and heads, the mean over the queries.

    Raises:
        ValueError: as :func:`record_answer`.

    ``[B, H, T, N]`` is never in memory. Layers with a sliding window are left out: they no longer
    have the keys of the prompt.

    Source: the Answer-Informed Oracle of CLAA (arXiv 2602.16054) and its public code
    (BradMcDanel/kv-exps, generate_oracles.py at 90e13b1), which rounds the softmax to bfloat16.

    Example::

        answer, ranking = answer_attention(model, input_ids, max_new_tokens=64)
    """
    answer = record_answer(
        model, input_ids, max_new_tokens, eos_token_id, attention_mask=attention_mask
    )
    ranking = answer.peak()
    return answer.tokens, pool(ranking, kernel_size) if pooled else ranking


@torch.no_grad()
def self_information(
    model: PreTrainedModel, input_ids: Tensor, *, attention_mask: Tensor | None = None
) -> tuple[Tensor, Work]:
    """How little a model expected each token of a prompt.

    Args:
        model: a decoder that :func:`claa_ops.prefill.attach` serves; it is attached if need be.
        input_ids: ``[B, N]``, int64, padded on the left.
        attention_mask: ``[B, N]``, 0 where there is padding.

    Returns:
        ``[B, N]``, float32: the negative natural logarithm of the probability that the model gives
        the token after those before it; 0 for padding and for the first token, which nothing
        predicts. And the work of one full prefill with all logits.

    Raises:
        ValueError: the padding is not on the left, a token is not in the model's vocabulary, or
            the prompt does not fit into its context.

    The prompt goes through the model in parts, so that ``[B, N, V]`` is never in memory.
    """
    check_prompt("self_information", model, input_ids)
    batch, length = input_ids.shape
    start = first_valid(attention_mask, batch, length)
    attach(model)
    mask = None if start is None else attention_mask
    positions = count_positions(input_ids, mask)
    cache = ClaaCache(model.config, FullKV())
    information = torch.zeros(batch, length, device=input_ids.device)
    first, end = 0, _PART
    if start is not None:  # the first part must have a token of each row
        end = max(end, int(start.max()) + 1)
    while first < length:
        end = min(end, length)
        logits = model(
            input_ids=input_ids[:, first:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=positions[:, first:end],
            use_cache=True,
            **cache_argument(model, cache),
        ).logits
        following = input_ids[:, first + 1 : end + 1]
        guesses = logits[:, : following.shape[1]].float().transpose(1, 2)
        information[:, first + 1 : end + 1] = cross_entropy(guesses, following, reduction="none")
        first, end = end, end + _PART
    if start is not None:
        places = torch.arange(length, device=information.device)
        information.masked_fill_(places <= start[:, None], 0.0)
    return information, count_work(model, [length] * len(cache.layers), logits=length)


class _RecordingCache(ClaaCache):
    """Keeps everything, and the last query of every forward."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Of each layer that attends.
        self.queries: list[list[Tensor]] = [[] for _ in self.attending]
        self.scales: list[float | None] = [None for _ in self.attending]

    def begin_forward(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> None:
        # Every forward is observed as if it were a prefill.
        self.in_forward = self.prefilling = True
        self.state = _Recording(self)


class _Recording(PrefillState):
    def __init__(self, cache: _RecordingCache) -> None:
        layers = len(cache.attending)
        super().__init__(cache.method, layers, 1, None, None, None, keep_scores=False)
        self._cache = cache

    def see(self, layer: Layer) -> None:
        self._advance(layer.index, "observe")
        self._observed = layer
        self._cache.queries[layer.index].append(layer.query.clone())
        self._cache.scales[layer.index] = layer.attention["scale"]
