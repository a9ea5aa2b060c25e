"""The command line, one module per command."""

from typing import Annotated

from claa_ops._extras import require

require("cli", "transformers", "matplotlib", "rich", "scipy", "typer")

import typer

from claa_ops.cli.evaluate import evaluate
from claa_ops.cli.generate import demo, generate
from claa_ops.cli.info import info
from claa_ops.cli.options import Commands
from claa_ops.cli.oracle import oracle
from claa_ops.cli.serve import serve
from claa_ops.cli.tune import tune
from claa_ops.info import print_version

# transformers takes seconds to import: functions that need it import what uses it, --help does not.

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Rank the tokens of a long prompt, keep the important ones, prefill on those alone.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print_version()
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Take the options that are of no command."""


for command in (generate, demo, tune, evaluate, oracle, info):
    app.command()(command)
# What it does not know is vLLM's.
app.command(context_settings={"allow_extra_args": True})(serve)
