"""``claa-ops oracle``: every method at every layer against the attention of the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

from claa_ops.cli.options import (
    AsJson,
    Chat,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    Prompt,
    PromptFile,
    Threads,
    input_errors,
    step_progress,
)
from claa_ops.evaluate.oracle_settings import Settings

# Those with a ranking of their own; the others do other things with one of these.
_METHODS = ["claa", "claa:zscore=true", "fastkv", "gemfilter", "peak", "random"]


def oracle(
    model: Model = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Several prompts instead: needle, needle-number, needle-sentence, "
            "needle-four-keys, ruler:FILE, longbench:FILE or infinitebench:FILE. Repeatable."
        ),
    ] = None,
    length: Annotated[
        int, typer.Option(min=100, help="About how many tokens a needle prompt has.")
    ] = 1000,
    needles: Annotated[
        int, typer.Option(min=1, help="Prompts of each needle task, their depths spread evenly.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the needle prompts.")] = 0,
    filler: Annotated[
        Path | None,
        typer.Option(help="A folder of .txt files to hide needles in. Default: CPython's manual."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Records to take of each file. Default: all.")
    ] = None,
    method: Annotated[
        list[str],
        typer.Option(help="A method to compare: NAME or NAME:SETTING=VALUE:... Repeatable."),
    ] = _METHODS,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Layers whose rankings are compared, such as 7,15,20-22. Default: all after "
            "which a method can select."
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="The best tokens that are compared: a rate (0.1, 10%) or a number.")
    ] = "0.1",
    max_new_tokens: MaxNewTokens = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    chat: Chat = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for the pictures and, of the first prompt, a page of coloured tokens."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare how methods rank a prompt's tokens with what the model's own answer attended to."""
    with input_errors():
        settings = Settings(
            model=model,
            prompt=prompt,
            prompt_file=prompt_file,
            tasks=task or [],
            length=length,
            needles=needles,
            seed=seed,
            filler=filler,
            limit=limit,
            methods=method,
            layer=layer,
            keep=keep,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            device=device,
            chat=chat,
            out=out,
        )
        single = settings.check()

        from claa_ops.evaluate.oracle_report import study_json, study_table
        from claa_ops.evaluate.oracle_run import draw_study, run_study

        if threads is not None:
            torch.set_num_threads(threads)
        with step_progress() as on_step:
            study, tokenizer = run_study(settings, single, on_step, _on_problem)
            files = [] if out is None else draw_study(study, tokenizer, out)
    if as_json:
        typer.echo(json.dumps(study_json(study, settings), indent=2, allow_nan=False))
        return
    # A table that is not for a terminal is not cut to one either.
    Console(width=None if Console().is_terminal else 120).print(study_table(study))
    if files:
        typer.echo("\nWritten: " + ", ".join(map(str, files)))


def _on_problem(text: str) -> None:
    Console(stderr=True).print(Text(f"claa-ops: left out: {text}"), soft_wrap=True)
