"""The map of the repository stays true: one stem per op at each level, and no torch in csrc."""

import ast
import re
from pathlib import Path

import pytest

import claa_ops
from claa_ops import reference

ROOT = Path(__file__).parents[1]
LEVELS = [
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "src/claa_ops/{}.cpp",
    "python/claa_ops/ops/{}.py",
    "tests/ops/test_{}.py",
]
# The CUDA kernels come as a whole or not at all.
if not any((ROOT / f"csrc/cuda/{op}.cu").exists() for op in claa_ops.__all__):
    LEVELS.remove("csrc/cuda/{}.cu")

FOLDERS = ["csrc", "src", "python", "tests", "bench", "examples", "docs", "cmake"]
ENDINGS = {".c", ".cc", ".cmake", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".in", ".py"}
LONGEST_FILE = 600


def sources(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in found if path.suffix in ENDINGS)


def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("op", claa_ops.__all__)
@pytest.mark.parametrize("level", LEVELS)
def test_op_has_its_file(op, level):
    assert (ROOT / level.format(op)).is_file()


@pytest.mark.parametrize("op", claa_ops.__all__)
def test_op_has_a_reference(op):
    assert callable(getattr(reference, op))


@pytest.mark.parametrize("op", claa_ops.__all__)
def test_op_has_a_bench_case(op):
    assert op in functions_of("bench/cases.py")


@pytest.mark.parametrize("op", claa_ops.__all__)
def test_op_is_in_the_contract_and_the_schemas(op):
    params = "".join(word.capitalize() for word in op.split("_")) + "Params"
    assert re.search(rf"\bstruct {params}\b", (ROOT / "csrc/kernels.h").read_text())
    assert re.search(rf"\b{op}\(", (ROOT / "src/claa_ops/library.cpp").read_text())


def test_every_op_module_is_public():
    modules = {path.stem for path in (ROOT / "python/claa_ops/ops").glob("[!_]*.py")}
    assert modules == set(claa_ops.__all__)


def test_kernels_do_not_include_torch():
    included = re.compile(r'^\s*#\s*include\s*[<"]((?:torch|ATen|c10)/[^>"]*)', re.MULTILINE)
    found = {
        str(path.relative_to(ROOT)): included.findall(path.read_text()) for path in sources("csrc")
    }
    assert found, "csrc is empty"
    assert not {path: headers for path, headers in found.items() if headers}


def test_no_file_is_too_long_to_read():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in sources(*FOLDERS)
    }
    assert not {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE}
