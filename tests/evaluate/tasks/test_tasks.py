"""Prompts: needles where they should be, records of benchmarks in their own formats."""

import importlib.util
import json
import zipfile

import pytest

from claa_ops.evaluate.tasks import TaskSettings, check_task, examples
from claa_ops.evaluate.tasks.needle import filler_sentences
from claa_ops.huggingface.models import InputError
from support.tiny_checkpoint import tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat=False)
harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: claa-ops[evaluate]"
)


def count_tokens(text):
    return len(TOKENIZER(text).input_ids)


def make(*tasks, **settings):
    """All examples, and the problems told of."""
    problems = []
    found = list(examples(tasks, TaskSettings(**settings), count_tokens, problems.append))
    return found, problems


# Needles.


def test_a_needle_grid_has_every_kind_length_and_depth():
    found, _ = make("needle", lengths=[3000, 5000], depths=[0.0, 0.5, 1.0], prompts=2)
    assert len(found) == 3 * 2 * 3 * 2
    assert len({(example.task, example.name) for example in found}) == len(found)
    for example in found:
        prompt = example.prompt + example.answer_prefix + example.target
        length = example.place["length"]
        assert 0.8 * length < count_tokens(prompt) <= length
        assert example.prompt.count(example.fact) == 1
        assert example.fact == f"{example.answer_prefix}{example.target}."
        text = example.prompt.split("\n\n")[1]
        assert abs(text.index(example.fact) / len(text) - example.place["depth"]) < 0.2


def test_needles_depend_on_the_seed_and_nothing_else():
    grid = {"lengths": [2000], "depths": [0.5], "prompts": 3}
    first, again = make("needle", seed=1, **grid)[0], make("needle", seed=1, **grid)[0]
    other = make("needle", seed=2, **grid)[0]
    assert first == again
    assert len({example.prompt for example in first + other}) == 2 * len(first)


def test_one_of_four_keys_is_asked_for():
    for example in make("needle-four-keys", lengths=[2000], prompts=5)[0]:
        codes = [part.split(".")[0] for part in example.prompt.split("The access code for the ")]
        assert len({code for code in codes if " is " in code}) == 4
        assert example.prompt.count(example.target) == 1


def test_filler_comes_from_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text("Third one!", encoding="utf-8")
    (tmp_path / "a.txt").write_text("First one.\n Second\none? ", encoding="utf-8")
    (tmp_path / "c.md").write_text("Not this.", encoding="utf-8")
    assert filler_sentences(tmp_path) == ["First one.", "Second one?", "Third one!"]
    example = make("needle-number", lengths=[600], depths=[0.5], prompts=1, filler=tmp_path)[0][0]
    assert example.prompt.count("Second one?") > 3  # repeated as often as it takes
    for bad in (tmp_path / "none", tmp_path / "c.md"):
        with pytest.raises(InputError, match="must be a folder with text in .txt files"):
            filler_sentences(bad)


def test_filler_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("First one.", encoding="utf-8-sig")
    assert filler_sentences(tmp_path) == ["First one."]
    (tmp_path / "b.txt").write_bytes("Caf\u00e9.".encode("latin-1"))
    told = r"the filler .*b.txt must be UTF-8 text, got byte 0xe9 at offset 3"
    with pytest.raises(InputError, match=told):
        filler_sentences(tmp_path)


def test_a_length_without_room_is_left_out():
    found, problems = make("needle-number", "needle-four-keys", lengths=[50, 300, 3000], prompts=1)
    lengths = [(example.task, example.place["length"]) for example in found]
    assert list(dict.fromkeys(lengths)) == [
        ("needle-number", 300),
        ("needle-number", 3000),
        ("needle-four-keys", 3000),
    ]
    for problem, (kind, length) in zip(
        problems, [("number", 50), ("four-keys", 50), ("four-keys", 300)], strict=True
    ):
        assert problem.startswith(f"needle-{kind}, {length} tokens: a needle prompt must have more")


