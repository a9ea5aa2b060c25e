"""The functions of a source file and how many lines each takes, for tests/test_layout.py."""

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple


class Function(NamedTuple):
    """A function of a source file. Its first line is that of its header."""

    name: str
    line: int
    lines: int


def python_functions(source: str) -> Iterator[Function]:
    """Every function and method, without its docstring, which is read as a text of its own."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            assert docstring.end_lineno is not None
            lines -= docstring.end_lineno - docstring.lineno + 1
        yield Function(node.name, node.lineno, lines)


# What has braces and may look like code: raw strings, strings, characters, comments, and macros
# with the lines that continue them. A quote after a digit or letter separates digits.
_NO_CODE = re.compile(
    r'R"(\w*)\(.*?\)\1"'
    r'|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9a-zA-Z])'(?:\\.|[^'\\\n])*'"
    r"|//[^\n]*|/\*.*?\*/"
    r"|^[ \t]*\#(?:\\\n|[^\n])*",
    re.DOTALL | re.MULTILINE,
)
_SCOPE = re.compile(r"(?:inline\s+|typedef\s+)*(?:namespace|struct|class|union|enum|extern)\b")


def cpp_functions(source: str) -> Iterator[Function]:
    """Every function with a body, in C++ or CUDA: by its braces, outside of any other function.

    A header is what stands between a brace or semicolon and an opening brace. It is a function's if
    it has parentheses and does not begin a class or a namespace.
    """
    code = _NO_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)
    begin = 0  # of a header
    at = 0
    while (brace := re.compile(r"[{};]").search(code, at)) is not None:
        at = brace.end()
        if brace[0] != "{":
            begin = at
            continue
        header = _without_template(code[begin : brace.start()]).strip()
        if "(" not in header or _SCOPE.match(header):
            if "=" in header:  # a list of values
                at = _after_block(code, brace.start())
            else:
                begin = at
            continue
        at = _after_block(code, brace.start())
        if re.compile(r"\s*[,{]").match(code, at):  # a member that is initialised by braces
            continue
        first = begin + len(code[begin:at]) - len(code[begin:at].lstrip())
        name = re.match(r".*?([~\w]+|operator\W+)\s*\(", _without_attributes(header), re.DOTALL)
        line = code.count("\n", 0, first) + 1
        yield Function(name[1] if name else header, line, code.count("\n", 0, at) + 2 - line)
        begin = at


def _after_block(code: str, brace: int) -> int:
    """After the brace that closes the one at `brace`."""
    depth = 0
    for found in re.compile("[{}]").finditer(code, brace):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return found.end()
    raise ValueError("a brace is not closed")


def _without_template(header: str) -> str:
    """A header without the parameters of its templates, which may begin with ``class``."""
    header = header.strip()
    while re.match(r"template\s*<", header):
        depth = 0
        for found in re.finditer("[<>]", header):
            depth += 1 if found[0] == "<" else -1
            if depth == 0:
                header = header[found.end() :].strip()
                break
        else:
            return header
    return header


def _without_attributes(header: str) -> str:
    return re.sub(
        r"(?:__launch_bounds__|__attribute__|alignas)\s*\((?:[^()]|\([^()]*\))*\)+", "", header
    )
