"""Rank prompts by the attention of their own answers, and compare each method with that.

The Answer-Informed Oracle knows what no method can know: what the answer attended to. A method
that ranks the tokens alike can drop the rest, provided that what it keeps is enough for the
answer, which depends on the layer too: so each method also answers after each layer.

Memory, beside the weights, of a prompt of N = 131072 tokens and T = 512 answer tokens in
Llama-3.1-8B (32 layers, 32 heads, 8 key/value heads, D = 128, bfloat16):

    keys and values of the prompt    2 * 32 * 8 * N * D * 2 bytes    17.2 GB, twice: for the answer
    queries of the answer            32 * 32 * T * D * 2 bytes       0.13 GB
    peak over the layers so far      2 * 128 * N * 4 bytes           0.13 GB, 128 queries at a time
    hidden states, to continue from  31 * 4096 * N * 2 bytes         33.3 GB; `layers` names fewer
    rankings, in host memory         32 * N * 4 bytes                0.02 GB for each method

With 16 GB of weights that is 84 GB, and the widest layer of the prefill, before the answer has its
keys and values, takes less than those. The probabilities of one layer, which `peak_attention` does
not write, would take 32 * T * N * 4 bytes: 8.6 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.guard import left_out
from claa_ops.evaluate.intervals import Interval
from claa_ops.evaluate.oracle.measures import MEASURES, intervals, measure_ranking
from claa_ops.evaluate.tasks import Example
from claa_ops.evaluate.tasks.answer import decode_until, force
from claa_ops.evaluate.tasks.prompt import Prompt, check_fits, encode_prompt
from claa_ops.huggingface.answer import ModelReader, answer_attention, pool
from claa_ops.huggingface.models import InputError
from claa_ops.huggingface.replay import RecordedPrefill
from claa_ops.methods import Method
from claa_ops.selection.budget import Budget

POOLING = 13  # neighbouring tokens of the pooled oracle, as in its public code


@dataclass(frozen=True)
class RankedPrompt:
    """How the oracle and each method rank the context tokens of one prompt.

    Attributes:
        name: what the reader knows it by.
        ids: ``[N]``, int64: the prompt.
        answer: the model's own answer, with all tokens.
        score: how right the answer is, in [0, 1]; None where that is not known.
        answers: for each method how right the answer is, ``[L]``, float32, where only its best
            tokens are kept after each layer; whether it is the model's own where no score is known.
        raw: ``[M]``, float32: the oracle's importance; M leaves out the window.
        pooled: ``[M]``, float32: the same, pooled over neighbouring tokens.
        rankings: for each method its importance at each layer, ``[L, M]``, float32.
        needle: ``[m]``, int64: the context tokens that hold the answer, where they are known.
    """

    name: str
    ids: Tensor
    answer: str
    score: float | None
    answers: dict[str, Tensor]
    raw: Tensor
    pooled: Tensor
    rankings: dict[str, Tensor]
    needle: Tensor | None


@dataclass(frozen=True)
class Study:
    """Several ranked prompts, compared.

    Attributes:
        layers: the layers whose rankings were compared, ascending.
        keep: the budget whose tokens were compared.
        prompts: what was compared.
        by_layer: for each method and measure the mean over the prompts at each layer; None
            where no prompt has it.
        overall: for each method and measure the mean over prompts and layers, likewise.
    """

    layers: list[int]
    keep: float | int
    prompts: list[RankedPrompt]
    by_layer: dict[str, dict[str, list[Interval | None]]]
    overall: dict[str, dict[str, Interval | None]]

    @property
    def budget(self) -> str:
        """The budget in words."""
        return f"{self.keep} tokens" if isinstance(self.keep, int) else f"{100 * self.keep:g} %"

    @property
    def wrong(self) -> list[str]:
        """The prompts to which the model's own answer is wrong."""
        return [prompt.name for prompt in self.prompts if prompt.score == 0]

    def best_layer(self, name: str) -> int | None:
        """Of the layers with the most right answers, the one nearest to the pooled oracle.

        None where no answer is right, and where a method ranks alike after all layers.
        """
        right, near = (self._means(name, key) for key in ("answers", "overlap_pooled"))
        if not np.nan_to_num(right).max() > 0 or np.ptp(near) == 0:
            return None
        return self.layers[int(np.where(right == np.nanmax(right), near, -1).argmax())]

    def _means(self, name: str, key: str) -> np.ndarray:
        values = self.by_layer[name][key]
        return np.array([np.nan if value is None else value.mean for value in values])

    def is_known(self, measure: str) -> bool:
        """Whether a measure has a value anywhere: recall needs a needle, stability neighbours."""
        return any(values[measure] is not None for values in self.overall.values())


