"""Drafts, looking ahead and windows that know the question, beside what they have to beat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from claa_ops.evaluate.tasks.prompt import encode_prompt
from claa_ops.huggingface.answer import record_answer
from claa_ops.huggingface.work import count_work
from claa_ops.methods import SpeculativePrefill
from claa_ops.selection.answer import Answer
from claa_ops.selection.method import Preparation
from claa_ops.selection.work import Work
from studies.early_signals.laboratory import (
    DRAFTS,
    KERNEL,
    LAYERS,
    SINKS,
    WINDOW,
    Laboratory,
    Trial,
    Tried,
    ranking_of,
)

RANKED = ("claa", "claa, wide", "peak")
FORWARDS = (1, 4, 8)  # of a draft, that over the prompt included


def linear(work: Work) -> Work:
    """The head counts like a layer: a draft that looks ahead needs it for every token."""
    return Work(linear=work.linear + work.head)


def known(laboratory: Laboratory) -> Iterator[Trial]:
    """What a signal is compared with."""
    for layer, label in product((*LAYERS, 20), (*RANKED, "oracle")):
        yield Trial(f"{label} after layer {layer}", laboratory.method(label, layer))


def drafts(laboratory: Laboratory) -> Iterator[Trial]:
    """Speculative Prefill, whose draft is the model's beginning, or the model itself."""
    ids = laboratory.ids
    sinks = laboratory.start[:, None] + torch.arange(SINKS, device=ids.device)
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
                context = ranking[:, :-WINDOW]
                yield laboratory.by_ranking(f"{label}, in one pass", depth - 1, context, work)


def shortened(answer: Answer, forwards: int) -> Answer:
    """An answer that was cut off earlier."""
    tokens, votes = answer.tokens[:, :forwards], answer.votes[:, :forwards]
    queries = [query[:, :, :forwards] for query in answer.queries]
    return replace(answer, tokens=tokens, queries=queries, votes=votes)


def look_aheads(laboratory: Laboratory) -> Iterator[Trial]:
    """Windows that continue into tokens which an early layer, or the model itself, expects."""
    ids, mask, all_layers = laboratory.ids, laboratory.mask, laboratory.depth
    for depth, ahead in product((*(layer + 1 for layer in LAYERS), all_layers), FORWARDS[1:]):
        draft = laboratory.first[depth]
        tokens = record_answer(draft, ids, ahead, attention_mask=mask).tokens
        same = int((tokens[:, 0] == laboratory.recorded.logits.argmax(-1)).sum())
        print(f"{depth} layers: {same} of {len(ids)} say the model's next token", file=sys.stderr)
        longer = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        recorded = laboratory.read(torch.cat([ids, tokens], dim=1), longer)
        read = linear(count_work(draft, [ids.shape[1] + ahead] * depth, logits=ahead))
        whose = "the model's" if depth == all_layers else "its own"
        for layer, label in product(LAYERS if depth == all_layers else (depth - 1,), RANKED):
            method = laboratory.method(label, layer)
            certain = {"num_sinks": method.num_sinks, "window": method.window}
            method = replace(method, window=method.window + tokens.shape[1])
            ranking = ranking_of(recorded, method, layer)
            label = f"{label} after layer {layer}, {ahead} of {whose} tokens ahead"
            anyway = count_work(draft, [ids.shape[1]] * (layer + 1), logits=0)
            work = Work(linear=read.linear - anyway.linear)
            yield laboratory.by_ranking(label, layer, ranking, work, **certain)


def windows(laboratory: Laboratory) -> Iterator[Trial]:
    """Longer windows; and the question as the window, which is kept with all that follows it."""
    for layer, label, window in product(LAYERS, RANKED, (32, 64)):
        method = laboratory.method(label, layer, window=window)
        yield Trial(f"{label} after layer {layer}, window {window}", method)
    unranked = torch.full_like(laboratory.ids, torch.inf, dtype=torch.float32)
    rankings = {place: unranked.clone() for place in product(LAYERS, RANKED)}
    for row, example in enumerate(laboratory.batch.examples):
        text = example.prompt
        question = encode_prompt(laboratory.tokenizer, text, fact=text.split("\n\n")[-1]).fact
        assert question is not None  # it is part of the prompt
        start = int(laboratory.start[row])
        ids = laboratory.ids[row : row + 1, start : start + question.stop]
        recorded = laboratory.read(ids, None)
        for (layer, label), ranking in rankings.items():
            method = laboratory.method(label, layer, window=len(question))
            before = slice(start, start + question.start)
            ranking[row, before] = ranking_of(recorded, method, layer)[0]
    for (layer, label), ranking in rankings.items():
        method = laboratory.method(label, layer)
        certain = {"num_sinks": method.num_sinks, "window": method.window}
        label = f"{label} after layer {layer}, window the question"
        yield laboratory.by_ranking(label, layer, ranking, Work(), **certain)


TRIED: Tried = {
    "known": known,
    "drafts": drafts,
    "look-ahead": look_aheads,
    "windows": windows,
}
