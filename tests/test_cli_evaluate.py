"""``claa-ops evaluate``: what it writes, how it continues after a kill, and what it refuses."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from claa_ops.cli import app
from claa_ops.evaluate.tasks.answer import force
from claa_ops.methods import METHODS
from support.tiny_checkpoint import LAYERS

RUNNER = CliRunner()
pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def filler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filler")
    (folder / "a.txt").write_text("Some rain fell. The old cat slept. A door shut twice.")
    return str(folder)


def arguments(checkpoint, filler, out, *more: str) -> list[str]:
    needles = ("--task", "needle-number", "--filler", filler, "--lengths", "460")
    common = ("evaluate", "--model", checkpoint, "--device", "cpu", "--keep", "0.3")
    return [*common, *needles, "--depths", "2", "--prompts", "1", "--out", str(out), *more]


def evaluate(*args):
    return RUNNER.invoke(app, arguments(*args))


def untimed(value):
    """Results without the seconds of their machine."""
    if isinstance(value, dict):
        timed = {"seconds", "full_seconds", "time"}
        return {name: untimed(part) for name, part in value.items() if name not in timed}
    return list(map(untimed, value)) if isinstance(value, list) else value


def test_everything_is_written(checkpoint, filler, tmp_path):
    methods = ("--method", "claa", "--method", "random", "--layer", "1-2", "--baseline", "random")
    result = evaluate(checkpoint, filler, tmp_path, *methods)
    assert result.exit_code == 0, result.output
    names = {"records.jsonl", "results.json", "table.md", "frontier.png", "needles.png"}
    assert {file.name for file in tmp_path.iterdir()} == names
    facts = json.loads((tmp_path / "results.json").read_text())
    assert facts["settings"]["settings"]["seed"] == 0
    assert set(facts["versions"]) == {"claa_ops", "torch", "transformers", "python"}
    assert facts["machine"]["device"] == "cpu" and facts["problems"] == []
    assert len(facts["records"]) == 2 * 5 and len(facts["table"]) == 5
    for row in facts["table"][1:]:
        assert row["work"] == pytest.approx(
            (row["layer"] + 1 + 0.3 * (5 - row["layer"])) / 6, abs=2e-3
        )
        assert 0 < row["seconds"] and 0 < row["time"] and 0 <= row["whole_facts"] <= row["facts"]
    for record in facts["records"]:
        assert len(record["facts"]) == len(record["scores"]) == 1 and record["full_seconds"] > 0
    for part in ("against random", "share of full", "claa", "Written"):
        assert part in result.stdout
    again = evaluate(checkpoint, filler, tmp_path, *methods, "--json")
    assert json.loads(again.stdout) == facts


def test_several_models(checkpoint, filler, tmp_path):
    other = tmp_path / "other model"
    shutil.copytree(checkpoint, other)
    result = evaluate(checkpoint, filler, tmp_path / "out", "--model", str(other))
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "out" / "results.json").read_text())
    first, second = (
        [row for row in facts["table"] if row["model"] == model]
        for model in (checkpoint, str(other))
    )
    assert [row["accuracy"] for row in first] == [row["accuracy"] for row in second]
    assert (tmp_path / "out" / "2-other-model" / "frontier.png").exists()
    assert result.stdout.lstrip().startswith("model")


def test_after_a_kill_it_continues_where_it_was(checkpoint, filler, tmp_path):
    grid = ("--method", "claa", "--method", "fastkv", "--layer", "0-4", "--prompts", "6")
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    command = [sys.executable, "-c", "from claa_ops.cli import app; app()"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *arguments(checkpoint, filler, killed, *grid)], env=environment
    )
    journal = killed / "records.jsonl"
    deadline = time.monotonic() + 300
    while not journal.exists() or journal.read_bytes().count(b"\n") < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    before = journal.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert not (killed / "results.json").exists()
    with journal.open("ab") as file:  # a line that was being written
        file.write(b'{"key": {"model": "')

    assert evaluate(checkpoint, filler, killed, *grid).exit_code == 0
    assert evaluate(checkpoint, filler, unbroken, *grid).exit_code == 0
    assert journal.read_bytes().startswith(whole)
    lines = [
        [untimed(json.loads(line)) for line in file.read_text().splitlines()]
        for file in (journal, unbroken / "records.jsonl")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 2 * 6 * 11
    found = [json.loads((folder / "results.json").read_text()) for folder in (killed, unbroken)]
    assert untimed(found[0]) == untimed(found[1])


def test_one_evaluation_at_a_time_writes_into_a_folder(checkpoint, filler, tmp_path):
    """The second of two processes is refused, and the first continues undisturbed."""
    grid = ("--method", "claa", "--method", "fastkv", "--layer", "0-4", "--prompts", "6")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from claa_ops.cli import app; app()"]
    command += arguments(checkpoint, filler, tmp_path, *grid)
    journal = tmp_path / "records.jsonl"
    first = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 300
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)  # so that it is not done before the second begins
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2 and "Traceback" not in second.stderr
    told = " ".join(second.stderr.split())
    assert f"claa-ops: another process is writing into the folder {tmp_path}: wait" in told
    assert first.wait(timeout=300) == 0
    lines = journal.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 2 * 6 * 11
    assert all(json.loads(line)["result"] for line in lines)


def test_an_interrupt_leaves_a_table_and_says_how_to_continue(
    checkpoint, filler, tmp_path, monkeypatch
):
    answers, whole = [], force

    def interrupted(*given):
        answers.append(1)
        if len(answers) == 3:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr("claa_ops.evaluate.grid.records.force", interrupted)
    result = evaluate(checkpoint, filler, tmp_path)
    told = f"stopped: finished records are in {tmp_path}, the same command continues"
    assert result.exit_code == 130 and told in result.stderr
    facts = json.loads((tmp_path / "results.json").read_text())
    assert len(facts["records"]) == 2 and not facts["finished"]
    assert "against full" in result.stdout and (tmp_path / "table.md").exists()
    assert evaluate(checkpoint, filler, tmp_path).exit_code == 0
    assert json.loads((tmp_path / "results.json").read_text())["finished"]

    monkeypatch.setattr(
        "claa_ops.evaluate.grid.run.load_model",
        lambda *given: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    result = evaluate(checkpoint, filler, tmp_path / "nothing yet")
    assert result.exit_code == 130 and "stopped: finished" in result.stderr


def test_a_time_limit_ends_it_cleanly(checkpoint, filler, tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 60))  # a minute passes between any two looks at it
    with monkeypatch.context() as patch:
        patch.setattr("claa_ops.evaluate.grid.run.time.monotonic", lambda: next(clock))
        result = evaluate(checkpoint, filler, tmp_path, "--time-limit", "5")
    assert result.exit_code == 0, result.output
    told = f"the time limit is reached: finished records are in {tmp_path}, the same command"
    assert told in " ".join(result.stderr.split())
    facts = json.loads((tmp_path / "results.json").read_text())
    assert 0 < len(facts["records"]) < 4 and not facts["finished"]
    assert (tmp_path / "frontier.png").exists() and "Written: " in result.stdout
    assert evaluate(checkpoint, filler, tmp_path, "--time-limit", "60").exit_code == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["records"]) == 4


def test_batches_change_no_table(checkpoint, filler, tmp_path):
    methods = ("--method", "claa", "--method", "random", "--prompts", "3")
    for size in ("1", "4"):
        result = evaluate(checkpoint, filler, tmp_path / size, *methods, "--batch-size", size)
        assert result.exit_code == 0, result.output
    tables = [(tmp_path / size / "table.md").read_text() for size in ("1", "4")]
    tables = [re.sub(r"[\d.]+ \([\d.]+ m?s\)", "TIME", table) for table in tables]
    assert tables[0] == tables[1] and tables[0].count("TIME") == 3


def test_suites_at_once(checkpoint, filler, tmp_path):
    command = ["evaluate", "--model", checkpoint, "--device", "cpu", "--filler", filler]
    command += ["--suite", "ruler", "--suite", "beyond", "--method", "claa", "--keep", "0.3"]
    command += ["--prompts", "2", "--lengths", "470", "--batch-size", "3", "--min-full", "0"]
    result = RUNNER.invoke(app, [*command, "--no-chat", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "results.json").read_text())
    places = {(row["task"], row["length"]) for row in facts["table"]}
    assert {("beyond-short", None), ("beyond-keys", 470), (None, None)} <= places
    # The tiny model's tokens are bytes: most tasks have no room in its context.
    assert all("at least" in problem or "may follow" in problem for problem in facts["problems"])
    again = RUNNER.invoke(app, [*command, "--no-chat", "--out", str(tmp_path), "--json"])
    assert json.loads(again.stdout) == facts  # all from the journal


def test_a_malformed_record_is_told_and_the_rest_runs(checkpoint, filler, tmp_path):
    file = tmp_path / "vt.jsonl"
    good = json.dumps({"input": "x is 1, what is x?", "outputs": ["1"]})
    file.write_text(f"{good}\n{{half\n{good}\n")
    result = evaluate(checkpoint, filler, tmp_path / "out", "--task", f"ruler:{file}")
    assert result.exit_code == 0, result.output
    assert f"left out: {file}, line 2: Expecting" in " ".join(result.stdout.split())
    facts = json.loads((tmp_path / "out" / "results.json").read_text())
    assert sum(record["task"] == "ruler/vt" for record in facts["records"]) == 2 * 2
    assert len(facts["problems"]) == 1


@pytest.fixture
def suite(checkpoint, filler, tmp_path):
    """Runs the suite on one prompt of each kind; the facts, and all that was printed."""

    def run_suite(*more):
        options = ("--suite", "claa-paper", "--filler", filler, "--depths", "1", "--device", "cpu")
        command = ["evaluate", "--model", checkpoint, *options, "--out", str(tmp_path), *more]
        result = RUNNER.invoke(app, command)
        facts = tmp_path / "results.json"
        return result, json.loads(facts.read_text()) if result.exit_code == 0 else None

    return run_suite


def test_a_suite_brings_methods_rates_and_needles(suite, checkpoint):
    result, facts = suite()  # of bytes, half of the context has room for one kind of needle
    assert result.exit_code == 0, result.output
    assert {record["task"] for record in facts["records"]} == {"needle-number"}
    assert sum("a needle prompt must have more than" in told for told in facts["problems"]) == 2
    result, facts = suite("--lengths", "490")
    assert result.exit_code == 0, result.output
    told = "left out: speculative: it needs a draft, a smaller model with the same tokenizer"
    assert told in result.stderr and told in " ".join(result.stdout.split())
    everything = {method.__name__ for method in METHODS.values()}
    methods = {record["method"] for record in facts["records"]}
    assert methods == everything - {"SpeculativePrefill"}
    rows = {(row["label"], row["keep"]): row for row in facts["table"]}
    for label in ("claa", "asl:passes=2", "fastkv-deferral", "fastkv@claa", "oracle"):
        assert {keep for name, keep in rows if name == label} == {0.1, 0.2, 0.4}
    shares = {cell: row["cache"] for cell, row in rows.items()}
    assert shares["fastkv", 0.2] < shares["claa", 0.2]
    assert shares["fastkv@claa", 0.2] == pytest.approx(shares["claa", 0.2], rel=0.05)
    tasks = {record["task"] for record in facts["records"]}
    assert tasks == {"needle-number", "needle-sentence", "needle-four-keys"}

    result, facts = suite("--lengths", "490", "--draft", checkpoint)
    assert facts["problems"] == [] and "left out" not in result.output
    assert {record["method"] for record in facts["records"]} == everything


def test_other_options_count_beside_a_suite(suite, tmp_path):
    records = tmp_path / "vt.jsonl"
    records.write_text(json.dumps({"input": "x is 1, what is x?", "outputs": ["1"]}))
    chosen = ("--method", "claa", "--keep", "0.3", "--task", f"ruler:{records}")
    result, facts = suite("--lengths", "490", *chosen)
    assert result.exit_code == 0 and "left out" not in result.output
    assert {(row["label"], row["keep"]) for row in facts["table"]} == {
        ("full", None),
        ("claa", 0.3),
    }
    assert len(facts["records"]) == 2 * (3 + 1)


def test_a_draft_needs_the_tokenizer_of_the_model(checkpoint, filler, tmp_path):
    methods = ("--method", "speculative", "--draft")
    result = evaluate(checkpoint, filler, tmp_path / "same", *methods, checkpoint)
    assert result.exit_code == 0, result.output
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "draft")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path / "draft")
    result = evaluate(checkpoint, filler, tmp_path / "other", *methods, str(tmp_path / "draft"))
    refuse("draft .*: .* must have the tokenizer of the model, got one in which 1 of", result)


def refuse(message: str, result) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert re.search("claa-ops: " + message, " ".join(result.stderr.split()))
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method", "clas"], "unknown method 'clas': did you mean 'claa'?"),
        (["--task", "needles"], "unknown task 'needles': expected .*; did you mean 'needle'?"),
        (["--suite", "claapaper"], "unknown suite 'claapaper': did you mean 'claa-paper'?"),
        (["--layer", str(LAYERS)], rf"CLAA: layer must be in \[0, {LAYERS - 2}\]"),
        (
            ["--layer", "0-99999999999"],
            "layer must be layers such as 10,15,20-22, got 0-99999999999",
        ),
        (["--layer", "a"], "layer must be layers such as"),
        (["--keep", "0"], r"keep must be a rate in \(0, 1\]"),
        (["--keep", "1.5"], r"keep must be a rate in \(0, 1\]"),
        (["--schedule", "3"], "schedule must be LAYER:KEEP"),
        (["--baseline", "fastkv"], "the baseline must be full or one of the methods claa"),
        (["--task", "ruler:no/such.jsonl"], "there are no records at no/such.jsonl"),
        (["--filler", "no/such/folder"], "the filler no/such/folder must be a folder with text"),
        (["--lengths", "x"], "lengths must be numbers such as 1000,2000, got x"),
        (["--depths", "0,50"], "depths must be how many, such as 5, or a list"),
        (["--depths", "120%"], "depths must be how many"),
        (["--lengths", "5000"], "nothing was evaluated: needles of 5,000 tokens: .* may have 512"),
        (["--lengths", "9999999"], "nothing was evaluated: needles of 9,999,999 tokens: "),
        (["--max-length", "400"], "nothing was evaluated: needles of 460 tokens: .* may have 400"),
        (["--schedule", "1:10%,3:50%"], "schedule must keep no more .*, got 0.5 after 0.1"),
        (["--schedule", "1:10,3:50"], "schedule must keep no more .*, got 50 after 10"),
        (["--model", "/no/such/model"], "model /no/such/model does not exist"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (
            ["--draft", "x"],
            "a draft is for the methods speculative and selective-context, got claa",
        ),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, filler, tmp_path, options, message):
    refuse(message, evaluate(checkpoint, filler, tmp_path, *options))


def test_a_length_beyond_the_model_is_refused_before_any_text_is_made(
    checkpoint, filler, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        "claa_ops.evaluate.tasks.needle_examples",
        lambda *arguments, lengths, **options: asked.extend(lengths) or iter(()),
    )
    result = evaluate(checkpoint, filler, tmp_path, "--lengths", "9999999")
    refuse("nothing was evaluated: needles of 9,999,999 tokens", result)
    assert asked == []


def test_lengths_that_fit_are_evaluated_beside_those_that_do_not(checkpoint, filler, tmp_path):
    result = evaluate(checkpoint, filler, tmp_path, "--lengths", "460,5000", "--json")
    facts = json.loads(result.stdout)
    assert {record["place"]["length"] for record in facts["records"]} == {460}
    (problem,) = facts["problems"]
    assert problem.startswith("needles of 5,000 tokens: ")


@pytest.mark.parametrize(
    "options, unused",
    [
        (["--method", "full", "--layer", "2"], ["layer", "keep"]),
        (["--method", "claa:layer=1", "--layer", "2"], ["layer"]),
        (["--method", "pyramidinfer"], ["keep"]),
        (["--method", "streaming", "--schedule", "1:50%"], ["schedule"]),
        (["--method", "full", "--keep-kv", "1.0"], ["keep", "keep_kv"]),
        (["--method", "full", "--method", "claa", "--layer", "2"], []),
    ],
)
def test_an_option_that_no_method_takes_is_said(checkpoint, filler, tmp_path, options, unused):
    result = evaluate(checkpoint, filler, tmp_path, *options)
    assert result.exit_code == 0, result.output
    remarks = json.loads((tmp_path / "results.json").read_text())["remarks"]
    assert [remark.split(" was not used")[0] for remark in remarks] == unused
    for option in unused:
        assert f"note: {option} was not used: it sets the" in result.stderr


def test_a_window_longer_than_the_prompts_is_said(checkpoint, filler, tmp_path):
    methods = ("--method", "claa", "--method", "claa:window=999999")
    result = evaluate(checkpoint, filler, tmp_path, *methods)
    assert result.exit_code == 0, result.output
    told = "note: claa:window=999999: the window of 999,999 tokens is longer than 2 of the prompts"
    assert told in " ".join(result.stdout.split())
    assert len(json.loads((tmp_path / "results.json").read_text())["remarks"]) == 1


def test_a_file_in_the_folder_s_place_is_a_sentence(checkpoint, filler, tmp_path):
    (tmp_path / "out").write_text("a file")
    result = evaluate(checkpoint, filler, tmp_path / "out")
    refuse(f".*{re.escape(str(tmp_path / 'out'))}: File exists|.*must be a folder", result)
    assert "records.jsonl" not in result.stderr


def test_files_have_the_user_s_mode(checkpoint, filler, tmp_path):
    before = os.umask(0o027)
    try:
        assert evaluate(checkpoint, filler, tmp_path).exit_code == 0
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_a_file_of_bad_records_alone_is_no_success(checkpoint, filler, tmp_path):
    """Whoever reads the JSON learns all reasons; the exit code says that there is no result."""
    records = tmp_path / "vt.jsonl"
    bad = json.dumps({"input": "x is 1, what is x?", "outputs": [""]})
    records.write_text(f"{bad}\n" * 30)
    command = ["evaluate", "--model", checkpoint, "--device", "cpu", "--task", f"ruler:{records}"]
    result = RUNNER.invoke(app, [*command, "--out", str(tmp_path / "out"), "--json"])
    facts = json.loads(result.stdout)
    assert facts["records"] == [] and len(facts["problems"]) == 30
    told = f"claa-ops: nothing was evaluated: {records}, line 1: outputs must hold texts"
    assert result.exit_code == 2 and told in " ".join(result.stderr.split())
    good = json.dumps({"input": "x is 1, what is x?", "outputs": ["1"]})
    records.write_text(f"{bad}\n" * 30 + good)
    result = RUNNER.invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "left out: 10 more" in result.stdout


def test_a_full_disk_is_one_sentence_and_loses_nothing(checkpoint, filler, tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def fill_up(descriptor):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fill_up)
        result = evaluate(checkpoint, filler, tmp_path)
    refuse("cannot write .*: No space left on device; its 3 finished records are safe", result)
    assert (tmp_path / "records.jsonl").read_bytes().count(b"\n") == 3

    def no_space(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", no_space)
        result = evaluate(checkpoint, filler, tmp_path)
    refuse("cannot write the results .*: No space left .*; all 4 finished records are safe", result)
    assert {file.name for file in tmp_path.iterdir()} == {"records.jsonl"}
    assert evaluate(checkpoint, filler, tmp_path).exit_code == 0
