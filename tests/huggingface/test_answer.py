"""A model's own answer and self-information, against their slow versions."""

import pytest
import torch

from claa_ops.huggingface.answer import answer_attention, self_information
from claa_ops.huggingface.work import count_work
from claa_ops.prefill import attach
from support import slow_methods
from support.slow_methods import Llama
from support.tiny_models import build, prompt

LENGTH, SHORT = 90, 67


@pytest.fixture(scope="module")
def model():
    return attach(build("llama"))


@pytest.fixture(scope="module")
def llama(model):
    return Llama(model)


def test_the_answers_attention_is_the_slow_one_with_and_without_padding(model, llama):
    ids, mask = prompt(LENGTH, SHORT)
    answer, ranking = answer_attention(model, ids, 7, attention_mask=mask)
    pooled = answer_attention(model, ids, 7, attention_mask=mask, pooled=True, kernel_size=5)[1]
    assert ranking.dtype == torch.float32 and ranking.shape == ids.shape
    for row, padding in enumerate((0, LENGTH - SHORT)):
        expected, result = slow_methods.answer_attention(llama, ids[row, padding:].tolist(), 7)
        assert answer[row].tolist() == result.tokens
        torch.testing.assert_close(ranking[row, padding:].double(), expected, atol=1e-5, rtol=1e-4)
        assert not ranking[row, :padding].any()
        expected = slow_methods.pool(expected, 5)
        torch.testing.assert_close(pooled[row, padding:].double(), expected, atol=1e-5, rtol=1e-4)


def test_only_queries_of_the_answer_vote(model, llama):
    ids, mask = prompt(LENGTH, SHORT)
    free, _ = answer_attention(model, ids, 7, attention_mask=mask)
    end = int(free[1, 2])
    _, ranking = answer_attention(model, ids, 7, end, attention_mask=mask)
    # Three tokens, the last of them the end: the prompt's last query, and those of two tokens.
    expected, _ = slow_methods.answer_attention(llama, ids[1, LENGTH - SHORT :].tolist(), 3)
    torch.testing.assert_close(
        ranking[1, LENGTH - SHORT :].double(), expected, atol=1e-5, rtol=1e-4
    )


def test_long_answers_are_reduced_in_parts(model, monkeypatch):
    ids, _ = prompt(LENGTH)
    whole = answer_attention(model, ids, 9)[1]
    monkeypatch.setattr("claa_ops.selection.answer._ROWS", 4)
    torch.testing.assert_close(answer_attention(model, ids, 9)[1], whole)


def test_layers_with_sliding_windows_are_left_out_of_the_answers_attention():
    ids, _ = prompt(LENGTH)
    _, ranking = answer_attention(build("gemma3_text"), ids, 3)
    assert ranking.isfinite().all() and (ranking > 0).all()
    with pytest.raises(ValueError, match="a layer must attend to the whole prompt, got none"):
        answer_attention(build("mistral"), ids, 3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        answer_attention(build("llama"), ids, 0)


# How little a model expected its prompt.


@pytest.mark.parametrize("part", [512, 8, 1])
def test_the_information_of_a_token_is_what_its_prefix_says_of_it(model, llama, monkeypatch, part):
    monkeypatch.setattr("claa_ops.huggingface.answer._PART", part)
    ids, mask = prompt(40, 21)
    information, work = self_information(model, ids, attention_mask=mask)
    assert information.dtype == torch.float32 and information.shape == ids.shape
    for row, padding in enumerate((0, 19)):
        expected = slow_methods.self_information(llama, ids[row, padding:].tolist())
        torch.testing.assert_close(
            information[row, padding:].double(), expected, atol=1e-5, rtol=1e-4
        )
        assert not information[row, : padding + 1].any()
    assert work == count_work(model, [40] * len(model.model.layers), logits=40)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mistral", "qwen3"])
def test_the_parts_of_a_prompt_are_one_prompt(monkeypatch, family):
    model = build(family)
    ids, mask = prompt(60, 41)
    whole, _ = self_information(model, ids, attention_mask=mask)
    monkeypatch.setattr("claa_ops.huggingface.answer._PART", 7)
    parts, _ = self_information(model, ids, attention_mask=mask)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    plain = model(ids[:1]).logits.float().log_softmax(-1)[0, :-1]
    expected = -plain.gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(whole[0, 1:], expected, atol=1e-4, rtol=1e-4)
    assert self_information(model, ids[:1, :1])[0].tolist() == [[0.0]]
