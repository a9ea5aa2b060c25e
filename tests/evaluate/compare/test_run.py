"""Both runs of a comparison are the model's own generation, and the report says so."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from claa_ops.evaluate.compare.picture import plot_scores
from claa_ops.evaluate.compare.run import Comparison, compare
from claa_ops.evaluate.compare.table import as_table, to_json
from claa_ops.huggingface.decoding import end_tokens
from claa_ops.huggingface.models import InputError
from claa_ops.huggingface.work import count_work
from claa_ops.methods import (
    CLAA,
    METHODS,
    FastKV,
    FullKV,
    GemFilter,
    Oracle,
    Peak,
    PyramidInfer,
    SnapKV,
    SpeculativePrefill,
    StreamingLLM,
    make_method,
)
from claa_ops.prefill import ClaaCache, attach
from claa_ops.prefill import generate as generate_with
from support.tiny_checkpoint import LAYERS, tiny_model, tiny_tokenizer

TOKENS = 200


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def generated(model, tokenizer, ids, method, new_tokens=12) -> str:
    cache = ClaaCache(attach(model).config, method)
    out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=new_tokens)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_answers_are_those_of_generate(model, tokenizer, ids):
    method = CLAA(keep=0.2, layer=2)
    report = compare(model, tokenizer, ids, method, max_new_tokens=12, runs=1)
    assert report.full.answer == generated(model, tokenizer, ids, FullKV())
    assert report.pruned.answer == generated(model, tokenizer, ids, method)


@pytest.mark.parametrize("name", METHODS)
def test_any_method_can_be_compared(model, tokenizer, ids, name):
    method = make_method(name, num_layers=LAYERS, keep=0.3)
    report = compare(model, tokenizer, ids, method, max_new_tokens=6, runs=1)
    answer = generate_with(model, ids, method, max_new_tokens=6)
    assert report.pruned.answer == tokenizer.decode(answer[0], skip_special_tokens=True).strip()
    assert report.full.answer == generated(model, tokenizer, ids, FullKV(), 6)
    assert report.kept.tolist() == sorted(set(report.kept.tolist()))
    assert bool(report.scores) == (name != "streaming")


def of_full(model, *forwards) -> float:
    """The multiply-adds of these forwards, each given by what its layers see, to full."""
    full = count_work(model, [TOKENS] * LAYERS)
    both = [count_work(model, tokens, logits) for tokens, logits in forwards]
    return sum(work.total for work in both) / full.total


def test_the_operations_left_are_those_of_all_forwards(model, tokenizer, ids):
    def expected(method):
        return compare(model, tokenizer, ids, method, max_new_tokens=1, runs=1).expected_ratio

    assert expected(FullKV()) == expected(SnapKV(keep=40)) == 1
    assert expected(FastKV(keep=40, layer=1)) == of_full(model, ([200] * 2 + [40] * 4, 1))
    staged = FastKV(keep=(100, 40), layer=(0, 3))
    assert expected(staged) == of_full(model, ([200] + [100] * 3 + [40] * 2, 1))
    assert expected(GemFilter(keep=40, layer=2)) == of_full(
        model, ([200] * 3, 0), ([40] * LAYERS, 1)
    )
    # A draft reads the prompt and looks ahead; an oracle answers. The model's end never comes.
    draft = tiny_model()
    draft.generation_config.eos_token_id = None
    assert expected(SpeculativePrefill(keep=40, chunk=None, look_ahead=3, draft=draft)) == of_full(
        model, ([202] * LAYERS, 3), ([40] * LAYERS, 1)
    )
    assert expected(Oracle(keep=40, layer=2, max_new_tokens=1)) == of_full(
        model, ([200] * LAYERS, 1), ([200] * 3 + [40] * 3, 1)
    )


@pytest.mark.parametrize(
    "method, layers",
    [
        (FullKV(), []),
        (SnapKV(), []),
        (CLAA(layer=2), [2]),
        (Peak(layer=(1, 3), keep=(0.5, 0.2)), [1, 3]),
        (GemFilter(layer=2), [2]),
        (SpeculativePrefill(), []),
        (PyramidInfer(least=0), [1, 2, 3, 4]),
    ],
)
def test_selections_are_where_tokens_were_dropped(model, tokenizer, ids, method, layers):
    report = compare(model, tokenizer, ids, method, max_new_tokens=1, runs=1)
    assert report.selections == layers


def test_caches_alone_being_pruned_is_noted(model, tokenizer, ids):
    report = compare(model, tokenizer, ids, StreamingLLM(keep=0.2), max_new_tokens=1, runs=1)
    assert report.note.startswith("only caches were pruned")


def test_a_method_that_does_not_fit_the_prompt_is_refused(model, tokenizer, ids):
    method = CLAA(keep=0.1, layer=2, equal_cache=True)
    with pytest.raises(InputError, match="CLAA: equal_cache must leave each layer its window"):
        compare(model, tokenizer, ids, method, runs=1)


def test_the_report_says_what_was_kept(model, tokenizer, ids):
    report = compare(model, tokenizer, ids, CLAA(keep=0.2, layer=2), max_new_tokens=3, runs=2)
    assert report.prompt_tokens == TOKENS and report.selections == [2]
    assert report.kept.numel() == 40
    assert report.kept[-8:].tolist() == list(range(TOKENS - 8, TOKENS))
    assert sorted(report.scores) == list(range(LAYERS))
    assert all(row.shape == (TOKENS - 8,) for row in report.scores.values())
    per_token = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8, float32
    assert report.full.kv_bytes == LAYERS * TOKENS * per_token
    assert report.pruned.kv_bytes == (3 * TOKENS + 3 * 40) * per_token
    assert report.expected_ratio == of_full(model, ([TOKENS] * 3 + [40] * 3, 1))
    assert len(report.full.ttft_s) == len(report.pruned.ttft_s) == 2
    assert report.full.new_tokens <= 3
    assert report.note is None


def test_keeping_everything_is_full_prefill(model, tokenizer, ids):
    report = compare(model, tokenizer, ids, CLAA(keep=1.0, layer=2), max_new_tokens=8, runs=1)
    assert report.full.answer == report.pruned.answer
    assert report.full.kv_bytes == report.pruned.kv_bytes
    assert report.expected_ratio == 1.0
    assert "no token was pruned" in report.note


def test_a_prompt_within_the_window_is_noted(model, tokenizer, ids):
    report = compare(model, tokenizer, ids[:, :8], CLAA(layer=2), max_new_tokens=2, runs=1)
    assert report.note.startswith("the prompt has 8 tokens and the window 8, so nothing can be")
    assert report.expected_ratio == 1.0


def test_decoding_ends_with_the_answer(tokenizer, ids):
    model = tiny_model()
    first = int(attach(model)(ids).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [first, 3]
    assert set(end_tokens(model)) == {first, 3}
    report = compare(model, tokenizer, ids, FullKV(), runs=1)
    assert report.full.new_tokens == 1 and report.full.decode_s is None


def test_a_model_that_cannot_be_attached_is_refused(tokenizer, ids):
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(InputError, match="attach: "):
        compare(GPT2LMHeadModel(config), tokenizer, ids, FullKV(), runs=1)


@pytest.mark.parametrize("tokens", [TOKENS, 9, 4])
@pytest.mark.parametrize(
    "method",
    [
        CLAA(layer=2),
        FullKV(),
        Oracle(layer=(1, 3), keep=(0.5, 0.2)),
        GemFilter(layer=2),
        PyramidInfer(),
    ],
)
def test_any_comparison_can_be_drawn(model, tokenizer, ids, method, tokens, tmp_path):
    report = compare(model, tokenizer, ids[:, :tokens], method, max_new_tokens=1, runs=1)
    plot_scores(report, tmp_path / "scores.png", fact=range(1, 3))
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert as_table(report)


def test_a_full_disk_is_one_sentence(model, tokenizer, ids, tmp_path):
    report = compare(model, tokenizer, ids, CLAA(layer=2), max_new_tokens=1, runs=1)
    picture = tmp_path / "scores.png"
    picture.symlink_to("/dev/full")
    with pytest.raises(InputError, match="cannot write the plot .*scores.png: No space left"):
        plot_scores(report, picture)


def with_ratio(report: Comparison, ratio: float) -> Comparison:
    """The same comparison, had the times been such."""
    full = replace(report.full, ttft_s=[1.0, 2.0])
    return replace(report, full=full, pruned=replace(report.pruned, ttft_s=[ratio, 2 * ratio]))


def shown(report: Comparison) -> str:
    console = Console(width=300)
    with console.capture() as capture:
        console.print(as_table(report))
    return capture.get()


def test_a_ratio_that_cannot_be_is_no_result(model, tokenizer, ids):
    report = compare(model, tokenizer, ids, CLAA(keep=0.2, layer=2), max_new_tokens=1, runs=1)
    allowed = report.expected_ratio
    impossible, possible = with_ratio(report, 0.4 * allowed), with_ratio(report, 0.95 * allowed)
    assert to_json(impossible, {}, None)["ttft_ratio"] is None
    assert "Time to first token: no result; the operations left allow" in shown(impossible)
    noise = f"the times are noise: of 2 pairs the median ratio is {0.4 * allowed:.3f}"
    assert noise in shown(impossible) and impossible.note.startswith(noise)
    assert to_json(possible, {}, None)["ttft_ratio"] == 0.95 * allowed
    assert f"Time to first token: {0.95 * allowed:.3f} (" in shown(possible)
    assert possible.note is None


@pytest.mark.parametrize(
    "ratios, runs",
    [([1.0], 1), ([0.1] * 2 + [1.0] * 3, 5), ([0.1] * 50, 11)],
)
def test_a_ratio_that_cannot_be_is_measured_again(model, tokenizer, ids, monkeypatch, ratios, runs):
    times = iter([time for ratio in ratios for time in (1.0, ratio)])
    monkeypatch.setattr("claa_ops.evaluate.compare.run._timed", lambda model, work: next(times))
    report = compare(model, tokenizer, ids, FullKV(), max_new_tokens=1, runs=1)
    assert len(report.full.ttft_s) == len(report.pruned.ttft_s) == runs


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_answers_no_numbers_is_refused(tokenizer, ids, value):
    model = attach(tiny_model())
    model.model.norm.weight.data.fill_(value)
    with pytest.raises(InputError, match="logits must be finite, got infinity or NaN in torch.flo"):
        compare(model, tokenizer, ids, FullKV(), max_new_tokens=1, runs=1)
