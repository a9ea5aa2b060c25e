"""python -m bench.signals: what else could say early which tokens of a prompt to keep.

Drafts, looking ahead and windows that know the question, beside the methods that they would have
to beat; ``bench.coarse`` has passes over a part of the prompt. Each ranks the prompt and selects,
and what goes on is graded, in lines of the form of ``bench.quality``, for ``bench.quality_report``.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.quality import TABLE, WHOLE, Batch, Cell, Lines, batches, load, options
from claa_ops.evaluate.tasks.prompt import encode_prompt
from claa_ops.huggingface.answer import Answer, record_answer
from claa_ops.huggingface.cache import first_valid
from claa_ops.huggingface.replay import RecordedPrefill
from claa_ops.huggingface.transformers_api import decoder_of
from claa_ops.huggingface.work import count_work
from claa_ops.methods import FullKV, Method, Oracle, SpeculativePrefill, make_method
from claa_ops.prefill import Prefilled, attach, prefill
from claa_ops.selection.method import Preparation
from claa_ops.selection.work import Work

KEEPS = (0.1, 0.2)
LAYERS = (7, 8, 12)  # after which an early signal selects
RANKED = ("claa", "claa, wide", "peak")
DRAFTS = (8, 12, 16)  # layers of a draft
FORWARDS = (1, 4, 8)  # of a draft, that over the prompt included
SINK, WINDOW, KERNEL = 4, 16, 25  # what goes on for certain, and pooling, as in Peak


class Trial(NamedTuple):
    """A way of choosing tokens, tried at each rate, and what it found out beforehand."""

    label: str
    method: Any  # with a field ``keep``, unless there are no rates
    prepared: Preparation | None = None
    keeps: tuple[Any, ...] = KEEPS  # None for the method as it is


FULL = Trial("full", FullKV(), keeps=(None,))


class Laboratory:
    """A model, its beginnings as models of their own, and a batch of prompts."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.depth = model.config.num_hidden_layers
        self.tokenizer = tokenizer
        depths = {*DRAFTS, *(layer + 1 for layer in LAYERS), max(LAYERS) + 2}
        self.first = {depth: first_layers(model, depth) for depth in depths}
        self.model = self.first[self.depth] = attach(model)

    def take(self, batch: Batch) -> None:
        """Go on to a batch."""
        self.batch, self.ids, self.mask = batch, batch.ids, batch.mask
        self.shared = RecordedPrefill(self.model, self.ids, self.mask)
        start = first_valid(self.mask, self.ids.shape[1])
        self.start = self.ids.new_zeros(len(self.ids)) if start is None else start

    def run(self, method: Method, prepared: Preparation | None = None) -> Prefilled:
        """A prefill of the batch."""
        if prepared is None:
            return self.shared.run(method)
        with self.shared.replay():
            return prefill(self.model, self.ids, method, self.mask, prepared=prepared)

    def column(self, label: str, layer: Any, **changes: Any) -> Any:
        """The method of a column of docs/quality.md."""
        name, settings = TABLE[label]
        return make_method(name, num_layers=self.depth, layer=layer, **{**settings, **changes})

    def read(self, ids: Tensor, mask: Tensor | None) -> RecordedPrefill:
        """The layers of another text that early signals come from."""
        return RecordedPrefill(attach(self.first[max(LAYERS) + 2]), ids, mask, layers=())