# Records.


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def ruler(**fields):
    return {"index": 0, "input": "Where is it?", "outputs": ["Ab", "cd"], "length": 3} | fields


def test_ruler(tmp_path):
    file = write(
        tmp_path / "niah_multivalue" / "validation.jsonl", ruler(), ruler(answer_prefix="A:")
    )
    (first, second), problems = make(f"ruler:{file}")
    assert not problems
    assert (first.task, first.prompt, first.max_new_tokens) == (
        "ruler/niah_multivalue",
        "Where is it?",
        128,
    )
    assert (first.answer_prefix, second.answer_prefix) == ("", "A:")
    assert [first.grade(text) for text in ("AB, CD", "it is ab", "none")] == [1.0, 0.5, 0.0]


def test_ruler_questions_accept_any_answer(tmp_path):
    file = write(tmp_path / "records.jsonl", ruler())
    (example,), _ = make(f"ruler/qa_1:{file}")
    assert example.max_new_tokens == 32
    assert [example.grade(text) for text in ("the cd", "none")] == [1.0, 0.0]
    with pytest.raises(InputError, match="unknown ruler task 'nia': did you mean 'niah'"):
        make(f"ruler/nia:{file}")


def longbench(**fields):
    record = {
        "input": "Who?",
        "context": "A story.",
        "answers": ["the old fox", "fox"],
        "length": 2,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
        "_id": "1",
    }
    return record | fields


@harness
def test_longbench(tmp_path):
    records = [
        longbench(),
        longbench(dataset="trec", all_classes=["Place", "Person"], answers=["Person"]),
        longbench(dataset="gov_report_e", answers=["a b c d"]),
        longbench(dataset="repobench-p", answers=["return x"]),
    ]
    found, problems = make(f"longbench:{write(tmp_path / 'records.jsonl', *records)}")
    assert not problems
    question, classes, summary, code = found
    assert [example.task.split("/")[1] for example in found] == [
        "hotpotqa",
        "trec",
        "gov_report",
        "repobench-p",
    ]
    assert "A story." in question.prompt and question.prompt.count("Who?") == 1
    assert [example.max_new_tokens for example in found] == [32, 64, 512, 64]
    assert [example.chat for example in found] == [None, False, None, False]
    assert classes.stop == ("\n",) and question.stop == ()
    assert question.grade("The fox!") == 1.0 and question.grade("a wolf") == 0.0
    assert classes.grade("Person") == 1.0 and classes.grade("Place") == 0.0
    assert summary.grade("a b c d") == pytest.approx(1.0) and 0 < summary.grade("a b x y") < 1
    assert code.grade("return x") == 1.0 and 0 < code.grade("return y") < 1
    with pytest.raises(
        InputError, match="unknown longbench task 'hotpot': did you mean 'hotpotqa'"
    ):
        make(f"longbench/hotpot:{tmp_path / 'records.jsonl'}")


@harness
def test_infinitebench(tmp_path):
    record = {"id": 0, "context": "noise 71432 noise", "input": "What is the pass key?"}
    key = write(tmp_path / "passkey.jsonl", record | {"answer": ["71432"], "options": []})
    book = write(tmp_path / "longbook_qa_eng.jsonl", record | {"answer": "Mr Fox", "options": []})
    (passkey,), _ = make(f"infinitebench:{key}")
    assert passkey.task == "infinitebench/passkey" and passkey.stop == ("\n",)
    assert "noise 71432 noise" in passkey.prompt and passkey.prompt.endswith(record["input"])
    assert passkey.grade(" 71432.") == 1.0 and passkey.grade("71433") == 0.0
    (answer,), _ = make(f"infinitebench:{book}")
    assert answer.task == "infinitebench/longbook_qa_en" and answer.grade("mr fox") == 1.0


