"""Records: computed once, equal to a prefill of their own, and summed up as they should be."""

import re
from dataclasses import replace

import pytest
import torch
from tokenizers import Regex, decoders

from claa_ops.evaluate.grid.cells import Cell, make_cells
from claa_ops.evaluate.grid.journal import Journal
from claa_ops.evaluate.grid.picture import plot_frontier, plot_needles
from claa_ops.evaluate.grid.records import Record, evaluate_model
from claa_ops.evaluate.grid.table import as_markdown, summarise
from claa_ops.evaluate.spec import MethodSpec
from claa_ops.evaluate.tasks import Example, TaskSettings, examples
from claa_ops.evaluate.tasks.answer import decode_until, force
from claa_ops.huggingface.replay import RecordedPrefill
from claa_ops.huggingface.turns import ask_again
from claa_ops.huggingface.work import count_work
from claa_ops.prefill import attach, decode, prefill
from support.own_methods import Mass, Norms
from support.tiny_checkpoint import CONTEXT, LAYERS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
METHODS = ("claa", "fastkv", "random", "gemfilter", "oracle:max_new_tokens=3")


@pytest.fixture(scope="module")
def model():
    return attach(tiny_model())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    def refuse(problem):
        raise AssertionError(problem)

    filler = tmp_path_factory.mktemp("filler")
    (filler / "a.txt").write_text("Some rain fell. The old cat slept. A door shut twice.")
    settings = TaskSettings(lengths=[460], depths=[0.0, 1.0], prompts=1, filler=filler)
    needles = list(
        examples(["needle"], settings, lambda text: len(TOKENIZER(text).input_ids), refuse)
    )
    open_end = Example(
        task="open",
        name="0",
        prompt="word " * 60,
        grade=lambda answer: len(answer) / 10,
        max_new_tokens=5,
    )
    return [*needles, open_end]


def grid(*methods, **settings):
    return make_cells([MethodSpec.parse(text) for text in methods], LAYERS, **settings)


def evaluate(model, folder, cells, prompts, **options):
    def refuse(problem):
        raise AssertionError(problem)

    options = {"tokenizer": TOKENIZER, "on_problem": refuse} | options
    with Journal(folder / "records.jsonl") as journal:
        records = evaluate_model(
            model=model, name="tiny", examples=prompts, cells=cells, journal=journal, **options
        )
    assert records.end == "all"
    return records.found


def untimed(record):
    assert 0 < record.seconds and 0 < record.full_seconds
    return replace(record, seconds=0, full_seconds=0)


def kept(folder):
    """How many answers have been computed so far."""
    return (folder / "records.jsonl").read_bytes().count(b"\n")


def test_records_are_those_of_prefills_of_their_own(model, tmp_path, prompts):
    cells = grid(*METHODS, layers=[1, 3], keeps=[0.3])
    records = evaluate(model, tmp_path, cells, prompts)
    assert len(records) == len(cells) * 7
    for record in records:
        if record.task == "open":
            assert record.score == len(record.answers[0]) / 10 and record.logprob is None
            continue
        assert record.score in (0.0, 1.0) and record.logprob < 0 and record.answers == ()
        if record.cell.label == "random":
            continue  # its seed is the prompt's own
        ids = torch.zeros(1, record.tokens, dtype=torch.int64)  # work depends on the length alone
        prefilled = prefill(model, ids, record.cell.method)
        assert record.cache_bytes == prefilled.cache.nbytes()
        if record.cell.label != "oracle:max_new_tokens=3":
            assert record.work == pytest.approx(prefilled.work_share)
            full = count_work(model, [record.tokens] * LAYERS)
            done = prefilled.work.linear + prefilled.work.attention
            assert record.operations == pytest.approx(done / (full.linear + full.attention))


def test_nothing_is_computed_twice(model, tmp_path, monkeypatch, prompts):
    first = evaluate(model, tmp_path, grid("claa", keeps=[0.3]), prompts)
    totals, advances = [], []
    counting = {"on_total": totals.append, "on_record": lambda: advances.append(1)}
    more = evaluate(model, tmp_path, grid("claa", keeps=[0.3, 0.5]), prompts, **counting)
    assert totals == [21] and len(advances) == 21 and kept(tmp_path) == 21
    assert [record for record in more if record.cell.keep != 0.5] == first
    monkeypatch.setattr("claa_ops.evaluate.grid.records.RecordedPrefill", None)
    assert evaluate(model, tmp_path, grid("claa", keeps=[0.3, 0.5]), prompts) == more


