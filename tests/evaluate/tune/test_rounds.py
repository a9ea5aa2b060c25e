"""The prompts of the search: the same for the same seed, with an answer to force."""

import json

import pytest

from claa_ops.evaluate.tasks import Example
from claa_ops.evaluate.tasks.prompt import PromptCounter
from claa_ops.evaluate.tune.rounds import Rounds, answered, asked, known
from support.tiny_checkpoint import tiny_tokenizer

COUNT = PromptCounter(tiny_tokenizer())


@pytest.fixture
def filler(tmp_path):
    (tmp_path / "a.txt").write_text("Some rain fell. The old cat slept. A door shut twice. " * 9)
    return tmp_path


def rounds(filler, *tasks, seed=0, length=1500, on_problem=pytest.fail):
    return Rounds(tasks, length, seed, filler, COUNT, on_problem)


def test_a_round_has_one_prompt_of_each_task(filler):
    made = rounds(filler, "beyond-keys", "beyond-chain-2", "needle-number")
    first, second, again = made.take(0), made.take(1), made.take(0)
    assert [each.task for each in first] == ["beyond-keys", "beyond-chain-2", "needle-number"]
    assert [each.prompt for each in first] == [each.prompt for each in again]
    assert all(a.prompt != b.prompt for a, b in zip(first, second, strict=True))
    other = rounds(filler, "beyond-keys", seed=1).take(0)
    assert other[0].prompt != first[0].prompt
    assert COUNT.finished(first[0].prompt, first[0].answer_prefix) == 1500


def test_short_prompts_take_turns_in_length(filler):
    made = rounds(filler, "beyond-short", on_problem=lambda problem: None)
    lengths = {each.place["length"] for index in range(4) for each in made.take(index)}
    assert len(lengths) > 1


def test_records_come_one_after_the_other(filler, tmp_path):
    file = tmp_path / "vt.jsonl"
    lines = [json.dumps({"input": f"x is {i}, what is x?", "outputs": [str(i)]}) for i in range(2)]
    file.write_text("\n".join(lines))
    made = rounds(filler, f"ruler:{file}")
    assert [[each.prompt for each in made.take(index)] for index in range(3)] == [
        ["x is 0, what is x?"], ["x is 1, what is x?"], [],
    ]  # fmt: skip


def test_a_single_answer_after_its_beginning_is_known(filler):
    keys, bare = rounds(filler, "beyond-keys", "beyond-keys-bare").take(0)
    assert known(bare) is None
    target = known(keys).target
    assert target == f" {keys.answers[0]}" and f"is {keys.answers[0]}." in keys.prompt
    given = Example(task="t", name="0", prompt="p", target=" x")
    assert known(given) is given


ANSWERS = ("Rome", "12")


def example(prefix):
    def grade(answer):
        return sum(right.lower() in answer.lower() for right in ANSWERS) / 2

    return Example(
        task="t",
        name="0",
        prompt="p",
        answer_prefix=prefix,
        answers=ANSWERS,
        grade=grade,
        max_new_tokens=128,
    )


@pytest.mark.parametrize(
    "said, target",
    [
        ("Rome, and the code is 12. More", "Rome, and the code is 12"),
        ("12 and ROME", "12 and ROME"),
        ("Rome.", None),
        ("", None),
    ],
)
def test_after_a_given_beginning_full_prefills_right_answer_is_the_target(said, target):
    found = answered(example("It is"), said, COUNT)
    assert (found and found.target) == target


@pytest.mark.parametrize(
    "said, longest", [("It is Rome, 12. And more", len("It is Rome, 12") + 8), ("It is Rome.", 64)]
)
def test_where_the_words_are_open_an_answer_is_graded(said, longest):
    found = answered(example(""), said, COUNT)
    assert found.target is None and found.max_new_tokens == longest
    assert found.grade("12 at Rome") == 1
    assert asked(example("")).max_new_tokens == 64
