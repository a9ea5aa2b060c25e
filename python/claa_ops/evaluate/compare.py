"""One prompt, two prefills: what a method answers, and what it saves against full prefill."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from claa_ops.evaluate.cost import prefill_cost
from claa_ops.evaluate.memory import watch_memory
from claa_ops.methods import CLAA, FullKV
from claa_ops.models import InputError
from claa_ops.prefill import ClaaCache, attach
from claa_ops.prefill.passes import end_tokens


@dataclass(frozen=True)
class Run:
    """What one way of prefilling gave and took."""

    answer: str
    new_tokens: int
    ttft_s: list[float]  # time to first token of each timed prefill
    decode_s: float | None  # median time of each further token
    kv_bytes: int  # keys and values held after prefill
    peak_bytes: int | None  # of prefill, see `watch_memory`

    @property
    def median_ttft_s(self) -> float:
        """Median time to first token."""
        return statistics.median(self.ttft_s)


@dataclass(frozen=True)
class Comparison:
    """Full prefill and a method on the same prompt."""

    method: CLAA | FullKV
    device: torch.device
    dtype: torch.dtype
    full: Run
    pruned: Run  # with the method
    prompt_tokens: int
    kept: Tensor  # positions that the layers after the selection layer see, ascending
    scores: dict[int, Tensor]  # layer: scores of the context tokens, in the full prefill
    expected_ratio: float  # of the operations of prefill, method to full

    @property
    def ttft_ratio(self) -> float:
        """Time to first token, method to full: the median over neighbouring timed prefills."""
        pairs = zip(self.pruned.ttft_s, self.full.ttft_s, strict=True)
        return statistics.median(pruned / full for pruned, full in pairs)

    @property
    def layer(self) -> int | None:
        """The selection layer, if the method has one."""
        return _selection_layer(self.method)

    def finds(self, answer: str) -> bool:
        """Whether both answers contain `answer`."""
        return answer in self.full.answer and answer in self.pruned.answer

    @property
    def note(self) -> str | None:
        """What the reader should know before comparing the two, if anything."""
        if self.prompt_tokens <= self.method.window:
            return (
                f"the prompt has {self.prompt_tokens} tokens and the window {self.method.window}, "
                "so nothing can be pruned: both runs are full prefill"
            )
        if self.kept.numel() == self.prompt_tokens:
            return "no token was pruned, so both runs compute the same in every layer"
        return None


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    method: CLAA | FullKV,
    *,
    max_new_tokens: int = 64,
    runs: int = 3,
    on_step: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Answer the prompt `ids` [1, N] greedily with full prefill and with `method`.

    Each way first answers once, untimed, which also warms it up and tells its memory. Then
    follow `runs` timed prefills of each: one forward over the prompt and the argmax of its last
    logits. They alternate, and the ratio is that of neighbours, so that a machine whose speed
    drifts does not favour one of them. The opponent is the plain model with transformers' own
    cache.

    Raises:
        InputError: the model is of a kind that cannot be pruned.
    """
    try:
        attach(model)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    ids = ids.to(model.device)
    full = FullKV(window=method.window, kernel_size=method.kernel_size, pooling=method.pooling)

    on_step("full prefill: answer")
    full_cache = ClaaCache(model.config, full, keep_scores=True)
    full_answer = _answer(model, ids, full_cache, max_new_tokens)
    on_step("method: answer")
    cache = ClaaCache(model.config, method)
    answer = _answer(model, ids, cache, max_new_tokens)

    full_times: list[float] = []
    times: list[float] = []
    for run in range(1, runs + 1):
        on_step(f"full prefill: timed run {run} of {runs}")
        full_times.append(_timed_prefill(model, ids, DynamicCache(config=model.config)))
        on_step(f"method: timed run {run} of {runs}")
        times.append(_timed_prefill(model, ids, ClaaCache(model.config, method)))

    tokens = ids.shape[1]
    assert cache.state is not None and full_cache.state is not None  # a prefill has made them
    positions = cache.state.positions
    kept = torch.arange(tokens) if positions is None else positions[0].cpu()
    pruned_cost = prefill_cost(model, tokens, kept.numel(), _selection_layer(method))
    return Comparison(
        method=method,
        device=model.device,
        dtype=model.dtype,
        full=full_answer.run(tokenizer, full_times),
        pruned=answer.run(tokenizer, times),
        prompt_tokens=tokens,
        kept=kept,
        scores={index: rows[0].cpu() for index, rows in full_cache.state.scores.items()},
        expected_ratio=pruned_cost.total / prefill_cost(model, tokens).total,
    )


def _selection_layer(method: CLAA | FullKV) -> int | None:
    """After which layer tokens are dropped: one, if any, in what is compared here."""
    layer = getattr(method, "layer", None)
    return layer if isinstance(layer, int) else None


def _timed_prefill(model: PreTrainedModel, ids: Tensor, cache: Cache) -> float:
    begin = _now(model.device)
    _next_token(model, ids, cache)
    return _now(model.device) - begin


@dataclass(frozen=True)
class _Answer:
    tokens: list[int]
    decode_times: list[float]
    kv_bytes: int
    peak_bytes: int | None

    def run(self, tokenizer: PreTrainedTokenizerBase, ttft_s: list[float]) -> Run:
        text = tokenizer.decode(self.tokens, skip_special_tokens=True)
        return Run(
            answer=str(text).strip(),
            new_tokens=len(self.tokens),
            ttft_s=ttft_s,
            decode_s=statistics.median(self.decode_times) if self.decode_times else None,
            kv_bytes=self.kv_bytes,
            peak_bytes=self.peak_bytes,
        )


def _answer(model: PreTrainedModel, ids: Tensor, cache: ClaaCache, max_new_tokens: int) -> _Answer:
    """Decode greedily until the end of the answer."""
    with watch_memory(model.device) as peak:
        token = _next_token(model, ids, cache)
    tokens, times = [int(token)], []
    kv_bytes = cache.nbytes()
    ends = end_tokens(model)
    while len(tokens) < max_new_tokens and tokens[-1] not in ends:
        begin = _now(model.device)
        token = _next_token(model, token, cache)
        tokens.append(int(token))
        times.append(_now(model.device) - begin)
    return _Answer(tokens, times, kv_bytes, peak.bytes)


@torch.inference_mode()
def _next_token(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].argmax(dim=-1, keepdim=True)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
