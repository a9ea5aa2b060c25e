"""Options that commands share, and how they show progress and refuse bad input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

Keep = Annotated[
    str,
    typer.Option(
        help="Tokens that the layers after the selection layer see: a rate (0.1, 10%) or a number."
    ),
]
KeepKv = Annotated[
    str | None,
    typer.Option(help="Tokens that each layer's K/V cache keeps, likewise. Default: --keep."),
]
Layer = Annotated[
    int | None,
    typer.Option(
        help="The selection layer, from 0; it still sees every token. "
        "Default: last of the first half."
    ),
]
Window = Annotated[
    int,
    typer.Option(
        min=1,
        help="The last tokens of the prompt, whose attention ranks the others. They should reach "
        "back over the end of the chat template into the question.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length at which an answer is cut off.")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16 or auto: float32 on the CPU, else bfloat16.")
]
Device = Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")]
Runs = Annotated[int, typer.Option(min=1, help="Timed prefills of each way; the median counts.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object with everything measured.")
]


@contextlib.contextmanager
def step_progress() -> Iterator[Callable[[str], None]]:
    """Show on standard error what is being done, and for how long."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        current = progress.add_task("", total=None)
        yield lambda text: progress.reset(current, description=text)


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Turn an InputError into one line on standard error and exit code 2."""
    from claa_ops.models import InputError

    try:
        yield
    except InputError as error:
        Console(stderr=True).print(Text(f"claa-ops: {error}"), soft_wrap=True)
        raise typer.Exit(2) from None
