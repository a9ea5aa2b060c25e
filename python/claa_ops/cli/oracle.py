"""``claa-ops oracle``: every method at every layer against the attention of the answer."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.text import Text

from claa_ops.cli.options import AsJson, expand, limit_threads, step_progress
from claa_ops.evaluate.oracle.settings import METHODS, Settings

_OPTIONS = {
    "tasks": typer.Option(
        "--task",
        help="Several prompts instead: needle, needle-number, needle-sentence, "
        "needle-four-keys, ruler:FILE, longbench:FILE or infinitebench:FILE. Repeatable.",
    ),
    "length": typer.Option(min=100, help="About how many tokens a needle prompt has."),
    "needles": typer.Option(min=1, help="Prompts of each needle task, their depths spread evenly."),
    "methods": typer.Option(
        "--method",
        help="A method to compare: NAME or NAME:SETTING=VALUE:... Repeatable. Default: "
        f"{', '.join(METHODS)}.",
    ),
    "layer": typer.Option(
        help="Layers whose rankings are compared, such as 7,15,20-22. Default: all after "
        "which a method can select."
    ),
    "keep": typer.Option(help="The best tokens that are compared: a rate (0.1, 10%) or a number."),
    "out": typer.Option(
        help="A folder for the pictures and, of the first prompt, a page of coloured tokens."
    ),
}


@expand(Settings, _OPTIONS)
def oracle(*, settings: Settings, as_json: AsJson = False) -> None:
    """Compare how methods rank a prompt's tokens with what the model's own answer attended to."""
    single = settings.check()

    from claa_ops.evaluate.oracle.run import draw_study, run_study
    from claa_ops.evaluate.oracle.table import study_json, study_table

    limit_threads(settings.threads)
    with step_progress() as on_step:
        study, tokenizer = run_study(settings, single, on_step, _on_problem)
        files = [] if settings.out is None else draw_study(study, tokenizer, settings.out)
    if as_json:
        typer.echo(json.dumps(study_json(study, settings), indent=2, allow_nan=False))
        return
    # A table that is not for a terminal is not cut to one either.
    Console(width=None if Console().is_terminal else 120).print(study_table(study))
    if files:
        typer.echo("\nWritten: " + ", ".join(map(str, files)))


def _on_problem(text: str) -> None:
    Console(stderr=True).print(Text(f"claa-ops: left out: {text}"), soft_wrap=True)
