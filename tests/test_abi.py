"""The shipped libraries need from torch its stable C functions alone, and export nothing."""

import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

import claa_ops

# Names as the linker sees them: a C++ function of a torch namespace, a CUDA runtime function.
UNSTABLE = re.compile(r"_Z\w*?(?<!\d)(2at|3c10|5torch|6caffe2)\d\w+")
CUDA_RUNTIME = re.compile(r"(__)?cu(da)?[A-Z]\w*")
STABLE = re.compile(r"(aoti_torch|torch)_\w+")
# The linker's marks, and weak copies of tables of the C++ standard library.
HARMLESS = re.compile(r"_init|_fini|_edata|_end|__bss_start|_Z(T[ISV]|ZN|N)K?St\w+")
# torch has no other function that needs a GPU build of it and that we call.
CUDA_SHIMS = {"aoti_torch_get_current_cuda_stream"}

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
    return {line.split()[-1].split("@")[0] for line in listing.splitlines()}


def test_the_library_is_where_the_package_looks_for_it():
    assert claa_ops.__all__, "importing claa_ops loads it"
    assert [path.name for path in LIBRARIES][:1] == ["libclaa_ops.so"]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
class TestLibrary:
    def test_needs_no_unstable_torch_symbol(self, library):
        assert not {name for name in symbols(library, "--undefined-only") if UNSTABLE.match(name)}

    def test_needs_the_stable_ones(self, library):
        """So the test above did not pass because the listing was empty."""
        stable = {name for name in symbols(library, "--undefined-only") if STABLE.fullmatch(name)}
        assert stable
        of_gpu_torch = {name for name in stable if re.search("cuda_|_cuda(?!$)", name)}
        assert of_gpu_torch <= CUDA_SHIMS

    def test_brings_its_own_cuda_runtime(self, library):
        """torch's may be of another major version, or absent."""
        wanted = symbols(library, "--undefined-only")
        assert not {name for name in wanted if CUDA_RUNTIME.fullmatch(name)}

    def test_exports_nothing_of_ours(self, library):
        """Ops register themselves while the library loads; a name more could clash with torch's."""
        exported = symbols(library, "--defined-only")
        assert not {name for name in exported if not HARMLESS.fullmatch(name)}

    def test_needs_no_python(self, library):
        wanted = symbols(library, "--undefined-only")
        assert not {name for name in wanted if re.fullmatch(r"_?Py[A-Z_]\w*", name)}
