"""The command line, one module per command."""

import typer

from claa_ops.cli.evaluate import evaluate
from claa_ops.cli.generate import demo, generate
from claa_ops.cli.info import info
from claa_ops.cli.options import Commands
from claa_ops.cli.oracle import oracle

# transformers takes seconds to import: functions that need it import what uses it, --help does not.

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Rank the tokens of a long prompt, keep the important ones, prefill on those alone.",
)
for command in (generate, demo, evaluate, oracle, info):
    app.command()(command)
