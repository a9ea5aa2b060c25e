"""What a model answers after a prefill: decoded greedily, or compared with the right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.huggingface.decoding import end_tokens, greedy
from claa_ops.huggingface.transformers_api import cache_argument
from claa_ops.prefill import Prefilled

Enough = Callable[[str], bool] | None


@torch.no_grad()
def force(
    model: PreTrainedModel, prefilled: Prefilled, targets: Sequence[Tensor]
) -> list[tuple[bool, float]]:
    """Compare the model's choices with given answers, each token after those before it.

    Args:
        model: the model of the prefill.
        prefilled: the prompts, whose cache this consumes.
        targets: for each prompt the tokens of its answer, ``[T]``, one or more.

    Returns:
        For each whether each of its tokens is the model's first choice, and the sum of their
        log-probabilities.
    """
    logits = prefilled.logits[:, None]
    steps = max(map(len, targets)) - 1
    if steps:
        given = torch.zeros(len(targets), steps, dtype=torch.int64)
        for row, target in zip(given, targets, strict=True):
            row[: len(target) - 1] = target[:-1]
        mask = prefilled.attention_mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(targets), steps)], dim=1)
        more = model(
            input_ids=given.to(model.device),
            attention_mask=mask,
            position_ids=prefilled.next_position[:, None]
            + torch.arange(steps, device=model.device),
            use_cache=True,
            **cache_argument(model, prefilled.cache),
        ).logits
        logits = torch.cat([logits, more], dim=1)
    compared = []
    for row, target in zip(logits, targets, strict=True):
        row, target = row[: len(target)], target.to(row.device)
        chosen = row.float().log_softmax(dim=-1).gather(1, target[:, None]).sum()
        compared.append((bool((row.argmax(dim=-1) == target).all()), float(chosen)))
    return compared


@torch.no_grad()
def decode_until(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefilled: Prefilled,
    max_new_tokens: Sequence[int],
    stops: Sequence[Sequence[str]],
) -> list[str]:
    """The texts of :func:`decode_answers`."""
    answers = decode_answers(model, tokenizer, prefilled, max_new_tokens, stops)
    return [answer.text for answer in answers]


@torch.no_grad()
def decode_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefilled: Prefilled,
    max_new_tokens: Sequence[int],
    stops: Sequence[Sequence[str]],
    enough: Sequence[Enough] | None = None,
) -> list[DecodedAnswer]:
    """Decode greedily, each answer until its length, the usual end, or a text that ends it.

    Args:
        model: the model of the prefill.
        tokenizer: its tokenizer.
        prefilled: the prompts, whose cache this consumes.
        max_new_tokens: for each prompt the longest answer.
        stops: for each prompt the texts that end its answer, and are cut off.
        enough: for each prompt what says whether its answer so far may end, or None.

    Returns:
        The answers; no more steps are decoded than the last one of them takes.
    """
    ends = end_tokens(model)
    cache, mask = prefilled.cache, prefilled.attention_mask
    steps = greedy(model, prefilled.logits, cache, prefilled.next_position, mask, ends)
    answers = [
        DecodedAnswer(tokenizer, longest, stop, suffices)
        for longest, stop, suffices in zip(
            max_new_tokens, stops, enough or [None] * len(stops), strict=True
        )
    ]
    for tokens in islice(steps, max(max_new_tokens)):
        for answer, token in zip(answers, tokens[:, 0].tolist(), strict=True):
            answer.take(token, ends)
        if all(answer.has_ended for answer in answers):
            break
    return answers


class DecodedAnswer:
    """One answer, as its tokens come.

    Attributes:
        tokens: so far, without one that ends it.
        has_ended: whether it takes no more.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
        stops: Sequence[str],
        enough: Enough,
    ) -> None:
        self._tokenizer, self._longest, self._enough = tokenizer, longest, enough
        self._stops = [stop for stop in stops if stop]  # an empty text is in every answer
        self.tokens: list[int] = []
        self.has_ended = longest == 0

    def take(self, token: int, ends: Sequence[int]) -> None:
        """Append a token, unless the answer has ended or ends with it."""
        if self.has_ended or token in ends:
            self.has_ended = True
            return
        self.tokens.append(token)
        self.has_ended = len(self.tokens) == self._longest
        if not self.has_ended and (self._stops or self._enough):
            text = self._decoded()
            suffices = self._enough is not None and self._enough(text)
            self.has_ended = suffices or any(stop in text for stop in self._stops)

    @property
    def text(self) -> str:
        """The answer up to the first text that ends it."""
        text = self._decoded()
        found = (text.index(stop) for stop in self._stops if stop in text)
        return text[: min(found, default=len(text))]

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))