def test_malformed_records_are_named_and_the_rest_still_comes(tmp_path):
    file = write(
        tmp_path / "records.jsonl",
        ruler(),
        "{half",
        "[1]",
        {"input": "no outputs"},
        ruler(outputs=[]),
        ruler(input=3),
        "",
        ruler(outputs=["last"]),
    )
    found, problems = make(f"ruler:{file}")
    assert [example.name for example in found] == ["records.jsonl, line 1", "records.jsonl, line 8"]
    for problem, (line, reason) in zip(
        problems,
        [
            (2, "Expecting property name"),
            (3, "expected a JSON object, got '[1]"),
            (4, "expected a field 'outputs', this record has none"),
            (5, "outputs must be a list that is not empty, got []"),
            (6, "input must be a text, got 3"),
        ],
        strict=True,
    ):
        assert problem.startswith(f"{file}, line {line}: {reason}")


INFINITE = {"id": 0, "input": "Who?", "context": "A story.", "answer": ["Ann"], "options": []}
CHOICE = INFINITE | {"options": ["Ann", "Bob", "Eve", "Joe"]}


def without(record, field):
    return {name: value for name, value in record.items() if name != field}


@harness
@pytest.mark.parametrize(
    "task, good, bad",
    [
        ("ruler/niah", ruler(), ruler(outputs=["Ab", ""])),
        ("ruler/qa", ruler(), ruler(outputs=[" "])),
        ("ruler/niah", ruler(), ruler(outputs=[None])),
        ("ruler/niah", ruler(), ruler(outputs=None)),
        ("ruler/niah", ruler(), ruler(outputs="Ab")),
        ("ruler/niah", ruler(), ruler(outputs=[["Ab"]])),
        ("ruler/niah", ruler(), ruler(outputs=[True])),
        ("ruler/niah", ruler(), ruler(outputs=[float("nan")])),
        ("ruler/niah", ruler(), ruler(input=None)),
        ("ruler/niah", ruler(), ruler(input=" ")),
        ("ruler/niah", ruler(), ruler(answer_prefix=3)),
        ("longbench", longbench(), longbench(answers=[None, "Ann"])),
        ("longbench", longbench(), longbench(answers=[])),
        ("longbench", longbench(), longbench(answers=[""])),
        ("longbench", longbench(), longbench(answers="Ann")),
        ("longbench", longbench(), longbench(context=None)),
        ("longbench", longbench(), longbench(context="")),
        ("longbench", longbench(), longbench(input=None)),
        ("longbench", longbench(), without(longbench(), "input")),
        ("longbench", longbench(), longbench(dataset="hotpot")),
        ("longbench", longbench(), longbench(dataset=None)),
        ("longbench", longbench(), longbench(dataset="trec")),
        ("longbench", longbench(), without(longbench(dataset="trec"), "all_classes")),
        ("longbench", longbench(), longbench(dataset="lsht", all_classes=["", "Ann"])),
        ("longbench", longbench(), longbench(dataset="trec", all_classes=["Food", "City"])),
        # A right answer that this task's metric cannot read.
        ("longbench", longbench(), longbench(dataset="passage_retrieval_en", answers=["three"])),
        ("infinitebench/longbook_qa_en", INFINITE, INFINITE | {"answer": None}),
        ("infinitebench/longbook_qa_en", INFINITE, INFINITE | {"answer": [None]}),
        ("infinitebench/longdialogue_qa_en", INFINITE, INFINITE | {"answer": ""}),
        ("infinitebench/passkey", INFINITE, INFINITE | {"answer": {}}),
        ("infinitebench/longbook_choice_en", CHOICE, CHOICE | {"options": None}),
        ("infinitebench/code_debug", CHOICE, CHOICE | {"options": [1, None]}),
        # A right answer that is no option, or none that the prompt shows.
        ("infinitebench/code_debug", CHOICE, CHOICE | {"answer": ["no option"]}),
        ("infinitebench/longbook_choice_en", CHOICE, CHOICE | {"options": [*"1234", "Ann"]}),
    ],
)
def test_what_cannot_be_graded_is_left_out_before_a_model_runs(task, good, bad, tmp_path):
    file = write(tmp_path / "records.jsonl", bad, good)
    found, problems = make(f"{task}:{file}")
    assert [example.source for example in found] == [f"{file}, line 2"]
    (problem,) = problems
    assert problem.startswith(f"{file}, line 1: ")


