"""lm-eval's own command with our model class in it, on tasks in local files."""

import json
import runpy
import sys
import warnings
from importlib.metadata import entry_points

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from claa_ops.huggingface.models import InputError
from claa_ops.huggingface.transformers_api import cache_argument
from claa_ops.lm_eval import ClaaLM
from claa_ops.methods import CLAA, FullKV
from claa_ops.prefill import decode, prefill
from support.tiny_checkpoint import CONTEXT, LAYERS, tiny_tokenizer

CONTEXT_TEXT = "A context of many words, " * 8
pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def pruned(checkpoint):
    return ClaaLM(checkpoint, method="claa", keep="20%", layer=2, device="cpu")


def request(kind, *arguments):
    return Instance(kind, {}, arguments, 0)


def test_the_class_is_registered(pruned):
    assert get_model("claa_ops") is ClaaLM
    assert pruned.method == CLAA(keep=0.2, layer=2)


def test_it_is_declared_as_a_plug_in_of_lm_eval():
    (declared,) = entry_points(group="lm_eval.models", name="claa_ops")
    assert declared.load() is ClaaLM


def test_full_prefill_gives_the_likelihoods_of_a_plain_forward(checkpoint):
    lm = ClaaLM(checkpoint, method="full", device="cpu")
    assert isinstance(lm.method, FullKV)
    texts = [" one", " two three", " one more"]
    scored = lm.loglikelihood([request("loglikelihood", CONTEXT_TEXT, text) for text in texts])
    for text, (logprob, is_greedy) in zip(texts, scored, strict=True):
        ids = torch.tensor([lm.tok_encode(CONTEXT_TEXT.rstrip() + " " + text)])
        given = len(lm.tok_encode(CONTEXT_TEXT.rstrip()))
        logits = lm.model(ids).logits[0, given - 1 : -1]
        expected = logits.log_softmax(dim=-1).gather(1, ids[0, given:, None]).sum()
        assert logprob == pytest.approx(expected.item(), rel=1e-4)
        assert is_greedy == bool((logits.argmax(dim=-1) == ids[0, given:]).all())


def test_the_context_is_pruned_and_the_continuation_is_not(pruned):
    context = CONTEXT_TEXT.rstrip()
    ids = torch.tensor([pruned.tok_encode(context)])
    prefilled = prefill(pruned.model, ids, pruned.method)
    assert prefilled.positions.shape[1] < ids.shape[1]
    texts = list("abcdefghijklmnopqrstuvwxyz")
    scored = pruned.loglikelihood([request("loglikelihood", context, text) for text in texts])
    first = prefilled.logits[0].log_softmax(dim=-1)
    for text, (logprob, is_greedy) in zip(texts, scored, strict=True):
        (token,) = pruned.tok_encode(text)
        assert logprob == pytest.approx(first[token].item(), rel=1e-5)
        assert is_greedy == (token == first.argmax())

    # Of two tokens the second sees what is kept of the prompt, and the first.
    (both, _), (alone, _) = pruned.loglikelihood(
        [request("loglikelihood", context, text) for text in ("ab", "a")]
    )
    tokens = torch.tensor([pruned.tok_encode("a")])
    after = pruned.model(
        tokens,
        position_ids=prefilled.next_position[:, None],
        **cache_argument(pruned.model, prefilled.cache),
    ).logits[0, -1]
    (second,) = pruned.tok_encode("b")
    assert both - alone == pytest.approx(after.log_softmax(dim=-1)[second].item(), rel=1e-4)

    written = decode(pruned.model, prefill(pruned.model, ids, pruned.method), max_new_tokens=5)
    (text,) = pruned.generate_until(
        [request("generate_until", context, {"until": [], "max_gen_toks": 5})]
    )
    assert text == pruned.tokenizer.decode(written[0], skip_special_tokens=True)


def test_choices_share_a_prefill(pruned, monkeypatch):
    prefills = []
    monkeypatch.setattr(
        "claa_ops.lm_eval.prefill", lambda *arguments: prefills.append(1) or prefill(*arguments)
    )
    choices = [request("loglikelihood", CONTEXT_TEXT, f" {word}") for word in ("a", "bc", "def")]
    together = pruned.loglikelihood(choices)
    assert len(prefills) == 1
    assert together == [pruned.loglikelihood([choice])[0] for choice in choices]