def rank_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    methods: Mapping[str, Method],
    layers: Sequence[int],
    *,
    keep: float | int,
    max_new_tokens: int,
    chat: bool | None = None,
    on_step: Callable[[str], None] = lambda _: None,
    on_problem: Callable[[str], None],
) -> list[RankedPrompt]:
    """Answer prompts, and rank their tokens by the answer and by each method at each layer.

    Args:
        model: an attached model.
        tokenizer: its tokenizer.
        examples: the prompts.
        methods: the methods to compare, under the names to report; ``oracle`` needs no entry. The
            last tokens of a prompt, the longest window of the methods, are not ranked.
        layers: the layers whose rankings are wanted.
        keep: the budget whose tokens will be compared, and with which the methods answer.
        max_new_tokens: the length at which an answer is cut off, unless the example says so: at
            the length of its target, since what a model writes after that is not the answer.
        chat: whether the chat template applies, where an example leaves it open.
        on_step: called with a line of text before each slow step.
        on_problem: told of each prompt that cannot be used; the others are.

    Returns:
        The prompts that could be used, in order; their rankings are in host memory.
    """
    ranked = []
    for index, example in enumerate(examples):
        own = {name: _of_prompt(method, example, keep) for name, method in methods.items()}
        on_step(f"prompt {index + 1} of {len(examples)}")
        with left_out(example.where, on_problem):
            example.check()
            prompt = encode_prompt(
                tokenizer,
                example.prompt,
                chat=chat if example.chat is None else example.chat,
                fact=example.fact,
                answer_prefix=example.answer_prefix,
            )
            new_tokens = _answer_length(tokenizer, example) or max_new_tokens
            check_fits(model, prompt, new_tokens)
            best_tokens(prompt.ids.shape[1], _longest_window(own), keep)
            ranked.append(_rank_prompt(model, tokenizer, example, prompt, own, layers, new_tokens))
    return ranked


def best_tokens(tokens: int, window: int, keep: float | int) -> int:
    """How many context tokens a selection keeps of a prompt, beside the window.

    Raises:
        InputError: it keeps none or all.
    """
    budget = Budget.of(keep)
    assert budget is not None  # what was written is parsed
    kept = budget.tokens(tokens, window)
    if not window < kept < tokens:
        raise InputError(
            f"keep must leave more than the window, {window}, and less than the prompt, "
            f"{tokens:,} tokens, got {kept:,}"
        )
    return kept - window


def compare_rankings(
    prompts: Sequence[RankedPrompt], layers: Sequence[int], keep: float | int
) -> Study:
    """Measure each method's rankings against the oracle's, and average over the prompts.

    Args:
        prompts: one or more, from `rank_examples`.
        layers: the layers that were ranked, ascending.
        keep: the budget whose tokens are compared: a rate of each prompt in (0, 1], or a number.
            The window counts, as in a selection.
    """
    by_layer: dict[str, dict[str, list[Interval | None]]] = {}
    overall: dict[str, dict[str, Interval | None]] = {}
    for name in ("oracle", *prompts[0].rankings):
        measured = [_measure(prompt, name, layers, keep) for prompt in prompts]
        rows = {key: np.stack([values[key] for values in measured]) for key in MEASURES}
        by_layer[name] = {key: intervals(values) for key, values in rows.items()}
        overall[name] = {key: intervals(_layer_mean(values))[0] for key, values in rows.items()}
    return Study(list(layers), keep, list(prompts), by_layer, overall)


