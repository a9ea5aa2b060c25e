"""One model's records: each prompt answered in each cell, unless the journal has the answer."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.grid.cells import Cell
from claa_ops.evaluate.grid.journal import Journal, Json
from claa_ops.evaluate.guard import left_out
from claa_ops.evaluate.provenance import decoder_digest, ids_digest, method_key, model_key
from claa_ops.evaluate.tasks import Example
from claa_ops.evaluate.tasks.answer import decode_until, force
from claa_ops.evaluate.tasks.prompt import check_fits, encode_prompt
from claa_ops.huggingface.models import InputError
from claa_ops.huggingface.replay import RecordedPrefill
from claa_ops.methods import Method

_MARGIN = 16  # tokens that a text may gain when it is decoded and encoded again
_AHEAD = 8  # batches of prompts that are sorted by length together

End = Literal["all", "time", "interrupt"]  # what ended the work


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


@dataclass(frozen=True)
class Records:
    """The records of one model, in the order of its examples and cells, and what ended them."""

    found: list[Record]
    end: End


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
    batch_size: int = 1,
    is_time_up: Callable[[], bool] = lambda: False,
    on_total: Callable[[int], None] = lambda _: None,
    on_record: Callable[[], None] = lambda: None,
    on_problem: Callable[[str], None],
) -> Records:
    """Answer every example in every cell, except what the journal has already.

    The journal keeps answers, under all that they depend on: the content of the model, how its
    tokenizer decodes, the tokens of prompt and target, the settings of the cell and how an answer
    ends. Grades are made anew each time, so that corrected answers and metrics count.

    Args:
        model: an attached model.
        tokenizer: its tokenizer.
        name: what the records call the model.
        examples: the prompts.
        cells: ways to prefill; they share one full prefill of each prompt.
        journal: where each finished answer goes before the next is computed.
        chat: whether the chat template applies, where an example leaves it open.
        max_length: tokens of the longest prompt; the model's context if not given.
        batch_size: prompts of about one length that share a forward. A method that serves one
            prompt at a time, or draws for each, continues from the rows of their full prefill, and
            so does every method where a batch does not fit into memory.
        is_time_up: asked before each prefill; nothing more is computed when it says so.
        on_total, on_record: told how many records there will be, and of each one.
        on_problem: told of a prompt that cannot be served, by all cells or by one, whatever the
            reason is; the others are.

    Returns:
        The records, whether computed now or before, also where time was up or an interrupt
        (Ctrl-C) ended the work.

    Raises:
        InputError: the journal cannot be written.
    """
    on_total(len(examples) * len(cells))
    work = _Work(
        model, tokenizer, name, cells, journal, chat, max_length, is_time_up, on_record, on_problem
    )
    end: End = "all"
    try:
        for batch in _batches(work.unanswered(examples), batch_size):
            work.answer(batch)
    except KeyboardInterrupt:
        end = "interrupt"
    except _TimeIsUp:
        end = "time"
    return Records([work.found[place] for place in sorted(work.found)], end)


class _TimeIsUp(Exception):
    pass


@dataclass(frozen=True)
class _Prompt:
    index: int  # of its example
    example: Example
    ids: Tensor
    target: Tensor | None

    @classmethod
    def encode(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        index: int,
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
        return cls(index, example, prompt.ids, target)

    @property
    def tokens(self) -> int:
        """How many the prompt has."""
        return self.ids.shape[1]

    @property
    def draw(self) -> str:
        """What tells the draws of a random method from those for other prompts."""
        return f"{self.example.task} {self.example.name}"

    @cached_property
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


def _batches(prompts: Iterator[_Prompt], size: int) -> Iterator[list[_Prompt]]:
    """Prompts that are answered in the same way, of about one length where there is a choice."""
    if size == 1:
        yield from ([prompt] for prompt in prompts)
        return
    while ahead := list(itertools.islice(prompts, _AHEAD * size)):
        for is_decoded in (False, True):
            alike = [prompt for prompt in ahead if (prompt.target is None) == is_decoded]
            alike.sort(key=lambda prompt: prompt.tokens)
            yield from (alike[first : first + size] for first in range(0, len(alike), size))


class _Work:
    """The records found so far, and how to compute the others."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        cells: Sequence[Cell],
        journal: Journal,
        chat: bool | None,
        max_length: int | None,
        is_time_up: Callable[[], bool],
        on_record: Callable[[], None],
        on_problem: Callable[[str], None],
    ) -> None:
        self.found: dict[tuple[int, int], Record] = {}  # by example and cell
        self._model, self._tokenizer, self._name, self._cells = model, tokenizer, name, cells
        self._journal, self._chat, self._max_length = journal, chat, max_length
        self._is_time_up, self._on_record, self._on_problem = is_time_up, on_record, on_problem
        of_model = {**model_key(model), "decoder": decoder_digest(tokenizer)}
        self._keys = [{**of_model, **method_key(cell.method)} for cell in cells]

    def unanswered(self, examples: Sequence[Example]) -> Iterator[_Prompt]:
        """The prompts that lack answers; the records of the others are taken from the journal."""
        for index, example in enumerate(examples):
            prompt = None
            with left_out(example.where, self._on_problem):
                prompt = _Prompt.encode(
                    self._model, self._tokenizer, index, example, self._chat, self._max_length
                )
            if prompt is None:
                for _ in self._cells:
                    self._on_record()
                continue
            if any(self._missing(prompt)):
                yield prompt
            else:
                for place in range(len(self._cells)):
                    self._take(prompt, place)

    def answer(self, batch: list[_Prompt]) -> None:
        """Answer prompts that share a full prefill in all cells."""
        missing = [self._missing(prompt) for prompt in batch]
        num_layers = self._model.config.get_text_config().num_hidden_layers
        layers = {
            layer
            for place, cell in enumerate(self._cells)
            if any(lacks[place] for lacks in missing)
            for layer in cell.method.selection_layers(num_layers)
        }
        self._check_time()
        prefills = _Prefills(self._model, batch, layers)
        for place, cell in enumerate(self._cells):
            asked = [row for row, lacks in enumerate(missing) if lacks[place]]
            if len(asked) == len(batch) and self._answer_together(prefills, place, cell.method):
                asked = []
            for row in asked:
                self._answer_alone(prefills, row, place, cell)
            for prompt in batch:
                self._take(prompt, place)

    def _answer_together(self, prefills: _Prefills, place: int, method: Method) -> bool:
        """Answer the whole batch in a cell, if that is possible; whether it was."""
        batch, together = prefills.batch, prefills.together
        draws = any(method.for_prompt(prompt.draw) is not method for prompt in batch)
        # A ranking from before the prefill is one of all prompts, whose work cannot be told apart.
        if together is None or draws or method.needs_ranking or not method.serves_batches:
            return False
        self._check_time()
        try:
            results = self._results(together, method, batch)
        except Exception:  # of one prompt, or of memory: alone each will tell, or succeed
            return False
        for prompt, result in zip(batch, results, strict=True):
            self._journal.add(self._key(prompt, place), result)
        return True

    def _answer_alone(self, prefills: _Prefills, row: int, place: int, cell: Cell) -> None:
        prompt = prefills.batch[row]
        self._check_time()
        with left_out(prompt.example.where, self._on_problem):
            prefills.take_alone(row)
        prefill = prefills.alone[row]
        if prefill is None:
            return
        results: list[Json] = []
        with left_out(f"{prompt.example.where}, {cell.label}", self._on_problem):
            results = self._results(prefill, cell.method.for_prompt(prompt.draw), [prompt])
        for result in results:
            self._journal.add(self._key(prompt, place), result)

    def _results(
        self, prefill: RecordedPrefill, method: Method, prompts: list[_Prompt]
    ) -> list[Json]:
        """What the journal keeps of each prompt."""
        prefilled = prefill.run(method)
        costs = zip(prefilled.work_shares(), prefilled.cache_bytes(), prefilled.kept(), strict=True)
        results: list[Json] = [
            {"work": work, "cache_bytes": held, "tokens": prompt.tokens, "kept": kept}
            for prompt, (work, held, kept) in zip(prompts, costs, strict=True)
        ]
        targets = [prompt.target for prompt in prompts if prompt.target is not None]
        if not targets:
            examples = [prompt.example for prompt in prompts]
            answers = decode_until(
                self._model,
                self._tokenizer,
                prefilled,
                [example.max_new_tokens for example in examples],
                [example.stop for example in examples],
            )
            return [
                {**result, "answer": answer}
                for result, answer in zip(results, answers, strict=True)
            ]
        forced = force(self._model, prefilled, targets)
        for result, target, (right, logprob) in zip(results, targets, forced, strict=True):
            if not math.isfinite(logprob):
                raise ValueError(f"the target's log-probability must be finite, got {logprob}")
            result |= {"answer": None, "right": right, "logprob": logprob / len(target)}
        return results

    def _check_time(self) -> None:
        if self._is_time_up():
            raise _TimeIsUp

    def _key(self, prompt: _Prompt, place: int) -> Json:
        return {**self._keys[place], **prompt.key}

    def _missing(self, prompt: _Prompt) -> list[bool]:
        """For each cell whether the journal lacks its answer."""
        return [
            self._journal.find(self._key(prompt, place)) is None
            for place in range(len(self._cells))
        ]

    def _take(self, prompt: _Prompt, place: int) -> None:
        """Make the record of an answer in the journal, if there is one, with today's grade."""
        cell = self._cells[place]
        result = self._journal.find(self._key(prompt, place))
        if result is not None:
            with left_out(f"{prompt.example.where}, {cell.label}", self._on_problem):
                record = _record(self._name, prompt.example, cell, result)
                self.found[prompt.index, place] = record
        self._on_record()


class _Prefills:
    """The full prefills of a batch: of all prompts together, and of each alone."""

    def __init__(self, model: PreTrainedModel, batch: list[_Prompt], layers: set[int]) -> None:
        self.batch = batch
        self.together: RecordedPrefill | None = None
        self.alone: dict[int, RecordedPrefill | None] = {}
        self._model, self._layers = model, layers
        if len(batch) > 1:
            ids, mask = _padded([prompt.ids[0] for prompt in batch])
            # Where they do not fit into memory together, they may alone.
            with contextlib.suppress(Exception):
                self.together = RecordedPrefill(model, ids, mask, layers=layers)

    def take_alone(self, row: int) -> None:
        """Have the prefill of one prompt; what it raises, it raises once, and is None then."""
        if row in self.alone:
            return
        self.alone[row] = None
        if self.together is not None:
            self.alone[row] = self.together.row(row)
        else:
            ids = self.batch[row].ids
            self.alone[row] = RecordedPrefill(self._model, ids, layers=self._layers)


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Token ids ``[B, N]``, padded on the left, and their mask; None without padding."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return ids, None if mask.all() else mask


def _record(name: str, example: Example, cell: Cell, result: Json) -> Record:
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