def first_layers(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """The model's beginning as a model: its final norm and head read an early layer.

    The weights are shared. Neither model is attached yet.
    """
    draft = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    decoder_of(draft).layers = decoder_of(draft).layers[:depth]
    draft.config.num_hidden_layers = depth
    return draft


def by_ranking(label: str, layer: int, ranking: Tensor, work: Work, **certain: int) -> Trial:
    """A selection by a ranking ``[B, M]`` of the tokens before the window."""
    kept: dict[str, Any] = {"num_sinks": SINK, "window": WINDOW, **WHOLE, **certain}
    return Trial(label, Oracle(layer=layer, **kept), Preparation(ranking, work))


def ranking_of(shared: RecordedPrefill, method: Method, layer: int) -> Tensor:
    """A method's ranking ``[B, M]`` after a layer."""
    ranking = shared.state(method, layer).importance
    assert ranking is not None
    return ranking


def linear(work: Work) -> Work:
    """The head counts like a layer: a draft that looks ahead needs it for every token."""
    return Work(linear=work.linear + work.head)


def known(laboratory: Laboratory) -> Iterator[Trial]:
    """What a signal is compared with."""
    for layer, label in product((*LAYERS, 20), (*RANKED, "oracle")):
        yield Trial(f"{label}, as it is", laboratory.column(label, layer))


def drafts(laboratory: Laboratory) -> Iterator[Trial]:
    """Speculative Prefill, whose draft is the model's beginning, or the model itself."""
    ids = laboratory.ids
    sinks = laboratory.start[:, None] + torch.arange(SINK, device=ids.device)
    for depth in (*DRAFTS, laboratory.depth):
        draft = laboratory.first[depth]
        answer = record_answer(draft, ids, max(FORWARDS), attention_mask=laboratory.mask)
        for forwards in FORWARDS:
            label = f"draft of {depth} layers, {forwards} forwards"
            seen = shortened(answer, forwards)
            lengths = [ids.shape[1] + forwards - 1] * depth
            work = linear(count_work(draft, lengths, logits=forwards))
            method = SpeculativePrefill(draft=draft, look_ahead=forwards, chunk=None, kernel_size=7)
            yield Trial(label, method, Preparation(method.rank_prompt(seen), work))
            method = replace(method, kernel_size=KERNEL)
            ranking = method.rank_prompt(seen)
            certain = ranking.scatter(1, sinks, torch.inf)
            certain[:, -WINDOW:] = torch.inf
            yield Trial(f"{label}, wide", method, Preparation(certain, work))
            if depth < laboratory.depth:
                work = linear(count_work(draft, [forwards - 1] * depth, logits=forwards - 1))
                yield by_ranking(f"{label}, in one pass", depth - 1, ranking[:, :-WINDOW], work)


def shortened(answer: Answer, forwards: int) -> Answer:
    """An answer that was cut off earlier."""
    tokens, votes = answer.tokens[:, :forwards], answer.votes[:, :forwards]
    queries = [query[:, :, :forwards] for query in answer.queries]
    return replace(answer, tokens=tokens, queries=queries, votes=votes)


def look_aheads(laboratory: Laboratory) -> Iterator[Trial]:
    """Windows that go on into tokens which an early layer, or the model itself, says come next."""
    ids, mask, all_layers = laboratory.ids, laboratory.mask, laboratory.depth
    for depth, ahead in product((*(layer + 1 for layer in LAYERS), all_layers), FORWARDS[1:]):
        draft = laboratory.first[depth]
        tokens = record_answer(draft, ids, ahead, attention_mask=mask).tokens
        same = int((tokens[:, 0] == laboratory.shared.logits.argmax(-1)).sum())
        print(f"{depth} layers: {same} of {len(ids)} say the model's next token", file=sys.stderr)
        longer = None if mask is None else torch.cat([mask, torch.ones_like(tokens)], dim=1)
        shared = laboratory.read(torch.cat([ids, tokens], dim=1), longer)
        read = linear(count_work(draft, [ids.shape[1] + ahead] * depth, logits=ahead))
        whose = "the model's" if depth == all_layers else "its own"
        for layer, label in product(LAYERS if depth == all_layers else (depth - 1,), RANKED):
            method = laboratory.column(label, layer)
            certain = {"num_sinks": method.num_sinks, "window": method.window}
            method = replace(method, window=method.window + tokens.shape[1])
            ranking = ranking_of(shared, method, layer)
            label = f"{label}, {ahead} of {whose} tokens ahead"
            anyway = count_work(draft, [ids.shape[1]] * (layer + 1), logits=0)
            work = Work(linear=read.linear - anyway.linear)
            yield by_ranking(label, layer, ranking, work, **certain)


def windows(laboratory: Laboratory) -> Iterator[Trial]:
    """Longer windows; and the question as the window, which goes on with all that follows it."""
    for layer, label, window in product(LAYERS, RANKED, (32, 64)):
        yield Trial(f"{label}, window {window}", laboratory.column(label, layer, window=window))
    unranked = torch.full_like(laboratory.ids, torch.inf, dtype=torch.float32)
    rankings = {place: unranked.clone() for place in product(LAYERS, RANKED)}
    for row, example in enumerate(laboratory.batch.examples):
        text = example.prompt
        question = encode_prompt(laboratory.tokenizer, text, fact=text.split("\n\n")[-1]).fact
        assert question is not None
        start = int(laboratory.start[row])
        shared = laboratory.read(laboratory.ids[row : row + 1, start : start + question.stop], None)
        for (layer, label), ranking in rankings.items():
            method = laboratory.column(label, layer, window=len(question))
            before = slice(start, start + question.start)
            ranking[row, before] = ranking_of(shared, method, layer)[0]
    for (layer, label), ranking in rankings.items():
        method = laboratory.column(label, layer)
        certain = {"num_sinks": method.num_sinks, "window": method.window}
        yield by_ranking(f"{label}, window the question", layer, ranking, Work(), **certain)


Tried = dict[str, Callable[[Laboratory], Iterator[Trial]]]
SIGNALS: Tried = {
    "known": known,
    "drafts": drafts,
    "look-ahead": look_aheads,
    "windows": windows,
}


def measure(arguments: argparse.Namespace, tried: Tried) -> None:
    """Try what was asked for on the prompts that the file does not have yet."""
    model, tokenizer = load(arguments)
    laboratory = Laboratory(model, tokenizer)
    lines = Lines(arguments.out)
    for _, line, batch in batches(arguments, tokenizer, model.device):
        name = line["batch"]
        laboratory.take(batch)
        if (name, None) not in lines.done:
            lines.add(line)
        for trial in chain([FULL], *(tried[kind](laboratory) for kind in arguments.only)):
            for keep in trial.keeps:
                method = trial.method if keep is None else replace(trial.method, keep=keep)
                cell = Cell(trial.label, method).key
                if (name, cell) not in lines.done:
                    graded = batch.grade(model, laboratory.run(method, trial.prepared))
                    lines.add({"batch": name, "cell": cell, **graded})


def main(description: str, tried: Tried) -> None:
    """Read the command line."""
    parser = options(description)
    parser.add_argument("--only", choices=tried, nargs="+", default=list(tried))
    measure(parser.parse_args(), tried)


if __name__ == "__main__":
    main(__doc__.splitlines()[0], SIGNALS)
