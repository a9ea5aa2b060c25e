"""Full prefill and a method on one prompt: both answers, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.compare.memory import watch_memory
from claa_ops.huggingface.decoding import end_tokens, greedy
from claa_ops.huggingface.models import InputError
from claa_ops.huggingface.transformers_api import cache_argument
from claa_ops.methods import FullKV, Method
from claa_ops.prefill import Prefilled, PrefillState, attach, prefill
from claa_ops.selection.layer import Layer
from claa_ops.selection.work import Work

# A method is not this much faster than the multiply-adds it leaves allow; other work, such as
# softmax, shrinks about as much as they do.
_LEAST_OF_EXPECTED = 0.8

# Further timed prefills of each way, at most, while the ratio is one that cannot be.
_MORE_RUNS = 10


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

    method: Method
    device: torch.device
    dtype: torch.dtype
    full: Run
    pruned: Run  # with the method
    prompt_tokens: int
    kept: Tensor  # positions of the tokens that reached the last layer, ascending
    selections: list[int]  # the layers after which tokens were dropped
    scores: dict[int, Tensor]  # layer: how the method scores the tokens of the whole prompt there
    expected_ratio: float  # of the multiply-adds until the first token, method to full

    @property
    def ttft_ratio(self) -> float:
        """Time to first token, method to full: the median over neighbouring timed prefills."""
        return _median_ratio(self.pruned.ttft_s, self.full.ttft_s)

    @property
    def is_noise(self) -> bool:
        """Whether `ttft_ratio` is far below what the operations left allow, so no result."""
        return _is_noise(self.ttft_ratio, self.expected_ratio)

    def finds(self, answer: str) -> bool:
        """Whether both answers contain `answer`."""
        return answer in self.full.answer and answer in self.pruned.answer

    @property
    def note(self) -> str | None:
        """What the reader should know before comparing the two, if anything."""
        noise = (
            f"the times are noise: of {len(self.full.ttft_s)} pairs the median ratio is "
            f"{self.ttft_ratio:.3f}, less than the operations left allow; a longer prompt, more "
            "runs or a quieter machine gives one to believe"
        )
        return (
            "; ".join(filter(None, [self._pruning_note, noise if self.is_noise else None])) or None
        )

    @property
    def _pruning_note(self) -> str | None:
        if self.kept.numel() < self.prompt_tokens:
            return None
        if self.prompt_tokens <= self.method.window:
            return (
                f"the prompt has {self.prompt_tokens} tokens and the window {self.method.window}, "
                "so nothing can be pruned: both runs are full prefill"
            )
        if self.pruned.kv_bytes < self.full.kv_bytes:
            return "only caches were pruned, so both prefills compute the same in every layer"
        return "no token was pruned, so both runs compute the same in every layer"


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    method: Method,
    *,
    max_new_tokens: int = 64,
    runs: int = 3,
    keep_scores: bool = True,
    on_step: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Answer the prompt `ids` [1, N] greedily with full prefill and with `method`.

    Each way first answers once, untimed, which also warms it up and tells its memory. Then
    follow `runs` timed prefills of each: all that the method does until the argmax of the last
    logits, drafts and first passes included. They alternate, and the ratio is that of neighbours,
    so that a machine whose speed drifts does not favour one of them. While the ratio is one that
    cannot be (`Comparison.is_noise`), up to 10 more follow. The opponent is the plain model with
    transformers' own cache.

    With `keep_scores` the untimed full prefill records how the method scores the tokens in every
    layer, undisturbed by any selection; there are none from a method that does not score.

    Raises:
        InputError: the model is of a kind that cannot be pruned, its logits are no numbers, or
            the method does not fit it or the prompt.
    """
    ids = ids.to(model.device)
    watched = keep_scores and not method.needs_ranking
    try:
        attach(model)
        _plain_prefill(model, ids[:, -2:])  # brings weights and code into memory, which then counts
        on_step("full prefill: answer")
        full = _answer(model, ids, _Watched.by(method), max_new_tokens, keep_scores=watched)
        on_step("method: answer")
        answer = _answer(model, ids, method, max_new_tokens)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    scores = {layer: row[0].cpu() for layer, row in full.state.scores.items()}
    if keep_scores and answer.state.ranking is not None:  # made beforehand, for all layers
        scores = {layer: answer.state.ranking[0].cpu() for layer in range(len(full.state.lengths))}

    expected = answer.work.total / full.work.total
    full_times: list[float] = []
    times: list[float] = []
    while (done := len(times)) < runs or (
        done < runs + _MORE_RUNS and _is_noise(_median_ratio(times, full_times), expected)
    ):
        on_step(f"full prefill: timed run {done + 1} of {max(runs, done + 1)}")
        full_times.append(_timed(model, lambda: _plain_prefill(model, ids)))
        on_step(f"method: timed run {done + 1} of {max(runs, done + 1)}")
        times.append(_timed(model, lambda: _prefill(model, ids, method)))

    tokens, positions = ids.shape[1], answer.state.positions
    return Comparison(
        method=method,
        device=model.device,
        dtype=model.dtype,
        full=full.run(tokenizer, full_times),
        pruned=answer.run(tokenizer, times),
        prompt_tokens=tokens,
        kept=torch.arange(tokens) if positions is None else positions[0].cpu(),
        selections=_selections(answer.state),
        scores=scores,
        expected_ratio=expected,
    )


