"""One model's records: each prompt answered in each cell, unless the journal has the answer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.grid.cells import Cell
from claa_ops.evaluate.grid.encoded import EncodedPrompt, batches, padded, protection
from claa_ops.evaluate.grid.journal import Journal, Json
from claa_ops.evaluate.guard import left_out
from claa_ops.evaluate.provenance import decoder_digest, method_key, model_key
from claa_ops.evaluate.tasks import Example
from claa_ops.evaluate.tasks.answer import DecodedAnswer, decode_answers, force
from claa_ops.huggingface.replay import RecordedPrefill, Replayed
from claa_ops.huggingface.turns import ask_again
from claa_ops.methods import Method

End = Literal["all", "time", "interrupt"]  # what ended the work


@dataclass(frozen=True)
class Record:
    """What came of one prompt in one cell.

    Attributes:
        model, task, name: which model, and which prompt of which task.
        cell: which way to prefill.
        place: the prompt's length, and where the fact stands, for those made here.
        scores: of each question, in [0, 1].
        logprob: mean log-probability of the target's tokens; None without a target.
        work: multiply-adds by weights, as a share of full prefill's.
        operations: the same with those in attention.
        cache_bytes: of the keys and values held after prefill.
        seconds: of the prefill; of a batch, its seconds over its prompts.
        full_seconds: of full prefill in the same run, likewise.
        tokens, kept: of the prompt, and those that reached the last layer.
        facts: of each fact that decides an answer the share of its tokens that reached it.
        answers: what was decoded, for each question; none with a target.
    """

    model: str
    task: str
    name: str
    cell: Cell
    place: Json
    scores: tuple[float, ...]
    logprob: float | None
    work: float
    operations: float
    cache_bytes: int
    seconds: float
    full_seconds: float
    tokens: int
    kept: int
    facts: tuple[float, ...]
    answers: tuple[str, ...]

    @property
    def score(self) -> float:
        """The mean of all questions' scores, in [0, 1]."""
        return sum(self.scores) / len(self.scores)


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
    protect: bool = False,
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
        protect: whether methods may drop nothing of what an example names as protected.
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
        model,
        tokenizer,
        name,
        cells,
        journal,
        chat,
        max_length,
        protect,
        is_time_up,
        on_record,
        on_problem,
    )
    end: End = "all"
    try:
        for batch in batches(work.unanswered(examples), batch_size):
            work.answer(batch)
    except KeyboardInterrupt:
        end = "interrupt"
    except _TimeIsUp:
        end = "time"
    return Records([work.found[place] for place in sorted(work.found)], end)


