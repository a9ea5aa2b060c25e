"""A file of finished records that survives whatever ends the program."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from claa_ops.huggingface.models import InputError

Json = dict[str, Any]


class Journal:
    """Append-only JSON lines, each written through to the disk before the next is computed.

    A line has a ``key``, what the record depends on, and a ``result``. Whoever opens the file
    again finds every record that was added; the rest of a line that was being written when the
    program ended is cut off. One process at a time has it open: the operating system holds the
    lock, and releases it however the process ends.

    Args:
        file: the .jsonl file, made if it is not there.

    Attributes:
        torn: how many bytes of an unfinished line were cut off.

    Raises:
        InputError: the file cannot be read or written, another process has it open, or a line
            before the last is damaged.

    Example::

        with Journal(folder / "records.jsonl") as journal:
            journal.add({"prompt": 1}, {"score": 1.0})
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._opened = file.open("a+b", buffering=0)
        except OSError as error:
            raise self._refusal("cannot open", error) from error
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        try:
            fcntl.flock(self._opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is writing into the folder {self.file.parent}: wait until it "
                "has finished, or choose another folder"
            ) from error
        except OSError as error:  # of a file system without locks
            raise self._refusal("cannot lock", error) from error
        try:
            self._opened.seek(0)
            content = self._opened.read()
            whole = content.rfind(b"\n") + 1
            self.torn = len(content) - whole
            if self.torn:
                self._opened.truncate(whole)
        except OSError as error:
            raise self._refusal("cannot open", error) from error
        self._results: dict[str, Json] = {}
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                key, result = record["key"], record["result"]
                if not isinstance(result, dict):
                    raise TypeError("a result is an object")
                self._results[_canonical(key)] = result
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(
                    f"{self.file}, line {number}: expected a finished record, got {line[:40]!r}; "
                    "remove the line to compute it again"
                ) from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others open the file."""
        self._opened.close()

    def __len__(self) -> int:
        return len(self._results)

    def find(self, key: Json) -> Json | None:
        """The result under this key, or None."""
        return self._results.get(_canonical(key))

    def add(self, key: Json, result: Json) -> None:
        """Append a record; when this returns it is on the disk.

        Raises:
            InputError: it cannot be written; the records before it are safe.
        """
        line = (json.dumps({"key": key, "result": result}) + "\n").encode()
        try:
            before = self._opened.seek(0, os.SEEK_END)
            try:
                while line:  # a disk that fills up takes a part first
                    line = line[self._opened.write(line) :]
                os.fsync(self._opened.fileno())
            except OSError:
                self._opened.truncate(before)
                raise
        except OSError as error:
            raise self._refusal("cannot write", error) from error
        self._results[_canonical(key)] = result

    def _refusal(self, failure: str, error: OSError) -> InputError:
        kept = f"; its {len(self)} finished records are safe" if hasattr(self, "_results") else ""
        return InputError(f"{failure} {self.file}: {error.strerror}{kept}")


def _canonical(key: Json) -> str:
    return json.dumps(key, sort_keys=True)
