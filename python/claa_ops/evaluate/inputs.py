"""What a user may give a comparison, checked before any long work."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from claa_ops.methods import CLAA, FullKV
from claa_ops.models import InputError, find_checkpoint, resolve_device, resolve_dtype

METHODS = ("claa", "full")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to compare, as the user put it.

    Attributes:
        model: a directory, a .gguf file or a hub id.
        method: one of `METHODS`.
        keep, keep_kv: budgets, as `parse_budget` reads them.
        layer: the selection layer; None for the last of the model's first half, as in the paper.
        window: the last tokens of the prompt, which rank the others.
        max_new_tokens: the length at which an answer is cut off.
        dtype, device: as `load_model` takes them.
        threads: CPU threads; None for torch's choice.
        runs: timed prefills of each way.
        chat: whether to apply the chat template; None: if the tokenizer has one.
        plot: where to draw the token scores, if anywhere.
    """

    model: str
    method: str = "claa"
    keep: str = "0.1"
    keep_kv: str | None = None
    layer: int | None = None
    window: int = 8
    max_new_tokens: int = 64
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    runs: int = 3
    chat: bool | None = None
    plot: Path | None = None

    def check(self) -> None:
        """Refuse what can be refused before the model is there.

        Raises:
            InputError: a setting is none of those expected.
        """
        if self.method not in METHODS:
            near = difflib.get_close_matches(self.method.lower(), METHODS, n=1, cutoff=0.0)[0]
            raise InputError(
                f"unknown method {self.method!r}: expected {' or '.join(METHODS)}; "
                f"did you mean {near!r}?"
            )
        parse_budget("--keep", self.keep)
        if self.keep_kv is not None:
            parse_budget("--keep-kv", self.keep_kv)
        resolve_dtype(self.dtype, resolve_device(self.device))
        find_checkpoint(self.model)
        if self.plot is not None:
            check_plot_file(self.plot)

    def make_method(self, model: PreTrainedModel) -> CLAA | FullKV:
        """Return the method, if its settings fit the model.

        Raises:
            InputError: they do not.
        """
        layers = model.config.get_text_config().num_hidden_layers
        layer = layers // 2 - 1 if self.layer is None else self.layer
        keep_kv = None if self.keep_kv is None else parse_budget("--keep-kv", self.keep_kv)
        try:
            if self.method == "full":
                return FullKV(window=self.window)
            keep = parse_budget("--keep", self.keep)
            method = CLAA(keep=keep, keep_kv=keep_kv, layer=layer, window=self.window)
            method.check(layers)
        except ValueError as error:
            raise InputError(str(error)) from error
        return method


def read_prompt(text: str | None, file: str | None) -> str:
    """Return the prompt: `text`, the content of `file` (``-``: standard input), or what is piped.

    Raises:
        InputError: both or none were given, the file is not there or is not UTF-8, or the prompt
            is empty.
    """
    if text is not None and file is not None:
        raise InputError("got both --prompt and --prompt-file: expected one of them")
    if text is None and file is None and _stdin_is_terminal():
        raise InputError("no prompt: expected --prompt, --prompt-file or text on standard input")
    if text is None:
        text = _read_utf8(file)
    if not text.strip():
        raise InputError("the prompt is empty")
    return text


def parse_budget(option: str, text: str) -> float | int:
    """Return the rate (``0.1``, ``10%``, ``1``) or the number of tokens (``400``) in `text`."""
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        number = -1.0
    if 0 < number <= 1:
        return number
    if number > 1 and text.isdecimal():
        return int(text)
    raise InputError(
        f"{option} must be a rate in (0, 1] such as 0.1, or a number of tokens such as 400, "
        f"got {text}"
    )


def check_plot_file(file: Path) -> None:
    """Refuse a picture that could not be written when the work is done."""
    if file.suffix.lower() != ".png":
        raise InputError(f"the plot is a .png file, got {file}")
    existed = file.exists()
    try:
        file.open("ab").close()
    except OSError as error:
        raise InputError(f"cannot write the plot {file}: {error.strerror}") from error
    if not existed:
        file.unlink()


def _stdin_is_terminal() -> bool:
    return sys.stdin.isatty()


def _read_utf8(file: str | None) -> str:
    source = "standard input" if file in (None, "-") else f"prompt file {file}"
    try:
        content = sys.stdin.buffer.read() if file in (None, "-") else Path(str(file)).read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} must be UTF-8 text, got byte 0x{content[error.start]:02x} at offset "
            f"{error.start}"
        ) from error
