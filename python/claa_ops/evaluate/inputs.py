"""Prompts, files and folders that a user names, checked before any long work."""

from __future__ import annotations

import sys
from pathlib import Path

from claa_ops.huggingface.models import InputError


def read_prompt(text: str | None, file: str | None) -> str:
    """Return the prompt: `text`, the content of `file` (``-``: standard input), or what is piped.

    Raises:
        InputError: both or none were given, the file is not there or is not UTF-8 text, or the
            prompt is empty.
    """
    if text is not None and file is not None:
        raise InputError("got both a prompt and a file of it: expected one of them")
    if text is None and file is None and _stdin_is_terminal():
        raise InputError("no prompt: expected a text, a file or standard input")
    if text is None:
        text = _read_utf8(file)
    else:
        require_text("the prompt", text)
    if not text.strip():
        raise InputError("the prompt is empty")
    return text


def require_text(name: str, text: str) -> None:
    """Raise InputError if a text holds what is no character.

    That is a byte that is not UTF-8, which Python turns into half a surrogate pair on the command
    line and in files read with ``surrogateescape``; or half a character of a JSON text, such as
    the first of the two escapes of an emoji.

    Args:
        name: what the message calls the text.
        text: the text; the message has the offset in its UTF-8 bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, offset = ord(text[error.start]), len(text[: error.start].encode())
        is_byte = 0xDC80 <= code <= 0xDCFF
        got = f"byte 0x{code - 0xDC00:02x}" if is_byte else f"half surrogate U+{code:04X}"
        raise InputError(f"{name} must be UTF-8 text, got {got} at offset {offset}") from error


def check_picture_file(file: Path) -> None:
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


def make_folder(folder: Path) -> None:
    """Make a folder that results go into; InputError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error


def _stdin_is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _read_utf8(file: str | None) -> str:
    source = "standard input" if file in (None, "-") else f"prompt file {file}"
    if file in (None, "-") and sys.stdin is None:
        raise InputError(f"cannot read {source}: it is closed")
    try:
        content = sys.stdin.buffer.read() if file in (None, "-") else Path(str(file)).read_bytes()
        text = content.decode("utf-8").removeprefix("\ufeff")  # a mark that Windows programs write
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} must be UTF-8 text, got byte 0x{content[error.start]:02x} at offset "
            f"{error.start}"
        ) from error
    if (place := content.find(0)) >= 0:
        raise InputError(f"{source} must be UTF-8 text, got byte 0x00 at offset {place}")
    return text
