"""A file of finished records that survives whatever ends the program."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from claa_ops.models import InputError

Json = dict[str, Any]


class Journal:
    """Append-only JSON lines, each written through to the disk before the next is computed.

    A line has a ``key``, what the record depends on, and a ``result``. Whoever opens the file
    again finds every record that was added; the rest of a line that was being written when the
    program ended is cut off.

    Args:
        file: the .jsonl file, made if it is not there.

    Attributes:
        torn: how many bytes of an unfinished line were cut off.

    Raises:
        InputError: the file cannot be read or written, or a line before the last is damaged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            content = file.read_bytes() if file.exists() else b""
            whole = content.rfind(b"\n") + 1
            self.torn = len(content) - whole
            if self.torn:
                os.truncate(file, whole)
        except OSError as error:
            raise self._refusal("cannot open", error) from error
        self._results: dict[str, Json] = {}
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                self._results[_canonical(record["key"])] = record["result"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{file}, line {number}: expected a finished record, got {line[:40]!r}; "
                    "remove the line to compute it again"
                ) from error

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
            with self.file.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    while line:  # a disk that fills up takes a part first
                        line = line[file.write(line) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(file.fileno(), before)
                    raise
        except OSError as error:
            raise self._refusal("cannot write", error) from error
        self._results[_canonical(key)] = result

    def _refusal(self, failure: str, error: OSError) -> InputError:
        kept = f"; its {len(self)} finished records are safe" if hasattr(self, "_results") else ""
        return InputError(f"{failure} {self.file}: {error.strerror}{kept}")


def _canonical(key: Json) -> str:
    return json.dumps(key, sort_keys=True)