def test_other_settings_are_other_records(model, tmp_path, prompts):
    cells, prompts = grid("claa", keeps=[0.3]), prompts[-1:]
    evaluate(model, tmp_path, cells, prompts)
    computed = []
    for others, options in [
        (prompts, {"chat": False}),
        ([replace(prompts[0], prompt="other " * 30)], {}),
        ([replace(prompts[0], answer_prefix="so")], {}),
        ([replace(prompts[0], max_new_tokens=6)], {}),
        ([replace(prompts[0], stop=("w",))], {}),
        ([replace(prompts[0], target="x", grade=None)], {}),
        ([replace(prompts[0], grade=lambda answer: 0.5)], {}),
        (prompts, {"max_length": 1000}),
        (prompts, {}),
    ]:
        before = kept(tmp_path)
        evaluate(model, tmp_path, cells, others, **options)
        computed.append(kept(tmp_path) - before)
    assert computed == [2] * 6 + [0] * 3


def test_grades_are_made_anew(model, tmp_path, prompts):
    """Answers are kept: a corrected right answer and a mended metric count at once."""
    cells = grid("claa", keeps=[0.3])
    for score in (1.0, 0.25):
        graded = [replace(prompts[-1], grade=lambda answer, score=score: score)]
        records = evaluate(model, tmp_path, cells, graded)
        assert [record.score for record in records] == [score, score]
    assert kept(tmp_path) == 2


@torch.no_grad()
def _retrain(model):
    model.model.layers[3].mlp.up_proj.weight[7, 11] += 1e-3


@torch.no_grad()
def _swap(model):
    """Two rows change places: no sum tells."""
    rows = model.lm_head.weight
    rows[[10, 200]] = rows[[200, 10]]


def _end_elsewhere(model):
    model.generation_config.eos_token_id = 3


def _other_rotary(model):
    model.config.rope_parameters["rope_theta"] = 5000.0


@pytest.mark.parametrize("change", [_retrain, _swap, _end_elsewhere, _other_rotary])
def test_another_model_of_the_same_name_is_computed(change, tmp_path, prompts):
    cells = grid("claa", keeps=[0.3])
    evaluate(attach(tiny_model()), tmp_path, cells, prompts[-1:])
    evaluate(attach(tiny_model()), tmp_path, cells, prompts[-1:])
    assert kept(tmp_path) == 2  # a copy of it is not
    other = tiny_model()
    change(other)
    evaluate(attach(other), tmp_path, cells, prompts[-1:])
    assert kept(tmp_path) == 4


def test_a_kept_answer_depends_on_how_tokens_are_decoded(model, tmp_path, prompts):
    """The same token ids, another text."""
    cells = grid("claa", keeps=[0.3])
    other = tiny_tokenizer()
    other.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(Regex("."), "!")]
    )
    answers = [
        evaluate(model, tmp_path, cells, prompts[-1:], tokenizer=tokenizer)[0].answers[0]
        for tokenizer in (tiny_tokenizer(), tiny_tokenizer(), other)
    ]
    assert kept(tmp_path) == 4
    assert answers[0] == answers[1] and set(answers[2]) <= {"!", "\n"}


def test_a_result_depends_on_the_draft(model, tmp_path, prompts):
    for change in (lambda draft: None, lambda draft: None, _retrain):
        draft = tiny_model()
        change(draft)
        spec = MethodSpec.parse("speculative").with_settings(draft=draft)
        evaluate(model, tmp_path, make_cells([spec], LAYERS, keeps=[0.3]), prompts[-1:])
    assert kept(tmp_path) == 1 + 2  # full prefill, and two drafts


# Batches.

BATCHED = (
    *METHODS,
    "claa:zscore=true:first_full=0",
    "snapkv",
    "asl",
    "asl:tau=null",
    "speculative:look_ahead=2",
    "speculative:look_ahead=2:chunk=null",
    "pyramidinfer:least=16",
    "lazyllm",
    "promptdistill",
    "uniprefill:top_p=0.5:block=8:num_sinks=8:window=16",
    "selective-context:window=8",
    "claa:equal_cache=true:first_full=4",  # which refuses these prompts
)