def test_texts_longer_than_the_model_are_scored_in_windows(pruned):
    (logprob,) = pruned.loglikelihood_rolling(
        [request("loglikelihood_rolling", "word " * (CONTEXT // 4))]
    )
    assert logprob < 0
    text = "a b c"
    (short,) = pruned.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    ids = torch.tensor([[pruned.prefix_token_id, *pruned.tok_encode(text)]])
    logits = pruned.model(ids).logits[0, :-1].log_softmax(dim=-1)
    assert short == pytest.approx(logits.gather(1, ids[0, 1:, None]).sum().item(), rel=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "cla"}, "unknown method 'cla': did you mean 'claa'"),
        ({"keep": 1.5}, r"keep must be a rate in \(0, 1\]"),
        ({"layer": LAYERS}, rf"CLAA: layer must be in \[0, {LAYERS - 2}\]"),
        ({"zscor": True}, "claa: a setting must be one of .*, got zscor"),
        ({"zscore": "yes"}, "CLAA: zscore must be True or False, got 'yes'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"max_length": CONTEXT + 1}, r"max_length must be in \[2, 512\], what the model holds"),
        ({"max_length": 0}, "max_length must be in .*, got 0"),
        ({"method": "speculative", "draft": "/no/such"}, "model /no/such does not exist"),
    ],
)
def test_bad_settings_are_refused(checkpoint, settings, message):
    with pytest.raises(InputError, match=message):
        ClaaLM(checkpoint, device="cpu", **settings)


def test_a_draft_is_loaded(checkpoint, pruned, tmp_path):
    lm = ClaaLM(checkpoint, method="speculative", keep=0.5, draft=checkpoint, device="cpu")
    assert lm.method.draft is not lm.model and lm.method.keep == 0.5
    with pytest.raises(InputError, match="claa: a setting must be one of .*, got draft"):
        ClaaLM(checkpoint, draft=checkpoint, device="cpu")
    pruned.model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="must have the tokenizer of the model, got one in which"):
        ClaaLM(checkpoint, method="speculative", draft=str(tmp_path), device="cpu")


@pytest.fixture
def prefilled(pruned, monkeypatch):
    """The lengths of all prompts that are prefilled."""
    lengths = []

    def recording(model, ids, method):
        lengths.append(ids.shape[1])
        return prefill(model, ids, method)

    monkeypatch.setattr("claa_ops.lm_eval.prefill", recording)
    return lengths


@pytest.mark.parametrize(
    "context, new_tokens, read, most",
    [
        (100, CONTEXT - 100, 100, None),  # all fits
        (100, CONTEXT, 100, CONTEXT - 100),
        (100, 10 * CONTEXT, 100, CONTEXT - 100),
        (CONTEXT - 1, CONTEXT, CONTEXT // 2, CONTEXT // 2),
        (2 * CONTEXT, 10 * CONTEXT, CONTEXT // 2, CONTEXT // 2),
        (2 * CONTEXT, 12, CONTEXT - 12, 12),
    ],
)
def test_a_context_is_never_cut_to_nothing(
    pruned, prefilled, monkeypatch, context, new_tokens, read, most
):
    asked = []
    monkeypatch.setattr(
        "claa_ops.lm_eval.decode_until", lambda *arguments: asked.extend(arguments[3]) or ["x"]
    )
    options = {"until": ["\n"], "max_gen_toks": new_tokens}
    requests = [request("generate_until", "a" * context, options)] * 2
    if most is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pruned.generate_until(requests)
        most = new_tokens
    else:
        with pytest.warns(UserWarning, match="are cut on the left|answers end sooner") as told:
            pruned.generate_until(requests)
        assert len({str(warning.message) for warning in told}) == len(told)  # each once
    assert prefilled == [read, read] and asked == [most, most]


def test_an_empty_context_is_the_prefix_token(pruned, prefilled):
    options = {"until": [], "max_gen_toks": 4}
    (answer,) = pruned.generate_until([request("generate_until", "", options)])
    ids = torch.tensor([[pruned.prefix_token_id]])
    written = decode(pruned.model, prefill(pruned.model, ids, pruned.method), max_new_tokens=4)
    assert answer == pruned.tokenizer.decode(written[0], skip_special_tokens=True)
    assert prefilled == [1]
    assert len(pruned.loglikelihood([request("loglikelihood", "", " word")])) == 1


def test_half_a_character_is_read_as_none(pruned, prefilled):
    with pytest.warns(UserWarning, match="half a character"):
        assert pruned.tok_encode("a\ud83d") == pruned.tok_encode("a\ufffd")
    assert pruned.tok_encode("\ud83d\ude00") == pruned.tok_encode("😀")
    options = {"until": [], "max_gen_toks": 2}
    assert len(pruned.generate_until([request("generate_until", "a\ud83d", options)])) == 1
    assert len(pruned.loglikelihood([request("loglikelihood", "a\ud83d", " \ude00")])) == 1


def test_an_empty_text_ends_no_answer(pruned):
    texts = [
        pruned.generate_until([request("generate_until", CONTEXT_TEXT, options)])
        for options in ({"until": [""], "max_gen_toks": 5}, {"until": [], "max_gen_toks": 5})
    ]
    assert texts[0] == texts[1] and texts[0] != [""]


def test_a_continuation_longer_than_the_model_is_refused(pruned):
    long = request("loglikelihood", "a", " " + "b" * (CONTEXT + 1))
    with pytest.raises(InputError, match="a continuation must be shorter than the length of 512"):
        pruned.loglikelihood([long])


@pytest.mark.parametrize("new_tokens", [0, -1])
def test_a_number_of_new_tokens_that_cannot_be_is_refused(pruned, new_tokens):
    options = {"until": [], "max_gen_toks": new_tokens}
    with pytest.raises(InputError, match="max_gen_toks must be a positive integer"):
        pruned.generate_until([request("generate_until", "a", options)])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"until": [5]}, "until must be a text or a list of texts, got 5"),
        ({"until": {"a": 1}}, "until must be a text or a list of texts, got {'a': 1}"),
        ({"until": [["a"]]}, r"until must be a text or a list of texts, got \['a'\]"),
        ({"max_gen_toks": "many"}, "the options .* of a request: invalid literal"),
        ({"num_beams": 4}, "num_beams must be 1, got 4"),
    ],
)
def test_options_that_cannot_be_served_are_a_sentence(pruned, options, message):
    with pytest.raises(InputError, match=message):
        pruned.generate_until([request("generate_until", "a", options)])


