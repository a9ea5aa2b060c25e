"""The universal wheel works where only torch is installed, from any directory."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = ["csrc", "src", "python", "cmake", "CMakeLists.txt", "pyproject.toml"]
TAG = "py3-none-linux_x86_64.whl"

SCRIPT = """
import pathlib, sys, torch, claa_ops
for path in (claa_ops.__file__, *torch.ops.loaded_libraries):
    assert pathlib.Path(path).is_relative_to(sys.prefix), path
running, scores = torch.tensor([[3.0, 0.0]]), torch.tensor([[[1.0, 5.0], [4.0, 2.0]]])
assert torch.ops.claa.aggregate_scores(running, scores).tolist() == [[4.0, 5.0]]
assert claa_ops.select_topk(scores, 1).tolist() == [[[1], [0]]]
print(claa_ops.__version__)
"""


def newest_source() -> float:
    files = [ROOT / name for name in SOURCES if (ROOT / name).is_file()]
    for folder in (ROOT / name for name in SOURCES if (ROOT / name).is_dir()):
        files += [path for path in folder.rglob("*") if path.is_file()]
    return max(path.stat().st_mtime for path in files if path.suffix not in {".pyc", ".so"})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in dist/ if it is newer than every source, else a new one."""
    for path in (ROOT / "dist").glob(f"*-{TAG}"):
        if path.stat().st_mtime > newest_source():
            return path
    folder = tmp_path_factory.mktemp("dist")
    # Without an index pip does not look for a newer pip, which takes its time without a network.
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps"]
    # A build folder of its own: the editable install's may be in use.
    command += ["--no-build-isolation", "-C", f"build-dir={folder}/build", "-w", str(folder)]
    command.append(str(ROOT))
    subprocess.run(command, check=True, env=os.environ | {"CLAA_UNIVERSAL": "1"})
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_its_name_says_any_python(wheel):
    assert wheel.name.endswith(TAG)


def test_it_holds_the_package_and_nothing_else(files):
    folders = {name.split("/")[0] for name in files}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"claa_ops"}
    assert "claa_ops/lib/libclaa_ops.so" in files


def test_it_holds_no_torch(files):
    libraries = {Path(name).name for name in files if ".so" in name}
    assert libraries <= {"libclaa_ops.so", "libclaa_ops_cuda.so"}


def test_it_holds_no_file_of_one_python_version(files):
    ours = sorted(Path(name).name for name in files)
    assert not [name for name in ours if name.startswith("_C") or "cpython" in name]
    assert not [name for name in ours if name.endswith(".pyc")]


def test_it_works_from_another_directory(wheel, tmp_path):
    """A new environment with the wheel in it, and torch by a path to the running one.

    Its own folder comes before that path, so the claa_ops it imports is the wheel's.
    """
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    (own,) = environment.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(own), str(wheel)], check=True)
    with_torch = Path(torch.__file__).parents[1]
    (own / "torch_of_the_tests.pth").write_text(f"{with_torch}\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "script.py").write_text(SCRIPT)
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    result = subprocess.run(
        [environment / "bin/python", "script.py"],
        cwd=elsewhere,
        env={name: value for name, value in os.environ.items() if name not in hidden},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert wheel.name.split("-")[1] == result.stdout.strip()