@pytest.fixture(scope="module")
def uneven(prompts):
    """Prompts of different lengths, with targets and without."""
    cut = [
        replace(one, name=str(index), prompt=one.prompt[17 * index :], fact=None)
        for index, one in enumerate(prompts[:5])
    ]
    graded = [
        replace(prompts[-1], name=str(words), prompt="word " * words, max_new_tokens=words % 7 + 1)
        for words in (60, 47, 66)
    ]
    return [cut[0], graded[0], *cut[1:], *graded[1:]]


@pytest.mark.parametrize("size", [2, 3, 100])
def test_a_record_of_a_batch_is_that_of_its_prompt_alone(model, tmp_path, uneven, size):
    """Also where a method cannot serve a batch, or serves some of its prompts."""
    cells, problems = grid(*BATCHED, keeps=[0.3]), ([], [])
    alone, together = (
        evaluate(model, tmp_path / str(n), cells, uneven, batch_size=n, on_problem=told.append)
        for n, told in zip((1, size), problems, strict=True)
    )
    assert sorted(problems[0]) == sorted(problems[1]) and len(problems[0]) == len(uneven)
    assert len(alone) == len(uneven) * (len(cells) - 1)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.work == pytest.approx(theirs.work, rel=1e-12)
        assert ours.operations == pytest.approx(theirs.operations, rel=1e-12)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert untimed(replace(ours, work=0, operations=0, logprob=0)) == untimed(
            replace(theirs, work=0, operations=0, logprob=0)
        )


def test_a_batch_is_prefilled_once(model, tmp_path, uneven, monkeypatch):
    rows = []
    make = RecordedPrefill.__init__

    def counting(self, model, ids, *rest, **options):
        rows.append(len(ids))
        make(self, model, ids, *rest, **options)

    monkeypatch.setattr(RecordedPrefill, "__init__", counting)
    evaluate(model, tmp_path, grid(*METHODS, keeps=[0.3]), uneven, batch_size=4)
    assert rows == [4, 1, 3]


def test_a_batch_that_fails_is_answered_prompt_by_prompt(model, tmp_path, uneven, monkeypatch):
    expected = evaluate(model, tmp_path / "alone", grid("claa"), uneven)
    prefill_batch = RecordedPrefill.run

    def run(self, method, protect=None):
        if len(self.input_ids) > 1:
            raise torch.OutOfMemoryError("of a GPU")
        return prefill_batch(self, method)

    monkeypatch.setattr(RecordedPrefill, "run", run)
    found = evaluate(model, tmp_path / "batch", grid("claa"), uneven, batch_size=4)
    assert [one.score for one in found] == [one.score for one in expected]


def test_what_a_batch_lacks_is_computed_and_nothing_else(model, tmp_path, uneven):
    evaluate(model, tmp_path, grid("claa", keeps=[0.3]), uneven[::2])
    before = kept(tmp_path)
    found = evaluate(model, tmp_path, grid("claa", keeps=[0.3]), uneven, batch_size=8)
    assert kept(tmp_path) == len(found) == 2 * len(uneven) and before == 2 * len(uneven[::2])


# Two questions about a prompt.


def ask_twice(name, prompt, question, *, new_tokens=5, **values):
    """The questions' facts are the first two words of the prompt."""
    graded = {"task": "two", "name": name, "grade": lambda answer: len(answer) / 10}
    words = prompt.split()
    begin = len(words[0]) + 1
    second = Example(
        **graded, prompt=question, answer_prefix="So", max_new_tokens=3,
        facts=((begin, begin + len(words[1])),),
    )  # fmt: skip
    return Example(
        **graded, prompt=prompt, max_new_tokens=new_tokens, then=second,
        facts=((0, len(words[0])),), **values,
    )  # fmt: skip


@pytest.fixture(scope="module")
def twice():
    return [
        ask_twice("0", "first second " + "word " * 40, "and the other?"),
        ask_twice("1", "one two " + "word " * 52, "and?", new_tokens=2, answer_prefix="It is"),
        ask_twice("2", "word " * 40, "and what else does it say?", new_tokens=7),
    ]