@pytest.mark.parametrize("context", ["", "a", "a "])
def test_an_empty_continuation_is_certain(pruned, context):
    pairs = [(context, ""), ("a", " b"), (context, "")]
    scored = pruned.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    assert scored[::2] == [(0.0, True)] * 2
    assert scored[1:2] == pruned.loglikelihood([request("loglikelihood", "a", " b")])


def test_a_template_that_refuses_is_a_sentence(pruned, monkeypatch):
    for template in ("{{ raise_exception('a system turn is needed') }}", "{% for x in %}"):
        monkeypatch.setattr(pruned.tokenizer, "chat_template", template)
        with pytest.raises(InputError, match="template cannot be applied: .*; leave --apply_chat"):
            pruned.apply_chat_template([{"role": "user", "content": "hello"}])


def test_sampling_is_refused(pruned):
    with pytest.raises(InputError, match="do_sample must be false, got true"):
        pruned.generate_until([request("generate_until", "a", {"do_sample": True})])


TASKS = {
    "claa_local_words": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
    "claa_local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    },
}


@pytest.fixture
def command(checkpoint, tmp_path, monkeypatch):
    """Runs lm-eval's command on tasks of local files, with these settings of the model."""
    records = tmp_path / "records.jsonl"
    document = {"text": CONTEXT_TEXT, "answer": "x", "choices": [" a", " b"], "label": 1}
    records.write_text(f"{json.dumps(document)}\n" * 3)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, task in TASKS.items():
        task |= {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(records)}},
            "test_split": "test",
        }
        (tasks / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    def run_command(settings: str) -> None:
        arguments = f"pretrained={checkpoint},{settings}"
        line = ["lm_eval", "--model", "claa_ops", "--model_args", arguments]
        line += ["--tasks", ",".join(TASKS), "--include_path", str(tasks)]
        monkeypatch.setattr(sys, "argv", [*line, "--output_path", str(tmp_path / "results.json")])
        runpy.run_module("claa_ops.lm_eval", run_name="__main__")

    return run_command


def test_the_command_runs_tasks_of_a_local_file(command, tmp_path):
    command("method=claa,keep=0.2,layer=2,zscore=True")
    (results,) = tmp_path.glob("results_*.json")
    found = json.loads(results.read_text())
    assert found["results"]["claa_local_words"]["exact_match,none"] == 0.0
    assert found["results"]["claa_local_choice"]["acc,none"] in (0.0, 1.0)
    assert found["n-samples"]["claa_local_choice"]["effective"] == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ("method=fastvk", "unknown method 'fastvk': did you mean 'fastkv'?"),
        ("equal_cache=True", "CLAA: equal_cache must leave each layer its window of 8"),
    ],
)
def test_the_command_answers_bad_settings_with_a_sentence(command, capsys, settings, message):
    with pytest.raises(SystemExit) as end:
        command(settings)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"claa-ops: {message}")


def test_the_module_is_the_command_of_lm_eval(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("claa_ops.lm_eval", run_name="__main__")
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "--include_path" in shown
    assert "python -m claa_ops.lm_eval --model claa_ops" in shown
