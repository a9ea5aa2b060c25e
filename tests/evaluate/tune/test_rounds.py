"""The prompts of the search: the same for the same seed, with an answer to force."""

import json

import pytest

from claa_ops.evaluate.tasks import Example
from claa_ops.evaluate.tasks.prompt import PromptCounter
from claa_ops.evaluate.tune.rounds import (
    Rounds,
    has_known_answer,
    with_answer,
    with_known_answer,
)
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
    assert has_known_answer(keys) and not has_known_answer(bare)
    target = with_known_answer(keys).target
    assert target == f" {keys.answers[0]}" and f"is {keys.answers[0]}." in keys.prompt
    known = Example(task="t", name="0", prompt="p", target=" x")
    assert with_known_answer(known) is known


@pytest.mark.parametrize(
    "said, target",
    [
        ("It is Rome, and the code is 12. More", "It is Rome, and the code is 12"),
        ("12 and ROME", "12 and ROME"),
        ("It is Rome.", None),
        ("", None),
    ],
)
def test_full_prefills_own_answer_counts_if_it_is_right_and_ends_with_it(said, target):
    answers = ("Rome", "12")

    def grade(answer):
        return sum(right.lower() in answer.lower() for right in answers) / 2

    example = Example(task="t", name="0", prompt="p", answers=answers, grade=grade)
    found = with_answer(example, said)
    assert (found and found.target) == target