def test_the_second_question_goes_on_from_the_first_one_s_cache(model, tmp_path, twice):
    cells = grid(*METHODS[:4], layers=[1, 3], keeps=[0.3])
    for found in evaluate(model, tmp_path, cells, twice):
        example = next(one for one in twice if one.name == found.name)
        method = found.cell.method.for_prompt(f"two {found.name}")
        text = f"<s>{example.prompt}</s><s>{example.answer_prefix}"
        ids = torch.tensor([TOKENIZER(text, add_special_tokens=False).input_ids])
        prefilled = prefill(model, ids, method)
        said = decode(model, prefilled, max_new_tokens=example.max_new_tokens)[0]
        said = said[said != 257]
        turn = TOKENIZER(f"</s><s>{example.then.prompt}</s><s>So", add_special_tokens=False)
        prefilled = ask_again(model, prefilled, [said], [torch.tensor(turn.input_ids)])
        (second,) = decode_until(model, TOKENIZER, prefilled, [3], [()])
        assert found.answers == (TOKENIZER.decode(said), second)
        assert found.scores == tuple(len(answer) / 10 for answer in found.answers)
        assert found.score == pytest.approx(sum(found.scores) / 2)


def test_facts_are_those_of_both_questions(model, tmp_path, twice):
    for found in evaluate(model, tmp_path, grid(*METHODS[:4], keeps=[0.3]), twice[:2]):
        example = next(one for one in twice if one.name == found.name)
        if found.cell.label == "full":
            assert found.facts == (1.0, 1.0)
            continue
        text = f"<s>{example.prompt}</s><s>{example.answer_prefix}"
        ids = torch.tensor([TOKENIZER(text, add_special_tokens=False).input_ids])
        method = found.cell.method.for_prompt(f"two {found.name}")
        kept = set(prefill(model, ids, method).positions[0].tolist())
        assert found.kept == len(kept)
        # A token is a byte, and one comes before the prompt.
        spans = [range(*example.facts[0]), range(*example.then.facts[0])]
        shares = [sum(place + 1 in kept for place in span) / len(span) for span in spans]
        assert found.facts == pytest.approx(shares, abs=1e-4)


def test_two_questions_of_a_batch_are_those_of_each_prompt_alone(model, tmp_path, twice):
    cells = grid(*BATCHED[:-1], keeps=[0.3])
    prompts = [*twice, *(replace(one, name=f"{one.name} alone", then=None) for one in twice)]
    told = {"on_problem": lambda problem: None}  # some methods refuse so short prompts
    alone = evaluate(model, tmp_path / "1", cells, prompts, **told)
    found = evaluate(model, tmp_path / "2", cells, prompts, batch_size=3, **told)
    assert len(found) > 60 and {len(one.answers) for one in found} == {1, 2}
    for ours, theirs in zip(found, alone, strict=True):
        assert untimed(replace(ours, work=0, operations=0)) == untimed(
            replace(theirs, work=0, operations=0)
        )


def test_a_second_question_is_part_of_the_key(model, tmp_path, twice):
    cells, one = grid("claa", keeps=[0.3]), twice[0]
    computed = []
    for other in (
        one,
        replace(one, then=None),
        replace(one, then=replace(one.then, prompt="and now?")),
        replace(one, then=replace(one.then, max_new_tokens=2)),
        replace(one, then=replace(one.then, facts=())),
        replace(one, then=replace(one.then, grade=lambda answer: 0.5)),
    ):
        before = (
            len((tmp_path / "records.jsonl").read_bytes()) and kept(tmp_path) if computed else 0
        )
        found = evaluate(model, tmp_path, cells, [other])
        computed.append(kept(tmp_path) - before)
    assert computed == [2] * 5 + [0] and [one.scores[1] for one in found] == [0.5, 0.5]


def test_both_questions_need_a_grade_and_room(model, tmp_path, twice):
    problems, one = [], twice[0]
    bad = [
        replace(one, name="a", then=replace(one.then, grade=None)),
        replace(one, name="b", then=replace(one.then, max_new_tokens=CONTEXT)),
        replace(one, name="c", then=replace(one.then, prompt="word " * 99)),
    ]
    assert evaluate(model, tmp_path, grid("claa"), bad, on_problem=problems.append) == []
    assert "two questions about a prompt must both have a grade" in problems[0]
    assert all("context holds 512" in problem for problem in problems[1:]) and len(problems) == 3


def test_a_method_that_reads_hidden_states_shares_the_prefill(model, tmp_path, uneven, monkeypatch):
    cells = [*grid("claa", keeps=[0.3]), Cell.of("norms", Norms(keep=0.3, layer=2))]
    alone = evaluate(model, tmp_path / "1", cells, uneven)
    computed = []
    layer = model.model.layers[0].mlp
    handle = layer.register_forward_hook(lambda *given: computed.append(given[1][0].shape[1]))
    found = evaluate(model, tmp_path / "2", cells, uneven, batch_size=8)
    handle.remove()
    assert sum(tokens > 40 for tokens in computed) == 2  # batches: with targets, and without
    assert [one.answers for one in found] == [one.answers for one in alone]
    assert [one.facts for one in found] == [one.facts for one in alone]