def _median_ratio(times: list[float], full_times: list[float]) -> float:
    pairs = zip(times, full_times, strict=True)
    return statistics.median(own / full for own, full in pairs)


def _is_noise(ratio: float, expected: float) -> bool:
    return ratio < _LEAST_OF_EXPECTED * expected


@dataclass(frozen=True, kw_only=True)
class _Watched(FullKV):
    """Full prefill, in which a layer's tokens are scored as another method scores them."""

    method: Method

    @classmethod
    def by(cls, method: Method) -> _Watched:
        """Scored as this method does."""
        settings = {name: getattr(method, name) for name in ("window", "kernel_size", "pool_mode")}
        return cls(method=method, **settings)

    def ranks(self, state: PrefillState, layer: int) -> bool:
        """All layers, if the method ranks the first."""
        return self.method.ranks(state, 0)

    def begin(self, state: PrefillState) -> None:
        """What the method prepares."""
        self.method.begin(state)

    def rows(self, state: PrefillState) -> int:
        """How many queries the method reads."""
        return self.method.rows(state)

    def score(self, layer: Layer) -> Tensor:
        """The method's scores."""
        return self.method.score(layer)


def _selections(state: PrefillState) -> list[int]:
    """After which layers tokens were dropped; a first pass keeps them for the second alone."""
    after = [*state.lengths[1:], state.length]
    return [layer for layer, seen in enumerate(state.lengths) if after[layer] < seen]


@torch.inference_mode()
def _prefill(model: PreTrainedModel, ids: Tensor, method: Method, **options: Any) -> Prefilled:
    prefilled = prefill(model, ids, method, **options)
    prefilled.logits.argmax(dim=-1)
    return prefilled


@torch.inference_mode()
def _plain_prefill(model: PreTrainedModel, ids: Tensor) -> None:
    cache = DynamicCache(config=model.config)
    output = model(ids, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
    output.logits[:, -1].argmax(dim=-1)


def _timed(model: PreTrainedModel, work: Callable[[], object]) -> float:
    begin = _now(model.device)
    work()
    return _now(model.device) - begin


@dataclass(frozen=True)
class _Answer:
    state: PrefillState
    work: Work
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


@torch.inference_mode()
def _answer(
    model: PreTrainedModel,
    ids: Tensor,
    method: Method,
    max_new_tokens: int,
    *,
    keep_scores: bool = False,
) -> _Answer:
    """Decode greedily until the end of the answer."""
    with watch_memory(model.device) as peak:
        prefilled = _prefill(model, ids, method, keep_scores=keep_scores)
    # A mask may make single logits infinite; the largest is finite unless the model is broken.
    if not prefilled.logits.max().isfinite():
        raise InputError(
            f"the model's logits must be finite, got infinity or NaN in {model.dtype}: its weights "
            "are broken, or it needs another dtype"
        )
    cache, kv_bytes = prefilled.cache, prefilled.cache.nbytes()
    ends = end_tokens(model)
    steps = greedy(model, prefilled.logits, cache, prefilled.next_position, None, ends)
    tokens: list[int] = []
    times: list[float] = []
    begin = _now(model.device)
    for token in islice(steps, max_new_tokens):
        tokens.append(int(token))
        times.append(_now(model.device) - begin)
        begin = _now(model.device)
    # The first token took no forward.
    return _Answer(prefilled.state, prefilled.work, tokens, times[1:], kv_bytes, peak.bytes)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
