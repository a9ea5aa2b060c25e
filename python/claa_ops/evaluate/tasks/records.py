"""Records of public benchmarks in their own file formats, from local files or the hub."""

from __future__ import annotations

import difflib
import io
import itertools
import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any
from zipfile import Path as ZipPath
from zipfile import ZipFile

from claa_ops.evaluate.guard import left_out, reason
from claa_ops.evaluate.inputs import require_text
from claa_ops.evaluate.tasks.example import Example
from claa_ops.evaluate.tasks.harness import harness_task, harness_tasks
from claa_ops.huggingface.models import InputError

Record = Mapping[str, Any]

_HUB = "hf://datasets/"
# RULER's lengths of answers (arXiv 2404.06654, its task constants), by how a task's name begins.
_RULER_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
# The few-shot and code tasks of LongBench are asked without a chat template (arXiv 2308.14508).
_LONGBENCH_PLAIN = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
# Lists of texts that a task's prompt or metric reads, besides the right answers.
_CHOICES = {
    "trec": "all_classes",
    "lsht": "all_classes",
    "longbook_choice_en": "options",
    "code_debug": "options",
}
_LETTERS = ["A", "B", "C", "D"]  # of the options that InfiniteBench's prompts show
# Graded before a model runs, so that a metric which cannot read a record's answers says so first.
_ANY_ANSWER = "A 0"


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
        on_problem: told of each record that cannot be used, with file and line, and of each file
            that cannot be read; the others are yielded all the same.

    Raises:
        InputError: there are no such files.
    """
    make = BENCHMARKS[benchmark]
    for name, place, file in _files(source):
        lines: Iterator[tuple[int, str]] = iter(())
        with left_out(f"cannot read {place}", on_problem):
            lines = _lines(file.read_bytes())  # all of it: an archive checks what it holds last
            lines = itertools.islice(lines, limit)
            first = next(lines, None)
            if first is None:
                raise InputError("it has no records")
            lines = itertools.chain([first], lines)
        for number, line in lines:
            where, example = f"{place}, line {number}", None
            with left_out(where, on_problem):
                made = make(_record(line), task, PurePath(place), f"{name}, line {number}")
                _try_grade(made)
                example = replace(made, source=where)
            if example is not None:
                yield example


def check_records(benchmark: str, task: str | None, source: str) -> None:
    """Refuse what no record could be asked of; records on the hub are fetched for that.

    Raises:
        InputError: there are no records, the benchmark has no such task, or lm-eval is missing.
    """
    _files(source)
    if benchmark == "ruler":
        _ruler_begin(task or "niah")
    elif task is None:
        harness_tasks(benchmark)
    else:
        harness_task(benchmark, _KINDS[benchmark](task))


def _try_grade(example: Example) -> None:
    """Raise InputError if the metric cannot read the right answers."""
    assert example.grade is not None  # it has no target
    try:
        example.grade(_ANY_ANSWER)
    except Exception as error:
        raise InputError(
            f"the metric of {example.task} cannot read the right answers "
            f"{reprlib.repr(list(example.answers))}: {reason(error)}"
        ) from error


def _ruler(record: Record, task: str | None, file: PurePath, name: str) -> Example:
    """Fields ``input`` and ``outputs``; newer files keep ``answer_prefix`` apart."""
    kind = task or _named_in(file, tuple(_RULER_NEW_TOKENS)) or "niah"
    begin = _ruler_begin(kind)
    outputs = [output.lower() for output in _texts(record, "outputs")]

    def grade(answer: str) -> float:
        found = [output in answer.lower() for output in outputs]
        return float(any(found)) if begin == "qa" else sum(found) / len(found)

    return Example(
        task=f"ruler/{kind}",
        name=name,
        prompt=_text(record, "input"),
        # Tools that turn tables into lines write null for what a record does not have.
        answer_prefix="" if record.get("answer_prefix") is None else _any(record, "answer_prefix"),
        grade=grade,
        answers=outputs,
        max_new_tokens=_RULER_NEW_TOKENS[begin],
    )


def _ruler_begin(kind: str) -> str:
    """Which of RULER's tasks a name begins with."""
    begin = next((known for known in _RULER_NEW_TOKENS if kind.startswith(known)), None)
    if begin is None:
        near = difflib.get_close_matches(kind, _RULER_NEW_TOKENS, n=1, cutoff=0.0)[0]
        raise InputError(f"unknown ruler task {kind!r}: did you mean {near!r}?")
    return begin


def _longbench(record: Record, task: str | None, file: PurePath, name: str) -> Example:
    """Fields ``input``, ``context``, ``answers``, ``all_classes`` and ``dataset``."""
    kind = _KINDS["longbench"](task or _text(record, "dataset"))
    answers = _texts(record, "answers")
    document = _document(record, kind, answers=answers)
    if kind in _CHOICES:
        _require_choice("answers", answers, document[_CHOICES[kind]])
    return Example(
        task=f"longbench/{kind}",
        name=name,
        answers=answers,
        chat=False if kind in _LONGBENCH_PLAIN else None,
        **_asked("longbench", kind, {**document, "question": document["input"]}),
    )