def test_prompts_of_one_length_that_keep_different_numbers_are_one_batch(
    model, tmp_path, prompts, monkeypatch
):
    cells = [*grid("claa", keeps=[0.3]), Cell.of("mass", Mass(layer=2, share=0.6))]
    texts = ["word and " * 30, "some rain " * 27, "a door or " * 27]
    alike = [replace(prompts[-1], name=text, prompt=text) for text in texts]
    alone = evaluate(model, tmp_path / "1", cells, alike)
    assert len({one.tokens for one in alone}) == 1 and len({one.kept for one in alone}) > 3
    rows, run = [], RecordedPrefill.run
    monkeypatch.setattr(
        RecordedPrefill, "run", lambda self, *x: rows.append(len(self.input_ids)) or run(self, *x)
    )
    found = evaluate(model, tmp_path / "2", cells, alike, batch_size=3)
    assert rows == [3, 3, 3]
    for ours, theirs in zip(found, alone, strict=True):
        assert ours.work == pytest.approx(theirs.work, rel=1e-12)
        assert ours.operations == pytest.approx(theirs.operations, rel=1e-12)
        assert untimed(replace(ours, work=0, operations=0)) == untimed(
            replace(theirs, work=0, operations=0)
        )


# What a caller knows and protects.


def with_tools(index, text):
    """A prompt whose first sentence is protected, and decides the answer with the last."""
    known = "These are the tools. " * 3
    prompt = f"{known}{text * 15}Now call one."
    return Example(
        task="open",
        name=str(index),
        prompt=prompt,
        grade=lambda answer: len(answer) / 10,
        max_new_tokens=5,
        facts=((0, len(known)), (prompt.index("Now"), len(prompt))),
        protected=((0, len(known)),),
    )


@pytest.mark.parametrize("lengths", ["even", "uneven"])
def test_what_is_protected_is_kept_whole_by_every_method(model, tmp_path, lengths):
    texts = ["Rain fell. ", "Cats slept. " if lengths == "uneven" else "Snow fell. "]
    prompts = [with_tools(index, text) for index, text in enumerate(texts)]
    (folder := tmp_path / "together").mkdir()
    cells = grid("claa:window=4", "hops:keep_least=0:least=8", "gemfilter", layers=[1], keeps=[0.1])
    plain = evaluate(model, tmp_path, cells, prompts)
    before = kept(tmp_path)
    found = evaluate(model, tmp_path, cells, prompts, protect=True)
    assert kept(tmp_path) == 2 * before  # these are other answers
    together = evaluate(model, folder, cells, prompts, protect=True, batch_size=2)
    for record, other, one in zip(found, plain, together, strict=True):
        if record.cell.label != "full":
            assert record.facts[0] == 1.0 > other.facts[0]
            assert record.kept > other.kept and record.work > other.work
        assert (one.facts, one.kept) == (record.facts, record.kept)
        assert one.work == pytest.approx(record.work)


def test_prompts_without_anything_known_are_as_before(model, tmp_path, prompts):
    first = evaluate(model, tmp_path, grid("claa", keeps=[0.3]), prompts)
    before = kept(tmp_path)
    assert evaluate(model, tmp_path, grid("claa", keeps=[0.3]), prompts, protect=True) == first
    assert kept(tmp_path) == before


# What ends the work before all is done.


@pytest.mark.parametrize("size", [1, 3])
def test_a_time_limit_keeps_what_is_finished(model, tmp_path, uneven, size):
    cells, asked = grid("claa", "fastkv", keeps=[0.3]), []
    with Journal(tmp_path / "records.jsonl") as journal:
        common = (model, TOKENIZER, "tiny", uneven, cells, journal)
        limited = evaluate_model(
            *common,
            batch_size=size,
            is_time_up=lambda: asked.append(1) or len(asked) > 6,
            on_problem=pytest.fail,
        )
        assert limited.end == "time" and 0 < len(limited.found) == len(journal) < 24
        whole = evaluate_model(*common, batch_size=size, on_problem=pytest.fail)
        again = evaluate_model(*common, is_time_up=lambda: True, on_problem=pytest.fail)
    assert whole.end == again.end == "all" and again.found == whole.found
    assert set(map(repr, limited.found)) <= set(map(repr, whole.found))


