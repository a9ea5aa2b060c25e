"""Every program in examples/ runs, on a tiny model, and says what it is to say."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from claa_ops.cli import app
from claa_ops.selection import PrefillState
from support.tiny_checkpoint import save_tiny_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
Run = Callable[..., list[str]]  # the name and arguments of an example -> the lines it prints

pytestmark = [
    pytest.mark.usefixtures("single_thread"),
    # transformers' new name of the argument, which its releases before do not know.
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a tiny model, whose tokens are bytes, with room for a long text."""
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2**14}))
    AutoTokenizer.from_pretrained(folder, pad_token="</s>").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    def run_example(name: str, *arguments: str) -> list[str]:
        torch.compiler.reset()
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        with torch.inference_mode():
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_example


def test_hugging_face_generate(run, model, monkeypatch):
    lengths = []
    select = PrefillState.select

    def watched(state: PrefillState, layer: int) -> torch.Tensor | None:
        index = select(state, layer)
        lengths.append(state.length)
        return index

    monkeypatch.setattr(PrefillState, "select", watched)
    said = run("hugging_face_generate.py", model, "--layer", "2", "--keep", "0.1")
    pattern = r"(full prefill|CLAA): (12\d\d\d) tokens, the first new one after \S+ s: '.*'"
    full, claa = (re.fullmatch(pattern, line) for line in said)
    length = int(full[2])
    assert (full[1], claa[1]) == ("full prefill", "CLAA")
    assert lengths[-5:] == [length] * 2 + [length // 10] * 3  # after each layer but the last


def test_streaming_chat(run, model):
    lines = run("streaming_chat.py", model, "--question", "What?", "--question", "And why?")
    turns = [line for line in lines if "tokens so far" in line]
    seen = [int(line[1:].partition(" ")[0]) for line in turns]
    assert len(turns) == 2 and seen[1] > seen[0] > 1_000


def test_padded_batch(run, model):
    lines = run("padded_batch.py", model)
    assert [line.partition(":")[0] for line in lines] == ["while", "assert", "lambda"]
    assert all("as alone; the answer is the same" in line for line in lines)


def test_own_model_compiled(run):
    lines = run("own_model_compiled.py")
    assert lines[-1] == "1000 tokens: 250 reach the last layer; caches hold [1000, 250, 250]"


def test_own_method(run, model):
    kept, work, _ = run("own_method.py", model)[:3]
    assert re.fullmatch(r"\d+ of \d+ tokens reach the last layer", kept)
    assert 0 < float(work.split()[0]) < 1


def test_own_method_on_the_command_line(model, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    options = ["--model", model, "--method", "own_method:ValueAware", "--prompt", "word " * 40]
    result = CliRunner().invoke(app, ["generate", *options, "--runs", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["settings"]["method"] == "own_method:ValueAware"


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_aot_inductor(run, tmp_path):
    run("aot_inductor/export.py", str(tmp_path))
    scripts = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # cmake
    for command in (
        ["cmake", "-S", str(EXAMPLES / "aot_inductor"), "-B", str(tmp_path / "build")]
        + [f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", str(tmp_path / "build")],
    ):
        subprocess.run(command, check=True, env=os.environ | {"PATH": scripts})
    said = subprocess.run(
        [tmp_path / "build/select", tmp_path], check=True, capture_output=True, text=True
    )
    assert said.stdout == "308 of 3000 tokens kept, the same bits as in Python\n"


def test_every_example_is_run_and_says_how():
    tests = Path(__file__).read_text()
    examples = sorted(EXAMPLES.rglob("*.py"))
    assert examples
    for path in examples:
        name = str(path.relative_to(EXAMPLES))
        assert f'run("{name}"' in tests, f"no test runs {name}"
        text = path.read_text()
        assert f"python examples/{name}" in text, f"{name} does not say how it is run"
        assert "pip install" in text, f"{name} does not say what it needs"