def _infinitebench(record: Record, task: str | None, file: PurePath, name: str) -> Example:
    """Fields ``context``, ``input``, ``answer`` and ``options``; the file is named by its task."""
    kind = _KINDS["infinitebench"](task or file.stem)
    answer = _field(record, "answer")
    answers = _texts({"answer": answer if isinstance(answer, list) else [answer]}, "answer")
    document = _document(record, kind, answer=answers)
    if kind in _CHOICES:
        options = document[_CHOICES[kind]][: len(_LETTERS)]
        _require_choice("answer", answers[:1], [*options, *_LETTERS[: len(options)]])
    return Example(
        task=f"infinitebench/{kind}",
        name=name,
        answers=answers,
        **_asked("infinitebench", kind, document),
    )


def _document(record: Record, kind: str, **answers: list[str]) -> Record:
    """The record as lm-eval's prompts and metrics read it."""
    texts = {"context": _text(record, "context"), "input": _any(record, "input")}
    choices = {_CHOICES[kind]: _texts(record, _CHOICES[kind])} if kind in _CHOICES else {}
    return {**record, **texts, **choices, **answers}


def _require_choice(field: str, answers: list[str], choices: list[str]) -> None:
    """Refuse answers of which none can be given: whatever a model says would count as wrong."""
    known = {choice.strip() for choice in choices}
    if not any(answer.strip() in known for answer in answers):
        raise InputError(
            f"{field} must be among the choices {reprlib.repr(choices)}, got "
            f"{reprlib.repr(answers)}"
        )


def _asked(benchmark: str, kind: str, document: Record) -> dict[str, Any]:
    """What an example of one of lm-eval's tasks has of it."""
    harness = harness_task(benchmark, kind)
    return {
        "prompt": harness.prompt(document),
        "grade": lambda answer: harness.grade(document, answer),
        "max_new_tokens": harness.max_new_tokens,
        "stop": harness.stop,
        "may_cut": True,
    }


# A task by lm-eval's name, from that of the benchmark's own files.
_KINDS: dict[str, Callable[[str], str]] = {
    "longbench": lambda name: name.removesuffix("_e"),
    "infinitebench": lambda name: name.replace("_eng", "_en"),
}
BENCHMARKS: dict[str, Callable[[Record, str | None, PurePath, str], Example]] = {
    "ruler": _ruler,
    "longbench": _longbench,
    "infinitebench": _infinitebench,
}


def _files(source: str) -> list[tuple[str, str, Path | ZipPath]]:
    """The .jsonl files: their names within the source, where a user finds them, and themselves."""
    path = _from_hub(source) if source.startswith(_HUB) else Path(source)
    if not path.exists():
        raise InputError(f"there are no records at {source}: expected a .jsonl file or a folder")
    if path.is_file() and path.suffix.lower() != ".zip":
        return [(path.name, source, path)]
    files: dict[str, Path | ZipPath] = {}
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if _is_lines(file.name))
        files = {str(file.relative_to(path)): file for file in found}
    else:
        try:
            with ZipFile(path) as archive:
                names = sorted(set(archive.namelist()))
        # A directory that is damaged raises whatever its bytes happen to mean.
        except Exception as error:
            raise InputError(f"cannot read {source}: {reason(error)}") from error
        files = {name: ZipPath(path, name) for name in names if _is_lines(name)}
    if not files:
        raise InputError(f"{source} has no .jsonl files")
    return [(name, f"{source.rstrip('/')}/{name}", file) for name, file in files.items()]


def _is_lines(name: str) -> bool:
    return name.lower().endswith(".jsonl")


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


def _lines(content: bytes) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, and their numbers; bytes that are no UTF-8 stay as they are."""
    lines = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", "surrogateescape")
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _record(line: str) -> Record:
    """The JSON object of a line."""
    try:
        record = json.loads(line)
    except ValueError:
        require_text("the line", line)  # in another encoding it is no JSON either
        raise
    if not isinstance(record, dict):
        raise InputError(f"expected a JSON object, got {line.strip()[:40]!r}")
    return record


def _named_in(file: PurePath, kinds: tuple[str, ...]) -> str | None:
    """The task in the name of the file or its folder: RULER's are vt/validation.jsonl."""
    for name in (file.stem, file.parent.name):
        name = name.removeprefix("ruler_")
        if name.startswith(kinds):
            return name
    return None


def _field(record: Record, field: str) -> Any:
    if field not in record:
        raise InputError(f"expected a field {field!r}, this record has none")
    return record[field]


def _any(record: Record, field: str) -> str:
    """A field that is a text, be it empty."""
    if not isinstance(_field(record, field), str):
        raise InputError(f"{field} must be a text, got {reprlib.repr(record[field])}")
    return record[field]


def _text(record: Record, field: str) -> str:
    if not _any(record, field).strip():
        raise InputError(f"{field} must be a text that is not empty, got {record[field]!r}")
    return record[field]


def _texts(record: Record, field: str) -> list[str]:
    """A list of texts; numbers in it count as theirs, and an empty one is in every answer."""
    values = _field(record, field)
    if not isinstance(values, list) or not values:
        raise InputError(f"{field} must be a list that is not empty, got {reprlib.repr(values)}")
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (math.isfinite(value) if number else isinstance(value, str) and value.strip()):
            raise InputError(
                f"{field} must hold texts that are not empty, or numbers, got {reprlib.repr(value)}"
            )
    return [str(value) for value in values]
