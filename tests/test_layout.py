"""The map of the repository stays true: one stem per op at each level, and no torch in csrc."""

import ast
import re
from pathlib import Path

import pytest

import claa_ops
from claa_ops import reference
from support.functions import Function, cpp_functions, python_functions

ROOT = Path(__file__).parents[1]
LEVELS = [
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "src/claa_ops/{}.cpp",
    "python/claa_ops/ops/{}.py",
    "tests/ops/test_{}.py",
]
FOLDERS = ["csrc", "src", "python", "tests", "bench", "examples", "studies"]
FUNCTIONS_OF = {
    ending: cpp_functions for ending in (".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp")
}
FUNCTIONS_OF[".py"] = python_functions
LONGEST_FUNCTION = 100


def sources(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in found if path.suffix in FUNCTIONS_OF)


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


def test_no_function_is_too_long_to_read():
    found = {
        f"{path.relative_to(ROOT)}:{function.line} {function.name}": function.lines
        for path in sources(*FOLDERS)
        for function in FUNCTIONS_OF[path.suffix](path.read_text())
    }
    assert len(found) > 1000  # the sources are where they were looked for
    assert not {name: lines for name, lines in found.items() if lines > LONGEST_FUNCTION}


CPP = r"""
#define BODY(x) \
  void x() {}
namespace claa::cuda {  // { in a comment
constexpr int kTable[] = {one(1), 2};
template <class T>
struct Words {
  const char* text = "}";
  char brace = '{';
  int limit = 1'000;
  explicit Words(int n)
      : first{n}, second(n) {
    first += '}';
  }
  bool operator[](int i) const { return i; }
};
template <class Shape, class Fn = void (*)()>
__global__ __launch_bounds__(kThreads, min(1, 2)) void kernel(
    const Params p) {
  const auto inner = [&](int i) {
    if (i) { i = 0; }
    return R"(})";
  };
  inner(1);
}
auto later() -> int;
}  // namespace claa::cuda
"""


def test_functions_of_cpp_are_counted_by_their_braces():
    assert list(cpp_functions(CPP)) == [
        Function("Words", 11, 4),
        Function("operator[]", 15, 1),
        Function("kernel", 17, 9),
    ]


PYTHON = '''
def outer(x):
    """One line.

    More.
    """

    def inner():
        return x

    return inner
'''


def test_functions_of_python_are_counted_without_their_docstrings():
    assert list(python_functions(PYTHON)) == [Function("outer", 2, 6), Function("inner", 8, 2)]
