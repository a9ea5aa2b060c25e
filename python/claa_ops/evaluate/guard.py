"""A bad record is reported, and the others run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from zipfile import BadZipFile


@contextlib.contextmanager
def left_out(where: str, on_problem: Callable[[str], None]) -> Iterator[None]:
    """Report whatever the body raises, and continue after it.

    All that is done for one record stands in such a body: reading, encoding, prefill, decoding
    and grading. What concerns every record does not: a journal that cannot be written. An
    interrupt is no Exception, and passes.

    Args:
        where: what is left out: file and line of a record, if it has them.
        on_problem: told of it, in one line that every terminal and file can hold.
    """
    try:
        yield
    except Exception as error:
        on_problem(printable(f"{where}: {reason(error)}"))


def reason(error: Exception) -> str:
    """The first line of what an error says; its type too, unless it is one of ours or alike."""
    message = str(error).strip().split("\n")[0]
    if not message:
        return type(error).__name__
    return (
        message
        if isinstance(error, ValueError | TypeError | BadZipFile)
        else f"{type(error).__name__}: {message}"
    )


def printable(text: str) -> str:
    r"""The text with what is no character, such as half an emoji, spelled out: ``\ud83d``."""
    return text.encode("utf-8", "backslashreplace").decode()
