"""The shipped libraries need torch's stable C functions and an old system, and export nothing."""

import ctypes
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest
import torch

import claa_ops

# Names as the linker sees them: a C++ function of a torch namespace, a CUDA runtime function.
UNSTABLE = re.compile(r"_Z\w*?(?<!\d)(2at|3c10|5torch|6caffe2)\d\w+")
CUDA_RUNTIME = re.compile(r"(__)?cu(da)?[A-Z]\w*")
STABLE = re.compile(r"(aoti_torch|torch)_\w+")
# The only function we call that a CPU build of torch lacks.
CUDA_SHIMS = {"aoti_torch_get_current_cuda_stream"}
# What manylinux_2_28 has of each: glibc 2.28, GCC 8.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (8,)}

LIBRARIES = [
    path
    for name in ("libclaa_ops.so", "libclaa_ops_cuda.so")
    if (path := Path(str(resources.files("claa_ops") / "lib" / name))).is_file()
]

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is missing")


def symbols(library: Path, which: str) -> set[str]:
    listing = subprocess.run(
        ["nm", "--dynamic", which, library], check=True, capture_output=True, text=True
    ).stdout
    return {line.split()[-1] for line in listing.splitlines()}


def names(library: Path, which: str) -> set[str]:
    return {symbol.split("@")[0] for symbol in symbols(library, which)}


def versions(library: Path) -> set[tuple[str, tuple[int, ...]]]:
    """The versions it needs of each set of symbols, such as GLIBC."""
    found = (re.search(r"@([A-Z]+)_([\d.]+)$", s) for s in symbols(library, "--undefined-only"))
    return {(m[1], tuple(int(part) for part in m[2].split("."))) for m in found if m}


def test_the_library_is_where_the_package_looks_for_it():
    assert claa_ops.__all__, "importing claa_ops loads it"
    assert [path.name for path in LIBRARIES][:1] == ["libclaa_ops.so"]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
class TestLibrary:
    def test_needs_no_unstable_torch_symbol(self, library):
        assert not {name for name in names(library, "--undefined-only") if UNSTABLE.match(name)}

    def test_needs_the_stable_ones(self, library):
        """So the test above does not pass only because the listing is empty."""
        stable = {name for name in names(library, "--undefined-only") if STABLE.fullmatch(name)}
        assert stable
        of_gpu_torch = {name for name in stable if re.search("cuda_|_cuda(?!$)", name)}
        assert of_gpu_torch <= CUDA_SHIMS

    def test_brings_its_own_cuda_runtime(self, library):
        """torch's may be of another major version, or missing."""
        wanted = names(library, "--undefined-only")
        assert not {name for name in wanted if CUDA_RUNTIME.fullmatch(name)}

    def test_exports_nothing(self, library):
        """Ops register themselves when the library loads; an exported name could clash."""
        assert not names(library, "--defined-only")

    def test_needs_no_newer_system_than_its_tag_says(self, library):
        """cmake/OldGlibc.cmake and src/claa_ops/old_systems.cpp ensure it."""
        needed = versions(library)
        assert {name for name, _ in needed} == set(NEWEST)
        assert not [(name, version) for name, version in needed if version > NEWEST[name]]

    def test_needs_no_python(self, library):
        wanted = names(library, "--undefined-only")
        assert not {name for name in wanted if re.fullmatch(r"_?Py[A-Z_]\w*", name)}


def test_a_refused_argument_is_thrown_by_the_runtime_that_catches_it():
    """A second libstdc++ would leave the process's count of uncaught exceptions at -1."""
    uncaught = ctypes.CDLL("libstdc++.so.6")._ZSt19uncaught_exceptionsv
    with pytest.raises(RuntimeError, match="select_topk: k must be"):
        torch.ops.claa.select_topk(torch.zeros(1, 1, 4), k=99)
    assert uncaught() == 0