def test_an_interrupt_keeps_what_is_finished(model, tmp_path, uneven, monkeypatch):
    answers = []

    def interrupted(*arguments):
        answers.append(1)
        if len(answers) > 2:
            raise KeyboardInterrupt
        return force(*arguments)

    monkeypatch.setattr("claa_ops.evaluate.grid.records.force", interrupted)
    with Journal(tmp_path / "records.jsonl") as journal:
        cells = grid("claa", "fastkv", keeps=[0.3])
        common = (model, TOKENIZER, "tiny", uneven, cells, journal)
        records = evaluate_model(*common, on_problem=pytest.fail)
    assert records.end == "interrupt"
    assert [one.cell.label for one in records.found] == ["full", "claa"]


# Whatever a record raises, the others run.


class Unforeseen(Exception):
    pass


def fail(*arguments, **options):
    raise Unforeseen("in two\nlines")


def test_a_metric_that_raises_is_told(model, tmp_path, prompts):
    problems = []
    bad = replace(prompts[-1], name="1", source="x.jsonl, line 7", grade=fail)
    records = evaluate(
        model, tmp_path, grid("claa"), [bad, prompts[-1]], on_problem=problems.append
    )
    assert [record.name for record in records] == ["0", "0"]
    told = [f"x.jsonl, line 7, {label}: Unforeseen: in two" for label in ("full", "claa")]
    assert problems == told


@pytest.mark.parametrize("score", [float("nan"), -0.5, 2.0])
def test_a_score_that_cannot_be_is_told(model, tmp_path, prompts, score):
    problems = []
    bad = replace(prompts[-1], grade=lambda answer: score)
    assert evaluate(model, tmp_path, grid("claa"), [bad], on_problem=problems.append) == []
    assert all(f"a score in [0, 1], got {score}" in problem for problem in problems)


