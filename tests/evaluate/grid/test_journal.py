"""What is in the journal stays there, whatever happens to the program."""

import errno
import json
import os

import pytest

from claa_ops.evaluate.grid.journal import Journal
from claa_ops.huggingface.models import InputError


def filled(file, records=3):
    journal = Journal(file)
    for index in range(records):
        journal.add({"prompt": index, "cell": "a"}, {"score": index / 2})
    return journal


def test_records_are_found_again(tmp_path):
    filled(tmp_path / "new" / "records.jsonl")
    journal = Journal(tmp_path / "new" / "records.jsonl")
    assert len(journal) == 3 and journal.torn == 0
    assert journal.find({"cell": "a", "prompt": 1}) == {"score": 0.5}
    assert journal.find({"cell": "b", "prompt": 1}) is None


@pytest.mark.parametrize("missing", [1, 2, 20])
def test_a_torn_line_is_cut_off(tmp_path, missing):
    file = tmp_path / "records.jsonl"
    filled(file)
    whole = file.read_bytes()
    os.truncate(file, len(whole) - missing)
    journal = Journal(file)
    assert len(journal) == 2 and journal.torn > 0
    assert file.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    journal.add({"prompt": 2, "cell": "a"}, {"score": 1.0})
    assert file.read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path):
    file = tmp_path / "records.jsonl"
    filled(file)
    lines = file.read_text().splitlines(keepends=True)
    results = [f'{{"key": 1, "result": {value}}}\n' for value in ("null", "[]", "1")]
    for damaged in ("{half\n", "[]\n", '{"key": {}}\n', "[" * 100_000 + "\n", *results):
        file.write_text(lines[0] + damaged + lines[2])
        with pytest.raises(InputError, match="records.jsonl, line 2: expected a finished record"):
            Journal(file)


@pytest.mark.parametrize("written", [0, 10])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, written):
    file = tmp_path / "records.jsonl"
    journal = filled(file, records=2)
    before = file.read_bytes()

    def fail(descriptor):
        os.write(descriptor, b"x" * written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        message = "cannot write .*: No space left on device; its 2 finished records are safe"
        with pytest.raises(InputError, match=message):
            journal.add({"prompt": 2, "cell": "a"}, {"score": 1.0})
    assert file.read_bytes() == before
    journal.add({"prompt": 2, "cell": "a"}, {"score": 1.0})
    assert [json.loads(line)["key"]["prompt"] for line in file.open()] == [0, 1, 2]


def test_one_at_a_time_has_it_open(tmp_path):
    file = tmp_path / "records.jsonl"
    with Journal(file) as journal:
        journal.add({"prompt": 0}, {"score": 1.0})
        with file.open("ab") as other:  # it may be writing: nothing is cut off
            other.write(b"{half")
        with pytest.raises(InputError, match=f"another process is writing into .* {tmp_path}: "):
            Journal(file)
        assert file.read_bytes().endswith(b"{half")
    assert len(Journal(file)) == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "occupied").write_text("a file, not a folder")
    with pytest.raises(InputError, match="cannot open .*occupied"):
        Journal(tmp_path / "occupied" / "records.jsonl")