@harness
def test_a_metric_that_cannot_read_the_right_answers_is_named(tmp_path):
    record = longbench(dataset="passage_retrieval_en", answers=["three"])
    _, (problem,) = make(f"longbench:{write(tmp_path / 'a.jsonl', record)}")
    told = "the metric of longbench/passage_retrieval_en cannot read the right answers ['three']: "
    assert told in problem


@harness
@pytest.mark.parametrize("number, right", [(1945, "1945"), (2.5, "2.5"), (0, "0")])
@pytest.mark.parametrize(
    "task, record, field",
    [
        ("ruler/qa", ruler(), "outputs"),
        ("longbench", longbench(), "answers"),
        ("infinitebench/longdialogue_qa_en", INFINITE, "answer"),
    ],
)
def test_a_number_is_graded_as_its_text(task, record, field, number, right, tmp_path):
    file = write(tmp_path / "records.jsonl", record | {field: [number]})
    (example,), problems = make(f"{task}:{file}")
    assert not problems
    assert [example.grade(answer) for answer in (right, "7")] == [1.0, 0.0]


def test_null_is_as_good_as_no_prefix(tmp_path):
    (example,), problems = make(f"ruler:{write(tmp_path / 'a.jsonl', ruler(answer_prefix=None))}")
    assert not problems and example.answer_prefix == ""


@pytest.mark.parametrize("field", ["input", "outputs", "answer_prefix"])
@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda text: text.encode("latin-1"), "byte 0xe9 at offset 3"),
        (lambda text: text.replace("é", "\\ud83d").encode(), r"half surrogate U\+D83D at offset 3"),
    ],
)
def test_text_that_is_no_text_is_refused_and_never_replaced(field, spoil, told, tmp_path):
    record = ruler(**{field: ["café"] if field == "outputs" else "café"})
    line = json.dumps(record, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(spoil(line) + b"\n" + line.encode())
    (spoilt, whole), _ = make(f"ruler:{tmp_path / 'a.jsonl'}")
    assert "\ufffd" not in repr(spoilt)
    with pytest.raises(InputError, match=f"must be UTF-8 text, got {told}"):
        spoilt.check()
    whole.check()


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(ruler()) + "\r\n" + json.dumps(ruler()), encoding="utf-8-sig")
    found, problems = make(f"ruler:{file}")
    assert len(found) == 2 and not problems
    file.write_text(json.dumps(ruler()), encoding="utf-16")
    _, (problem,) = make(f"ruler:{file}")
    assert "got byte 0xff at offset 0" in problem


def test_files_of_one_name_have_records_of_their_own(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder / "x.jsonl", ruler(input=folder))
    tasks = [f"ruler:{tmp_path / folder / 'x.jsonl'}" for folder in ("a", "b", "a")]
    found, _ = make(*tasks)
    assert [example.prompt for example in found] == ["a", "b"]
    assert len({(example.task, example.name) for example in found}) == 2
    once, twice = make("needle-number")[0], make("needle", "needle-number")[0]
    assert len(twice) == 3 * len(once)


def test_folders_and_limits(tmp_path):
    for kind in ("vt", "cwe"):
        write(tmp_path / kind / "validation.jsonl", *[ruler()] * 3)
    found, _ = make(f"ruler:{tmp_path}", limit=2)
    assert [example.task for example in found] == ["ruler/cwe"] * 2 + ["ruler/vt"] * 2
    assert [example.max_new_tokens for example in found] == [120] * 2 + [30] * 2