def _measure(
    prompt: RankedPrompt, name: str, layers: Sequence[int], keep: float | int
) -> dict[str, np.ndarray]:
    if name == "oracle":
        ranking = prompt.pooled.expand(len(layers), -1)
        answers = torch.full((len(layers),), torch.nan)  # the oracle does not answer
    else:
        ranking, answers = prompt.rankings[name], prompt.answers[name]
    tokens, context = len(prompt.ids), len(prompt.raw)
    k = best_tokens(tokens, tokens - context, keep)
    values = measure_ranking(ranking, layers, prompt.raw, prompt.pooled, k, prompt.needle)
    return {"answers": answers.numpy(), **values}


def _rank_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    prompt: Prompt,
    methods: Mapping[str, Method],
    layers: Sequence[int],
    new_tokens: int,
) -> RankedPrompt:
    ids = prompt.ids.to(model.device)
    context = ids.shape[1] - _longest_window(methods)
    shared = RecordedPrefill(model, ids, layers=layers)
    with shared.replay():  # the answer and all methods share one prefill
        tokens, attention = answer_attention(model, ids, new_tokens)
    answer = str(tokenizer.decode(tokens[0], skip_special_tokens=True))

    def is_right(method: Method) -> float:
        prefilled = shared.run(method)
        if example.grade is not None:
            (text,) = decode_until(model, tokenizer, prefilled, [new_tokens], [example.stop])
            return example.grade(text)
        right = tokens[0]
        if example.target is not None:
            encoded = tokenizer(example.target, return_tensors="pt", add_special_tokens=False)
            right = encoded.input_ids[0]
        ((is_first, _),) = force(model, prefilled, [right])
        return float(is_first)

    return RankedPrompt(
        name=f"{example.task}, {example.name}",
        ids=prompt.ids[0],
        answer=answer,
        score=_score(example, answer),
        answers={
            name: torch.tensor([is_right(after) for after in _after_layers(method, layers)])
            for name, method in methods.items()
        },
        raw=attention[0, :context].cpu(),
        pooled=pool(attention, POOLING)[0, :context].cpu(),
        rankings={
            name: _rank_layers(method, shared, layers)[:, :context]
            for name, method in methods.items()
        },
        needle=_within(prompt.fact, context),
    )


def _longest_window(methods: Mapping[str, Method]) -> int:
    return max(method.window for method in methods.values())


def _answer_length(tokenizer: PreTrainedTokenizerBase, example: Example) -> int:
    if example.target is None:
        return example.max_new_tokens
    return len(tokenizer(example.target, add_special_tokens=False).input_ids)


def _rank_layers(method: Method, shared: RecordedPrefill, layers: Sequence[int]) -> Tensor:
    """The method's importance at each layer, ``[L, M]``."""
    prepared = method.prepare(ModelReader(shared.model), shared.input_ids, None)
    if prepared is not None:  # it does not come from the prefill, so each layer has the same
        return prepared.ranking.cpu().expand(len(layers), -1)
    rankings = []
    for layer in layers:
        importance = shared.state(method, layer).importance
        assert importance is not None  # the method selects after this layer
        rankings.append(importance.cpu())
    return torch.cat(rankings)


def _of_prompt(method: Method, example: Example, keep: float | int) -> Method:
    """The method with this budget, and, if it draws, with a draw of this prompt's own."""
    if hasattr(method, "keep"):
        method = replace(method, keep=keep)  # type: ignore[call-arg]
    return method.for_prompt(f"{example.task} {example.name}")


def _after_layers(method: Method, layers: Sequence[int]) -> list[Method]:
    """The method, selecting after each of the layers if it selects after one."""
    if not hasattr(method, "layer"):
        return [method] * len(layers)
    return [replace(method, layer=layer) for layer in layers]  # type: ignore[call-arg]


def _within(fact: range | None, context: int) -> Tensor | None:
    """The context tokens of a fact; None if there are none."""
    tokens = range(0) if fact is None else range(fact.start, min(fact.stop, context))
    return torch.tensor(tokens) if tokens else None


def _score(example: Example, answer: str) -> float | None:
    if example.target is not None:
        return float(example.target.strip() in answer)
    return None if example.grade is None else example.grade(answer)


def _layer_mean(values: np.ndarray) -> np.ndarray:
    """Each prompt's mean ``[P, 1]`` of ``[P, L]``, over the layers that have a value."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):  # a prompt without any has none
        return np.where(known, values, 0).sum(axis=1, keepdims=True) / known.sum(axis=1)[:, None]