@pytest.mark.parametrize(
    "part, labels",
    [
        ("encode_prompt", [""]),
        ("RecordedPrefill", [""]),
        ("decode_answers", [", full", ", claa"]),
    ],
)
def test_every_step_of_a_record_is_guarded(part, labels, model, tmp_path, prompts, monkeypatch):
    module = "encoded" if part == "encode_prompt" else "records"
    place = f"claa_ops.evaluate.grid.{module}.{part}"
    problems, cells = [], grid("claa")
    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        assert evaluate(model, tmp_path, cells, prompts[-1:], on_problem=problems.append) == []
    assert problems == [f"open, 0{label}: Unforeseen: in two" for label in labels]
    assert kept(tmp_path) == 0
    assert len(evaluate(model, tmp_path, cells, prompts[-1:])) == 2
    with monkeypatch.context() as patch:
        patch.setattr(place, lambda *arguments, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(AssertionError, match="interrupt"):
            evaluate(model, tmp_path / "other", cells, prompts[-1:])


@pytest.mark.parametrize(
    "template, told",
    [
        ("{{ raise_exception('a system turn is needed') }}", "a system turn is needed"),
        ("{% for x in %}", "Expected an expression"),
        ("{{ messages[7].content }}", ""),
    ],
)
def test_a_template_that_raises_is_told(model, tmp_path, prompts, monkeypatch, template, told):
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    problems = []
    found = [prompts[-1], replace(prompts[-1], name="1", chat=False)]
    records = evaluate(model, tmp_path, grid("claa"), found, on_problem=problems.append)
    assert [record.name for record in records] == ["1", "1"]
    (problem,) = problems
    assert problem.startswith("open, 0: ") and told in problem


def test_a_prompt_is_never_cut_to_nothing(model, tmp_path, prompts):
    problems = []
    for new_tokens in (CONTEXT - 20, CONTEXT, 2 * CONTEXT):
        long = replace(prompts[-1], prompt="word " * 200, may_cut=True, max_new_tokens=new_tokens)
        told = {"on_problem": problems.append}
        assert evaluate(model, tmp_path, grid("claa"), [long], **told) == []
    assert len(problems) == 3
    for problem in problems:
        assert re.search("has 1,000 tokens, of which [01] would be left beside", problem)


def test_a_cut_through_a_character_leaves_none_of_it(model, tmp_path, prompts, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "claa_ops.evaluate.grid.records.RecordedPrefill",
        lambda model, ids, **options: seen.append(TOKENIZER.decode(ids[0])) or fail(),
    )
    for letters in range(4):
        text = "a" * letters + "東京" * 200
        long = replace(prompts[-1], prompt=text, may_cut=True)
        evaluate(model, tmp_path, grid("claa"), [long], on_problem=lambda problem: None)
    assert len(seen) == 4 and not any("\ufffd" in text for text in seen)


def test_random_draws_differ_between_prompts_but_not_between_runs(model, tmp_path, prompts):
    cells = grid("random", keeps=[0.2])
    prompts = [replace(prompts[0], name=str(index)) for index in range(4)]
    records = evaluate(model, tmp_path / "a", cells, prompts)
    draws = {record.logprob for record in records if record.cell.label == "random"}
    assert len(draws) == 4
    again = evaluate(model, tmp_path / "b", cells, prompts)
    assert list(map(untimed, again)) == list(map(untimed, records))


def test_long_prompts_are_cut_in_the_middle_or_left_out(model, tmp_path, prompts):
    long = replace(prompts[-1], prompt="begin " + "word " * 200 + "end")
    problems = []
    told = {"on_problem": problems.append}
    cells = grid("claa")
    records = evaluate(model, tmp_path, cells, [replace(long, may_cut=True)], **told)
    assert not problems and {record.tokens for record in records} == {CONTEXT - 5 - 16}
    records = evaluate(
        model, tmp_path, cells, [replace(long, may_cut=True)], max_length=100, **told
    )
    assert not problems and {record.tokens for record in records} == {100 - 16}
    assert evaluate(model, tmp_path, cells, [replace(long, name="1")], **told) == []
    (problem,) = problems
    assert problem.startswith("open, 1: the prompt has 1,012 tokens and 5 may follow")


def test_a_method_that_cannot_serve_a_prompt_leaves_the_others(model, tmp_path, prompts):
    problems = []
    cells = grid("claa:equal_cache=true:first_full=4", "fastkv", keeps=[0.1])
    records = evaluate(model, tmp_path, cells, prompts[:1], on_problem=problems.append)
    assert [record.cell.label for record in records] == ["full", "fastkv"]
    (problem,) = problems
    assert "equal_cache must leave each layer its window" in problem


# Summaries, of records made up here.


def record(cell, task, name, score, **values):
    defaults = {
        "place": {},
        "logprob": None,
        "work": 0.5,
        "operations": 0.5,
        "cache_bytes": 100,
        "seconds": 0.25,
        "full_seconds": 0.5,
        "tokens": 10,
        "kept": 5,
        "facts": (),
        "answers": (),
    }
    return Record("tiny", task, name, cell, scores=(score,), **(defaults | values))


def scored(cell, scores, **values):
    return [
        record(cell, task, str(name), score, **values)
        for task, row in scores.items()
        for name, score in enumerate(row)
    ]


def test_rows_average_tasks_and_pair_differences():
    full, first, second = grid("claa", keeps=[0.1, 0.2])
    records = scored(full, {"a": [1, 1, 1, 1], "b": [1, 0]}, work=1.0, cache_bytes=200)
    records += scored(first, {"a": [1, 1, 1, 0], "b": [0, 0]}, seconds=0.1)
    records += scored(second, {"a": [0, 1, 1, 1], "b": [0, 1]}, cache_bytes=150)
    every = summarise(records)
    rows = [row for row in every if row.is_total]
    assert [row.accuracy.mean for row in rows] == [0.75, 0.375, 0.625]
    assert [row.accuracy.mean for row in every if row.task == "a"] == [1.0, 0.75, 0.75]
    assert len(every) == 9 and {row.prompts for row in every if row.task == "b"} == {2}
    assert [row.cache for row in rows] == [1.0, 0.5, 0.75]
    assert [row.time for row in rows] == [0.5, 0.2, 0.5]
    assert rows[0].difference is None
    assert rows[1].difference.mean == pytest.approx((-1 / 4 - 1 / 2) / 2)
    # Of the second, what it wins and loses in task b cancels, but is not certain.
    assert rows[2].difference.mean == pytest.approx((-1 / 4 + 0) / 2)
    assert rows[2].difference.low < rows[2].difference.mean < rows[2].difference.high
    first, _, second = as_markdown(rows, "full").partition("| full |")
    assert first.startswith(
        "| method | layer | keep | work | time | cache | accuracy | against full | share of full | "
        "worst task |\n"
    )
    assert second.startswith(" - | - | 1.00 | 0.50 (250.0 ms) | 1.00 (0.0 MiB) | 0.75 ")
    both = as_markdown(every, "full").split("\n\n")
    assert len(both) == 2 and both[0].strip() == as_markdown(rows, "full").strip()
    assert both[1].startswith("| task | method | layer | keep | work |")
    assert [line.split(" | ")[0] for line in both[1].splitlines()[2:]] == ["| a"] * 3 + ["| b"] * 3


def test_a_share_of_full_is_over_the_tasks_that_full_prefill_can_do():
    full, cell = grid("claa")
    records = scored(full, {"a": [1, 1], "b": [1, 0, 1, 0], "c": [0, 0, 0, 1], "d": [0, 0]})
    records += scored(cell, {"a": [1, 0], "b": [1, 0, 1, 0], "c": [1, 1, 1, 1], "d": [1, 1]})
    whole, row = (row for row in summarise(records) if row.is_total)
    assert (row.relative.mean, row.worst, row.worst_task) == (0.75, 0.5, "a")
    assert row.relative.low < 0.75 < row.relative.high <= 1.0
    assert (whole.relative.low, whole.relative.high, whole.worst) == (1.0, 1.0, 1.0)
    _, row = (row for row in summarise(records, min_full=0.0) if row.is_total)
    assert row.relative.mean == pytest.approx((0.5 + 1 + 4) / 3)  # d has no share at all
    hopeless = [row for row in summarise(records) if row.task == "d"]
    assert [(row.relative, row.worst, row.worst_task) for row in hopeless] == [
        (None, None, None)
    ] * 2


def test_rows_of_lengths_and_tasks():
    full, cell = grid("claa")
    records = []
    for each, scores in ((full, [1, 1, 1]), (cell, [1, 0, 1])):
        for task in ("a", "beyond-short"):
            for length, score in zip((200, 1000, 2000), scores, strict=True):
                one = record(each, task, str(length), score, place={"length": length})
                records.append(replace(one, facts=(1.0, 0.5) if each is cell else (1.0, 1.0)))
    rows = summarise(records)
    places = [(row.task, row.length) for row in rows if row.label == "claa"]
    of_tasks = [("a", 200), ("a", 1000), ("a", 2000), ("beyond-short", None)]
    assert places == [(None, None), (None, 200), (None, 1000), (None, 2000), *of_tasks]
    found = {(row.task, row.length): row for row in rows if row.label == "claa"}
    assert found[None, 1000].worst_task == "a, 1,000" and found[None, 1000].worst == 0
    assert found[None, None].groups == 4 and found[None, None].prompts == 6
    assert (found["a", 200].facts, found["a", 200].whole_facts) == (0.75, 0.5)
    text = as_markdown(rows, "full")
    assert "| 1,000 | claa |" in text and "0.75 (0.50 whole)" in text
    assert "| all | claa |" in text and "| beyond-short | claa |" in text


def test_the_baseline_is_the_cell_of_the_same_settings():
    cells = grid("claa", "fastkv", layers=[1, 3], keeps=[0.1, 0.2])
    means = {cell: index for index, cell in enumerate(cells)}
    rows = summarise(
        [one for cell, mean in means.items() for one in scored(cell, {"a": [mean, mean]})], "fastkv"
    )
    assert all(row.is_total for row in rows)  # there is one task
    assert [row.difference and row.difference.mean for row in rows] == [None] + [-4.0] * 4 + [
        None
    ] * 4


def test_differences_are_over_the_prompts_that_both_have():
    full, cell = grid("claa")
    records = scored(full, {"a": [1, 1, 1]}) + scored(cell, {"a": [0, 1], "b": [1]})
    assert summarise(records)[1].difference.mean == -0.5


def test_pictures(model, tmp_path, prompts):
    cells = grid(*METHODS[:3], layers=[1, 2, 3], keeps=[0.3, 0.6])
    records = evaluate(model, tmp_path, cells, prompts)
    plot_frontier(summarise(records), tmp_path / "frontier.png")
    files = plot_needles(records, tmp_path)
    assert [file.name for file in files] == ["needles.png", "needles-2.png"]
    for file in (tmp_path / "frontier.png", *files):
        assert file.read_bytes().startswith(b"\x89PNG")
    single = [one for one in records if one.place.get("depth") == 0.0]
    assert plot_needles(single, tmp_path) == []