@pytest.mark.parametrize(
    "task, message",
    [
        ("needles", "unknown task 'needles': .* did you mean 'needle'"),
        ("longbnch:x", "unknown task 'longbnch': .* did you mean 'longbench'"),
        ("longbench", "the task longbench needs its records: longbench:FILE"),
        ("needle:x.jsonl", "the task needle takes no records"),
        ("ruler:hf://datasets/owner", "records on the hub are hf://datasets/OWNER/NAME/FILE, got"),
    ],
)
def test_bad_tasks_are_refused(task, message):
    with pytest.raises(InputError, match=message):
        check_task(task)


def test_records_in_an_archive(tmp_path):
    """LongBench lies on the hub as one."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in ("data/vt.jsonl", "data/cwe.jsonl", "README.md"):
            archive.writestr(name, json.dumps(ruler()) + "\n{half\n")
    found, problems = make(f"ruler:{tmp_path / 'data.zip'}")
    assert [example.task for example in found] == ["ruler/cwe", "ruler/vt"]
    assert problems[0].startswith(f"{tmp_path}/data.zip/data/cwe.jsonl, line 2: Expecting")
    (tmp_path / "bad.zip").write_text("no archive")
    with pytest.raises(InputError, match="cannot read .*bad.zip: File is not a zip file"):
        make(f"ruler:{tmp_path / 'bad.zip'}")


@pytest.mark.parametrize("kind", ["damaged", "encrypted", "unknown compression"])
def test_a_member_that_cannot_be_read_leaves_the_others(kind, tmp_path):
    file = tmp_path / "data.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", json.dumps(ruler(input="say five")))
        archive.writestr("b.jsonl", json.dumps(ruler(input="say four")))
    content = bytearray(file.read_bytes())
    entry = content.find(b"PK\x01\x02")
    if kind == "damaged":
        content = content.replace(b"say five", b"say fire", 1)
    elif kind == "encrypted":
        content[6] |= 1
        content[entry + 8] |= 1
    else:
        content[8] = content[entry + 10] = 97
    file.write_bytes(bytes(content))
    found, (problem,) = make(f"ruler:{file}")
    assert [example.source for example in found] == [f"{file}/b.jsonl, line 1"]
    assert problem.startswith(f"cannot read {file}/a.jsonl: ")


def test_a_file_that_cannot_be_read_leaves_the_others(tmp_path):
    write(tmp_path / "b.jsonl", ruler())
    (tmp_path / "a.jsonl").mkdir()
    found, (problem,) = make(f"ruler:{tmp_path}")
    assert len(found) == 1 and problem.startswith(f"cannot read {tmp_path}/a.jsonl: ")


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_a_file_without_records_is_told(content, tmp_path):
    write(tmp_path / "b.jsonl", ruler())
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    found, (problem,) = make(f"ruler:{tmp_path}")
    assert len(found) == 1 and problem == f"cannot read {tmp_path}/a.jsonl: it has no records"


def test_suffixes_count_in_capitals_too(tmp_path):
    write(tmp_path / "folder" / "A.JSONL", ruler())
    with zipfile.ZipFile(tmp_path / "DATA.ZIP", "w") as archive:
        archive.write(tmp_path / "folder" / "A.JSONL", "A.JSONL")
    for source in ("folder", "folder/A.JSONL", "DATA.ZIP"):
        assert len(make(f"ruler:{tmp_path / source}")[0]) == 1


@pytest.mark.parametrize("at, value", [(6, 99), (9, 8)])
def test_an_archive_whose_directory_is_damaged_is_refused(at, value, tmp_path):
    """The version it needs, and a name said to be UTF-8."""
    file = tmp_path / "data.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", json.dumps(ruler()))
    content = bytearray(file.read_bytes())
    entry = content.find(b"PK\x01\x02")
    content[entry + at] = value
    content[entry + 46] = 0xFF
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match="cannot read .*data.zip"):
        make(f"ruler:{file}")


def test_missing_records_are_refused(tmp_path):
    with pytest.raises(InputError, match="there are no records at .*missing.jsonl"):
        make(f"ruler:{tmp_path / 'missing.jsonl'}")
    with pytest.raises(InputError, match="has no .jsonl files"):
        make(f"ruler:{tmp_path}")
