"""Every prompt with every method: what is right, what it cost, and nothing computed twice."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.answer import decode_until, force
from claa_ops.evaluate.grid import Cell
from claa_ops.evaluate.journal import Journal, Json
from claa_ops.evaluate.prompt import check_fits, encode_prompt
from claa_ops.evaluate.shared import SharedPrefill
from claa_ops.evaluate.tasks import Example
from claa_ops.methods import ASL, Method, PyramidInfer
from claa_ops.models import InputError

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
        work: multiplications by weights, as a share of full prefill's.
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
    model_key: Json,
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

    Args:
        model: an attached model.
        tokenizer: its tokenizer.
        model_key: what the results depend on besides cells and prompts: model and dtype.
        examples: the prompts.
        cells: ways to prefill; they share one full prefill of each prompt.
        journal: where each finished record goes before the next is computed.
        chat: whether the chat template applies, where an example leaves it open.
        max_length: tokens of the longest prompt; the model's context if not given.
        on_total, on_record: told how many records are to be computed, and of each one.
        on_problem: told of a prompt that cannot be served, by all cells or by one.

    Returns:
        The records of all examples and cells, in this order, whether computed now or before.

    Raises:
        InputError: the journal cannot be written.
    """
    keys = [
        [{**model_key, **_prompt_key(example, chat, max_length), **cell.key()} for cell in cells]
        for example in examples
    ]
    on_total(sum(journal.find(key) is None for row in keys for key in row))
    records = []
    for example, row in zip(examples, keys, strict=True):
        missing = [
            (cell, key) for cell, key in zip(cells, row, strict=True) if journal.find(key) is None
        ]
        if missing:
            try:
                prompt = _Prompt.encode(model, tokenizer, example, chat, max_length)
            except InputError as error:
                on_problem(f"{example.task}, {example.name}: {error}")
                for _ in missing:
                    on_record()
                continue
            shared = SharedPrefill(model, prompt.ids, layers=_layers(c.method for c, _ in missing))
            for cell, key in missing:
                try:
                    journal.add(key, _answer(model, tokenizer, shared, prompt, cell.method))
                except ValueError as error:  # of the method: this prompt is too short for it, say
                    if isinstance(error, InputError):
                        raise
                    on_problem(f"{example.task}, {example.name}, {cell.label}: {error}")
                on_record()
        for cell, key in zip(cells, row, strict=True):
            result = journal.find(key)
            if result is not None:
                name, task, place = example.name, example.task, dict(example.place)
                records.append(Record(model_key["model"], task, name, cell, place, **result))
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
            text = _cut(tokenizer, text, int(excess) + _MARGIN)
            prompt = encode_prompt(tokenizer, text, chat=chat, answer_prefix=example.answer_prefix)
        check_fits(model, prompt, new_tokens)
        if max_length is not None and prompt.ids.shape[1] > max_length:
            raise InputError(
                f"the prompt has {prompt.ids.shape[1]:,} tokens, more than the {max_length:,} "
                "allowed"
            )
        return cls(example, prompt.ids, target)


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> str:
    """The text without that many tokens in its middle, as LongBench shortens its prompts."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    kept = max(0, len(ids) - tokens)
    head, tail = ids[: kept // 2], ids[len(ids) - (kept - kept // 2) :]
    return str(tokenizer.decode(head)) + str(tokenizer.decode(tail))


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shared: SharedPrefill,
    prompt: _Prompt,
    method: Method,
) -> Json:
    example = prompt.example
    if hasattr(method, "seed"):  # each prompt has a draw of its own, in every run the same
        own = zlib.crc32(f"{method.seed} {example.task} {example.name}".encode())
        method = replace(method, seed=own)  # type: ignore[call-arg]
    prefilled = shared.run(method)
    tokens = prompt.ids.shape[1]
    result: Json = {
        "work": prefilled.work,
        "cache_bytes": prefilled.cache.nbytes(),
        "tokens": tokens,
        "kept": tokens if prefilled.positions is None else prefilled.positions.shape[1],
    }
    if prompt.target is not None:
        right, logprob = force(model, prefilled, prompt.target)
        return {
            **result,
            "score": float(right),
            "logprob": logprob / len(prompt.target),
            "answer": None,
        }
    assert example.grade is not None  # an example has a target or a grade
    answer = decode_until(model, tokenizer, prefilled, example.max_new_tokens, example.stop)
    return {**result, "score": example.grade(answer), "logprob": None, "answer": answer}


def _prompt_key(example: Example, chat: bool | None, max_length: int | None) -> Json:
    text = f"{example.prompt}\0{example.answer_prefix}\0{example.target}"
    return {
        "task": example.task,
        "name": example.name,
        "digest": hashlib.sha256(text.encode()).hexdigest()[:16],
        "chat": chat if example.chat is None else example.chat,
        "max_length": max_length,
        "max_new_tokens": example.max_new_tokens,
    }


def _layers(methods: Iterable[Method]) -> set[int] | None:
    """After which layers the methods select; None if one decides that as it goes."""
    layers: set[int] = set()
    for method in methods:
        if isinstance(method, ASL | PyramidInfer):
            return None
        layer: int | tuple[int, ...] = getattr(method, "layer", ())
        layers.update([layer] if isinstance(layer, int) else layer)
    return layers
