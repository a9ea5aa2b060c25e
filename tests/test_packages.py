"""The packages are levels, and arrows point down: no import goes up, not even a lazy one."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python" / "claa_ops"

# Each knows those above it in this list. `prefill` is the public face of two of them; the adapters
# of two libraries, `huggingface` and `vllm`, do not know each other.
LEVELS = ["ops", "selection", "methods", "chat", "vllm", "huggingface", "evaluate", "cli"]
FACES = {"reference": "ops", "prefill": "huggingface", "lm_eval": "evaluate", "info": "huggingface"}
# What everything may use: where the libraries are, and what an extra brings.
COMMON = {"_build_info", "_extras", "_library"}
# The command line starts what it is asked for; the package itself is what users import.
STARTS = {"__init__", "__main__"}


def level_of(part: str) -> int:
    return LEVELS.index(FACES.get(part, part))


def imports(path: Path) -> list[str]:
    """The modules of claa_ops that a file imports anywhere, also where only a checker does."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"relative import in {path}"
    return found


MODULES = {
    str(path.relative_to(PACKAGE)): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0].removesuffix(".py") not in COMMON | STARTS
}


def test_every_package_has_its_level():
    parts = {Path(name).parts[0].removesuffix(".py") for name in MODULES}
    assert parts == {*LEVELS, *FACES}


@pytest.mark.parametrize("name", MODULES)
def test_arrows_point_down(name):
    own = Path(name).parts[0].removesuffix(".py")
    used = {
        module.split(".")[1]
        for module in imports(MODULES[name])
        if module.startswith("claa_ops.") and module.split(".")[1] in {*LEVELS, *FACES}
    }
    above = {part for part in used if level_of(part) > level_of(own)}
    # The face of a level is for users: what lies below it does not need one.
    faces = {part for part in used if part in FACES and level_of(part) == level_of(own)}
    assert not above and (own in FACES or not faces - {"reference"}), (
        f"{name} imports {above | faces}"
    )


@pytest.mark.parametrize("name", MODULES)
def test_only_adapters_and_what_is_above_know_transformers(name):
    if level_of(Path(name).parts[0].removesuffix(".py")) < LEVELS.index("vllm"):
        used = {module.split(".")[0] for module in imports(MODULES[name])}
        assert not used & {"transformers", "tokenizers", "safetensors", "gguf"}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules of which each leads to each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for module in graph[waiting.pop()] - seen:
                seen.add(module)
                waiting.append(module)
        return seen

    reach = {module: reached(module) for module in graph}
    return sorted(
        {
            tuple(
                sorted(
                    other for other in graph if module in reach[other] and other in reach[module]
                )
            )
            for module in graph
            if module in reach[module]
        }
    )


def test_the_only_circle_is_a_method_and_what_it_decides_on():
    names = {
        "claa_ops." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path
        for name, path in MODULES.items()
    }
    graph = {
        name: {used for used in imports(path) if used in names} for name, path in names.items()
    }
    own = {f"claa_ops.selection.{module}" for module in ("layer", "method", "state")}
    assert circles(graph) == [tuple(sorted(own))]
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == [("a", "b")]  # it can find one
