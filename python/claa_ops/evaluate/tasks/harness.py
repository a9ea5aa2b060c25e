"""Prompts and metrics of public benchmarks, as lm-eval words and computes them."""

from __future__ import annotations

import difflib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import yaml

from claa_ops.huggingface.models import InputError

Record = Mapping[str, Any]

_INSTALL = "pip install 'claa-ops[evaluate]'"


@dataclass(frozen=True)
class HarnessTask:
    """What lm-eval says about a task: how a record is asked, and how an answer is graded."""

    prompt: Callable[[Record], str]
    grade: Callable[[Record, str], float]
    max_new_tokens: int
    stop: tuple[str, ...]


def harness_tasks(benchmark: str) -> dict[str, Path]:
    """The files of lm-eval's tasks of ``longbench`` or ``infinitebench``, by their names.

    Raises:
        InputError: lm-eval is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise InputError(f"{benchmark} needs the prompts and metrics of lm-eval: {_INSTALL}")
    begin = f"{benchmark}_" if benchmark == "infinitebench" else ""
    folder = Path(spec.origin).parent / "tasks" / benchmark
    return {
        file.stem.removeprefix(begin): file
        for file in sorted(folder.glob(f"{begin}*.yaml"))
        if not file.stem.startswith("_") and file.stem != benchmark
    }


@cache
def harness_task(benchmark: str, task: str) -> HarnessTask:
    """Read a task of ``longbench`` or ``infinitebench`` from the files of lm-eval.

    Its files are read here. lm-eval's own loader (``TaskManager``) would do it, but its tasks
    download their data sets, in whose place come the user's records, and importing it takes 3 s.

    Raises:
        InputError: lm-eval is not installed, or has no such task.
    """
    files = harness_tasks(benchmark)
    if task not in files:
        near = difflib.get_close_matches(task, files, n=1, cutoff=0.0)
        raise InputError(f"unknown {benchmark} task {task!r}: did you mean {near[0]!r}?")
    folder = files[task].parent
    config = _read(folder, files[task].name)
    generation = config["generation_kwargs"]
    description = _renderer(folder, config.get("description", ""))
    question = _renderer(folder, config["doc_to_text"])
    results = _function(folder, config["process_results"])

    def grade(record: Record, answer: str) -> float:
        return float(results(record, [answer])["score"])

    return HarnessTask(
        prompt=lambda record: description(record) + question(record),
        grade=grade,
        max_new_tokens=generation["max_gen_toks"],
        stop=tuple(generation["until"]),
    )


class _Function(str):
    """The name of a Python function, as it stands after ``!function``."""


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: _Function(node.value))


def _read(folder: Path, name: str) -> dict[str, Any]:
    config = yaml.load((folder / name).read_text(encoding="utf-8"), Loader=_Loader)
    included = config.pop("include", None)
    return config if included is None else {**_read(folder, included), **config}


def _renderer(folder: Path, template: str) -> Callable[[Record], str]:
    if isinstance(template, _Function):
        return _function(folder, template)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    compiled = environment.from_string(template)
    return lambda record: compiled.render(**record)


def _function(folder: Path, name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(".")
    return getattr(_module(folder / f"{module}.py"), function)


@cache
def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"claa_ops_{file.parent.name}", file)
    assert spec is not None and spec.loader is not None  # the file is there
    module = importlib.util.module_from_spec(spec)
    try:
        with warnings.catch_warnings():
            # A slower way to the same similarity: it compares one line with another.
            warnings.filterwarnings("ignore", "Using slow pure-python SequenceMatcher")
            spec.loader.exec_module(module)
    except ImportError as error:
        raise InputError(f"the metrics of {file.parent.name} need more: {_INSTALL}") from error
    return module
