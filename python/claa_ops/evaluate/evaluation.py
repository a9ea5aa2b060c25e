"""Every prompt with every method: what is right, what it cost, and nothing computed twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.answer import decode_until, force
from claa_ops.evaluate.grid import Cell
from claa_ops.evaluate.guard import left_out
from claa_ops.evaluate.identity import cell_key, decoder_digest, ids_digest, model_key
from claa_ops.evaluate.journal import Journal, Json
from claa_ops.evaluate.prompt import check_fits, encode_prompt
from claa_ops.evaluate.shared import SharedPrefill
from claa_ops.evaluate.tasks import Example
from claa_ops.huggingface.models import InputError
from claa_ops.methods import Method

_MARGIN = 16  # tokens that a text may gain when it is decoded and encoded again


@dataclass(frozen=True)
class Record:
    """What came of one prompt in one cell.

    Attributes:
        model, task, name: which model, and which prompt of which task.
        cell: which way to prefill.
        place: where the fact stands, for needles.
        score: in [0, 1].
        logprob: mean log-probability of the target's tokens; None without a target.
        work: multiply-adds by weights, as a share of full prefill's.
        cache_bytes: of the keys and values held after prefill.
        tokens, kept: of the prompt, and those that reached the last layer.
        answer: what was decoded; None with a target.
    """

    model: str
    task: str
    name: str
    cell: Cell
    place: Json
    score: float
    logprob: float | None
    work: float
    cache_bytes: int
    tokens: int
    kept: int
    answer: str | None


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    examples: Sequence[Example],
    cells: Sequence[Cell],
    journal: Journal,
    *,
    chat: bool | None = None,
    max_length: int | None = None,
    on_total: Callable[[int], None] = lambda _: None,
    on_record: Callable[[], None] = lambda: None,
    on_problem: Callable[[str], None],
) -> list[Record]:
    """Answer every example in every cell, except what the journal has already.

    The journal keeps answers, under all that they depend on: the content of the model, how its
    tokenizer decodes, the tokens of prompt and target, the settings of the cell and how an answer
    ends. Grades are made anew
    each time, so that corrected answers and metrics count.

    Args:
        model: an attached model.
        tokenizer: its tokenizer.
        name: what the records call the model.
        examples: the prompts.
        cells: ways to prefill; they share one full prefill of each prompt.
        journal: where each finished answer goes before the next is computed.
        chat: whether the chat template applies, where an example leaves it open.
        max_length: tokens of the longest prompt; the model's context if not given.
        on_total, on_record: told how many records there will be, and of each one.
        on_problem: told of a prompt that cannot be served, by all cells or by one, whatever the
            reason is; the others are.

    Returns:
        The records of all examples and cells, in this order, whether computed now or before.

    Raises:
        InputError: the journal cannot be written.
    """
    on_total(len(examples) * len(cells))
    of_model = {**model_key(model), "decoder": decoder_digest(tokenizer)}
    keys = [{**of_model, **cell_key(cell)} for cell in cells]
    records = []
    for example in examples:
        prompt = None
        with left_out(example.where, on_problem):
            prompt = _Prompt.encode(model, tokenizer, example, chat, max_length)
        if prompt is None:
            for _ in cells:
                on_record()
            continue
        own = prompt.key()
        missing = [
            cell
            for cell, key in zip(cells, keys, strict=True)
            if journal.find({**key, **own}) is None
        ]
        shared = None
        if missing:
            with left_out(example.where, on_problem):
                depth = model.config.get_text_config().num_hidden_layers
                layers = _layers((cell.method for cell in missing), depth)
                shared = SharedPrefill(model, prompt.ids, layers=layers)
        for cell, key in zip(cells, keys, strict=True):
            result = journal.find({**key, **own})
            where = f"{example.where}, {cell.label}"
            if result is None and shared is not None:
                with left_out(where, on_problem):
                    result = _answer(model, tokenizer, shared, prompt, cell.method)
                if result is not None:
                    journal.add({**key, **own}, result)
            if result is not None:
                with left_out(where, on_problem):
                    records.append(_record(name, example, cell, result))
            on_record()
    return records


@dataclass(frozen=True)
class _Prompt:
    example: Example
    ids: Tensor
    target: Tensor | None

    @classmethod
    def encode(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        example: Example,
        chat: bool | None,
        max_length: int | None,
    ) -> _Prompt:
        """Token ids of prompt and target; a prompt too long is cut in the middle, or refused."""
        example.check()
        target, new_tokens = None, example.max_new_tokens
        if example.target is not None:
            encoded = tokenizer(example.target, return_tensors="pt", add_special_tokens=False)
            target = encoded.input_ids[0]
            new_tokens = len(target)
        chat = chat if example.chat is None else example.chat
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        limits = [max_length or torch.inf, (context or torch.inf) - new_tokens]
        text = example.prompt
        prompt = encode_prompt(tokenizer, text, chat=chat, answer_prefix=example.answer_prefix)
        excess = prompt.ids.shape[1] - min(limits)
        if excess > 0 and example.may_cut:
            text = _cut(tokenizer, text, int(excess) + _MARGIN, new_tokens)
            prompt = encode_prompt(tokenizer, text, chat=chat, answer_prefix=example.answer_prefix)
        check_fits(model, prompt, new_tokens)
        if max_length is not None and prompt.ids.shape[1] > max_length:
            raise InputError(
                f"the prompt has {prompt.ids.shape[1]:,} tokens, more than the {max_length:,} "
                "allowed"
            )
        return cls(example, prompt.ids, target)

    def key(self) -> Json:
        """All of the prompt that an answer depends on; the name for the draws of a method."""
        example = self.example
        return {
            "task": example.task,
            "name": example.name,
            "prompt": ids_digest(self.ids),
            "target": None if self.target is None else ids_digest(self.target),
            "max_new_tokens": example.max_new_tokens,
            "stop": list(example.stop),
        }


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, new_tokens: int) -> str:
    """The text without that many tokens in its middle, as LongBench shortens its prompts."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    kept = len(ids) - tokens
    if kept < _MARGIN:
        raise InputError(
            f"the prompt has {len(ids):,} tokens, of which {max(0, kept):,} would be left beside "
            f"the {new_tokens:,} that may follow"
        )
    head, tail = ids[: kept // 2], ids[len(ids) - (kept - kept // 2) :]
    # A character of several tokens may be cut through: what is left of it is none.
    return str(tokenizer.decode(head)).rstrip("\ufffd") + str(tokenizer.decode(tail)).lstrip(
        "\ufffd"
    )


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shared: SharedPrefill,
    prompt: _Prompt,
    method: Method,
) -> Json:
    example = prompt.example
    prefilled = shared.run(method.for_prompt(f"{example.task} {example.name}"))
    tokens = prompt.ids.shape[1]
    result: Json = {
        "work": prefilled.work_share,
        "cache_bytes": prefilled.cache.nbytes(),
        "tokens": tokens,
        "kept": tokens if prefilled.positions is None else prefilled.positions.shape[1],
    }
    if prompt.target is None:
        answer = decode_until(model, tokenizer, prefilled, example.max_new_tokens, example.stop)
        return {**result, "answer": answer}
    right, logprob = force(model, prefilled, prompt.target)
    if not math.isfinite(logprob):
        raise ValueError(f"the target's log-probability must be finite, got {logprob}")
    return {**result, "answer": None, "right": right, "logprob": logprob / len(prompt.target)}


def _record(name: str, example: Example, cell: Cell, result: Json) -> Record:
    """The record of a result, with an answer's grade of today."""
    if example.grade is None:
        score = float(result["right"])
    else:
        score = example.grade(result["answer"])
        if not 0 <= score <= 1:
            raise ValueError(f"the metric must give a score in [0, 1], got {score}")
    return Record(
        model=name,
        task=example.task,
        name=example.name,
        cell=cell,
        place=dict(example.place),
        score=score,
        logprob=result.get("logprob"),
        work=result["work"],
        cache_bytes=result["cache_bytes"],
        tokens=result["tokens"],
        kept=result["kept"],
        answer=result["answer"],
    )


def _layers(methods: Iterable[Method], num_layers: int) -> set[int]:
    """After which layers the methods may select."""
    layers: set[int] = set()
    for method in methods:
        layers.update(method.selection_layers(num_layers))
    return layers
