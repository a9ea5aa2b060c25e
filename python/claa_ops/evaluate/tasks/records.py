"""Records of public benchmarks in their own file formats, from local files or the hub."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any
from zipfile import BadZipFile, ZipFile
from zipfile import Path as ZipPath

from claa_ops.evaluate.tasks.example import Example
from claa_ops.evaluate.tasks.harness import harness_task
from claa_ops.models import InputError

Record = Mapping[str, Any]

_HUB = "hf://datasets/"
# RULER's lengths of answers (arXiv 2404.06654, its task constants), by how a task's name begins.
_RULER_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
# The few-shot and code tasks of LongBench are asked without a chat template (arXiv 2308.14508).
_LONGBENCH_PLAIN = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}


def record_examples(
    benchmark: str,
    task: str | None,
    source: str,
    *,
    limit: int | None = None,
    on_problem: Callable[[str], None],
) -> Iterator[Example]:
    """Yield the prompts of a benchmark's records, in the order of the files.

    Args:
        benchmark: a key of `BENCHMARKS`.
        task: the benchmark's task; None to take it from the record or the names of file and
            folder.
        source: a .jsonl file, a folder or a .zip of them, or one on the hub,
            ``hf://datasets/OWNER/NAME/FILE``.
        limit: how many records of each file, the first ones; None for all.
        on_problem: told of each record that cannot be used, with file and line; the others are
            yielded all the same.

    Raises:
        InputError: there are no such files, or the task is unknown.
    """
    make = BENCHMARKS[benchmark]
    for file in _files(source):
        taken = 0
        for line, text in _lines(file):
            if limit is not None and taken == limit:
                break
            path, where = PurePath(str(file)), f"{file}, line {line}"
            taken += 1
            try:
                record = json.loads(text)
                if not isinstance(record, dict):
                    raise TypeError(f"expected a JSON object, got {text[:40]!r}")
                example = make(record, task, path, f"{path.name}, line {line}")
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
            except KeyError as error:
                on_problem(f"{where}: {benchmark} records have a field {error}, this one has not")
            except (ValueError, TypeError, IndexError) as error:
                on_problem(f"{where}: {error}")
            else:
                yield example


def check_source(source: str) -> None:
    """Raise InputError if there are no records; those on the hub are fetched for that."""
    _files(source)


def _ruler(record: Record, task: str | None, file: PurePath, name: str) -> Example:
    """Fields ``input`` and ``outputs``; newer files keep ``answer_prefix`` apart."""
    kind = task or _named_in(file, tuple(_RULER_NEW_TOKENS)) or "niah"
    begin = next((known for known in _RULER_NEW_TOKENS if kind.startswith(known)), None)
    if begin is None:
        near = difflib.get_close_matches(kind, _RULER_NEW_TOKENS, n=1, cutoff=0.0)[0]
        raise InputError(f"unknown ruler task {kind!r}: did you mean {near!r}?")
    outputs = [str(output).lower() for output in _list(record, "outputs")]

    def grade(answer: str) -> float:
        found = [output in answer.lower() for output in outputs]
        return float(any(found)) if begin == "qa" else sum(found) / len(found)

    return Example(
        task=f"ruler/{kind}",
        name=name,
        prompt=_text(record, "input"),
        answer_prefix=record.get("answer_prefix", ""),
        grade=grade,
        max_new_tokens=_RULER_NEW_TOKENS[begin],
    )


def _longbench(record: Record, task: str | None, file: PurePath, name: str) -> Example:
    """Fields ``input``, ``context``, ``answers``, ``all_classes`` and ``dataset``."""
    kind = (task or _text(record, "dataset")).removesuffix("_e")
    harness = harness_task("longbench", kind)
    _text(record, "context"), _list(record, "answers")
    document = {**record, "question": record["input"]}
    return Example(
        task=f"longbench/{kind}",
        name=name,
        prompt=harness.prompt(document),
        chat=False if kind in _LONGBENCH_PLAIN else None,
        grade=lambda answer: harness.grade(document, answer),
        max_new_tokens=harness.max_new_tokens,
        stop=harness.stop,
        may_cut=True,
    )


def _infinitebench(record: Record, task: str | None, file: PurePath, name: str) -> Example:
    """Fields ``context``, ``input``, ``answer`` and ``options``; the file is named by its task."""
    kind = (task or file.stem).replace("_eng", "_en")
    harness = harness_task("infinitebench", kind)
    answer = record["answer"]
    document = {**record, "answer": answer if isinstance(answer, list) else [answer]}
    _text(record, "context"), _text(record, "input"), _list(document, "answer")
    return Example(
        task=f"infinitebench/{kind}",
        name=name,
        prompt=harness.prompt(document),
        grade=lambda text: harness.grade(document, text),
        max_new_tokens=harness.max_new_tokens,
        stop=harness.stop,
        may_cut=True,
    )


BENCHMARKS: dict[str, Callable[[Record, str | None, PurePath, str], Example]] = {
    "ruler": _ruler,
    "longbench": _longbench,
    "infinitebench": _infinitebench,
}


def _files(source: str) -> list[Path | ZipPath]:
    path = _from_hub(source) if source.startswith(_HUB) else Path(source)
    if not path.exists():
        raise InputError(f"there are no records at {source}: expected a .jsonl file or a folder")
    if path.is_file() and path.suffix != ".zip":
        return [path]
    files: list[Path | ZipPath] = []
    if path.is_dir():
        files.extend(sorted(path.rglob("*.jsonl")))
    else:
        try:
            with ZipFile(path) as archive:
                names = sorted(archive.namelist())
        except (OSError, BadZipFile) as error:
            raise InputError(f"cannot read {source}: {error}") from error
        files.extend(ZipPath(path, name) for name in names if name.endswith(".jsonl"))
    if not files:
        raise InputError(f"{source} has no .jsonl files")
    return files


def _from_hub(source: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    dataset, file = _on_hub(source)
    reasons = {
        errors.LocalEntryNotFoundError: "the hub does not answer, and it was not fetched before",
        errors.EntryNotFoundError: f"the data set {dataset} has no file {file}",
        errors.RepositoryNotFoundError: f"the hub has no data set {dataset}, or hides it",
    }
    try:
        return Path(hf_hub_download(dataset, file, repo_type="dataset"))
    except (OSError, ValueError) as error:
        known = (reason for kind, reason in reasons.items() if isinstance(error, kind))
        reason = next(known, str(error).splitlines()[0])
        raise InputError(f"cannot get {source}: {reason}") from error


def _on_hub(source: str) -> tuple[str, str]:
    """The data set and the file that are meant."""
    owner, _, rest = source.removeprefix(_HUB).partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file):
        raise InputError(f"records on the hub are {_HUB}OWNER/NAME/FILE, got {source}")
    return f"{owner}/{name}", file


def _lines(file: Path | ZipPath) -> Iterator[tuple[int, str]]:
    try:
        with file.open("r", encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def _named_in(file: PurePath, kinds: tuple[str, ...]) -> str | None:
    """The task in the name of the file or its folder: RULER's are vt/validation.jsonl."""
    for name in (file.stem, file.parent.name):
        name = name.removeprefix("ruler_")
        if name.startswith(kinds):
            return name
    return None


def _text(record: Record, field: str) -> str:
    if not isinstance(record[field], str):
        raise TypeError(f"{field} must be a text, got {record[field]!r}")
    return record[field]


def _list(record: Record, field: str) -> list[Any]:
    if not isinstance(record[field], list) or not record[field]:
        raise TypeError(f"{field} must be a list that is not empty, got {record[field]!r}")
    return record[field]