class _TimeIsUp(Exception):
    pass


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
        protect: bool,
        is_time_up: Callable[[], bool],
        on_record: Callable[[], None],
        on_problem: Callable[[str], None],
    ) -> None:
        self.found: dict[tuple[int, int], Record] = {}  # by example and cell
        self._model, self._tokenizer, self._name, self._cells = model, tokenizer, name, cells
        self._journal, self._chat, self._max_length = journal, chat, max_length
        self._protect = protect
        self._is_time_up, self._on_record, self._on_problem = is_time_up, on_record, on_problem
        of_model = {**model_key(model), "decoder": decoder_digest(tokenizer)}
        self._keys = [{**of_model, **method_key(cell.method)} for cell in cells]

    def unanswered(self, examples: Sequence[Example]) -> Iterator[EncodedPrompt]:
        """The prompts that lack answers; the records of the others are taken from the journal."""
        for index, example in enumerate(examples):
            prompt = None
            with left_out(example.where, self._on_problem):
                prompt = EncodedPrompt.encode(
                    self._model,
                    self._tokenizer,
                    index,
                    example,
                    self._chat,
                    self._max_length,
                    self._protect,
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

    def answer(self, batch: list[EncodedPrompt]) -> None:
        """Answer prompts that share a full prefill in all cells."""
        missing = [self._missing(prompt) for prompt in batch]
        methods = [
            cell.method
            for place, cell in enumerate(self._cells)
            if any(lacks[place] for lacks in missing)
        ]
        self._check_time()
        prefills = _Prefills(self._model, batch, methods)
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
        batch, together = prefills.batch, prefills.for_all(method)
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
        self, prefill: RecordedPrefill, method: Method, prompts: list[EncodedPrompt]
    ) -> list[Json]:
        """What the journal keeps of each prompt; the prompts are of one kind."""
        prefilled = prefill.run(method, protection(prompts, prefill.input_ids.shape[1]))
        results = _costs(prefilled, prompts)
        targets = [prompt.target for prompt in prompts if prompt.target is not None]
        if not targets:
            for result, answers in zip(results, self._converse(prefilled, prompts), strict=True):
                result["answers"] = answers
            return results
        forced = force(self._model, prefilled, targets)
        for result, target, (right, logprob) in zip(results, targets, forced, strict=True):
            if not math.isfinite(logprob):
                raise ValueError(f"the target's log-probability must be finite, got {logprob}")
            result |= {"answers": [], "right": right, "logprob": logprob / len(target)}
        return results

    def _converse(self, prefilled: Replayed, prompts: list[EncodedPrompt]) -> list[list[str]]:
        """The answers to each prompt's questions, of which all have as many."""
        turns = [prompt.turn for prompt in prompts if prompt.turn is not None]
        texts: list[list[str]] = [[] for _ in prompts]
        answers: list[DecodedAnswer] = []
        for questions in zip(*(prompt.example.questions for prompt in prompts), strict=True):
            if answers:
                said = [torch.tensor(answer.tokens, dtype=torch.int64) for answer in answers]
                prefilled = ask_again(self._model, prefilled, said, turns)
            answers = decode_answers(
                self._model,
                self._tokenizer,
                prefilled,
                [question.max_new_tokens for question in questions],
                [question.stop for question in questions],
                [question.enough for question in questions],
            )
            for text, answer in zip(texts, answers, strict=True):
                text.append(answer.text)
        return texts

    def _check_time(self) -> None:
        if self._is_time_up():
            raise _TimeIsUp

    def _key(self, prompt: EncodedPrompt, place: int) -> Json:
        return {**self._keys[place], **prompt.key}

    def _missing(self, prompt: EncodedPrompt) -> list[bool]:
        """For each cell whether the journal lacks its answer."""
        return [
            self._journal.find(self._key(prompt, place)) is None
            for place in range(len(self._cells))
        ]

    def _take(self, prompt: EncodedPrompt, place: int) -> None:
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

    def __init__(
        self, model: PreTrainedModel, batch: list[EncodedPrompt], methods: Sequence[Method]
    ) -> None:
        self.batch = batch
        self.together: RecordedPrefill | None = None
        self._padded: RecordedPrefill | None = None
        self.alone: dict[int, RecordedPrefill | None] = {}
        num_layers = model.config.get_text_config().num_hidden_layers
        # A method that reads hidden states may do so in any layer.
        every = any(method.reads_hidden for method in methods)
        selecting = {layer for each in methods for layer in each.selection_layers(num_layers)}
        self._model, self._layers = model, None if every else selecting
        if len(batch) > 1:
            ids, mask = padded([prompt.ids[0] for prompt in batch])
            # Where they do not fit into memory together, they may alone.
            with contextlib.suppress(Exception):
                self.together = RecordedPrefill(model, ids, mask, layers=self._layers)

    def for_all(self, method: Method) -> RecordedPrefill | None:
        """The prefill of all prompts that a method can continue from, if there is one."""
        differs = method.differs_by_row or any(prompt.protected for prompt in self.batch)
        if not differs or self.together is None:
            return self.together
        if self.together.attention_mask is not None:
            return self.together
        # Without padding there is no mask, which rows that keep different numbers need.
        if self._padded is None:
            with contextlib.suppress(Exception):
                self._padded = self.together.padded()
        return self._padded

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


def _costs(prefilled: Replayed, prompts: list[EncodedPrompt]) -> list[Json]:
    """What the prefill of a batch cost, and what it kept, of each prompt."""
    of_each = zip(
        prompts,
        prefilled.work_shares(),
        prefilled.operation_shares(),
        prefilled.cache_bytes(),
        prefilled.reached(),
        strict=True,
    )
    return [
        {
            "work": work,
            "operations": operations,
            "cache_bytes": held,
            "seconds": prefilled.seconds / len(prompts),
            "full_seconds": prefilled.full_seconds / len(prompts),
            "tokens": prompt.tokens,
            "kept": int(reached.sum()),
            "facts": [
                round(float(reached[fact.start : fact.stop].float().mean()), 4)
                for fact in prompt.facts
            ],
        }
        for prompt, work, operations, held, reached in of_each
    ]


def _record(name: str, example: Example, cell: Cell, result: Json) -> Record:
    if example.grade is None:
        scores = [float(result["right"])]
    else:
        scores = [
            question.grade(answer)
            for question, answer in zip(example.questions, result["answers"], strict=True)
            if question.grade is not None
        ]
    for score in scores:
        if not 0 <= score <= 1:
            raise ValueError(f"the metric must give a score in [0, 1], got {score}")
    return Record(
        model=name,
        task=example.task,
        name=example.name,
        cell=cell,
        place=dict(example.place),
        scores=tuple(scores),
        logprob=result.get("logprob"),
        work=result["work"],
        operations=result["operations"],
        cache_bytes=result["cache_bytes"],
        seconds=result["seconds"],
        full_seconds=result["full_seconds"],
        tokens=result["tokens"],
        kept=result["kept"],
        facts=tuple(result["facts"]),
        answers=tuple(result["answers"]),
    )
