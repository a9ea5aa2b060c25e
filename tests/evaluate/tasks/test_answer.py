"""Teacher-forcing is greedy decoding told what to expect."""

import pytest
import torch

from claa_ops.evaluate.tasks.answer import decode_answers, decode_until, force
from claa_ops.methods import CLAA, FullKV, GemFilter
from claa_ops.prefill import decode, prefill
from support.tiny_checkpoint import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
METHODS = [FullKV(), CLAA(keep=0.3, layer=2), GemFilter(keep=0.3, layer=2)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def prompt(seed=0):
    return torch.randint(256, (1, 120), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_what_is_decoded_is_right(model, method):
    written = decode(model, prefill(model, prompt(), method), max_new_tokens=6)[0]
    for length in (1, 6):
        ((right, logprob),) = force(model, prefill(model, prompt(), method), [written[:length]])
        assert right and logprob < 0
    for wrong in (0, 5):
        other = written.clone()
        other[wrong] = (other[wrong] + 1) % 256
        ((right, worse),) = force(model, prefill(model, prompt(), method), [other])
        assert not right and worse < logprob


def test_log_probabilities_are_those_of_a_plain_forward(model):
    ids, target = prompt(), torch.tensor([3, 1, 4])
    logits = model(torch.cat([ids, target[None]], dim=1)).logits[0, -4:-1]
    expected = logits.log_softmax(dim=-1).gather(1, target[:, None]).sum()
    ((_, logprob),) = force(model, prefill(model, ids, FullKV()), [target])
    assert logprob == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_decoding_is_that_of_prefill(model, method):
    written = decode(model, prefill(model, prompt(), method), max_new_tokens=8)[0]
    (text,) = decode_until(model, TOKENIZER, prefill(model, prompt(), method), [8], [()])
    assert text == TOKENIZER.decode(written, skip_special_tokens=True)


def test_a_stop_text_ends_the_answer(model, monkeypatch):
    (whole,) = decode_until(model, TOKENIZER, prefill(model, prompt(), FullKV()), [8], [()])
    steps = []
    handle = model.register_forward_hook(lambda *_: steps.append(1))
    prefilled = prefill(model, prompt(), FullKV())
    steps.clear()
    (text,) = decode_until(model, TOKENIZER, prefilled, [8], [(whole[2],)])
    assert text == whole[: whole.index(whole[2])]
    assert len(steps) <= 2
    handle.remove()


def test_an_answer_that_may_end_takes_no_more_steps(model):
    def prefilled():
        return prefill(model, prompt().expand(2, -1), FullKV())

    (whole, _) = decode_until(model, TOKENIZER, prefilled(), [8, 8], [(), ()])
    enough = [lambda text: whole[:3] in text, None]
    first, second = decode_answers(model, TOKENIZER, prefilled(), [8, 8], [(), ()], enough)
    assert (first.text, second.text) == (whole[:3], whole)
    batch, steps = prefilled(), []
    handle = model.register_forward_hook(lambda *_: steps.append(1))
    answers = decode_answers(model, TOKENIZER, batch, [8, 8], [(), ()], enough[:1] * 2)
    handle.remove()
    assert [answer.text for answer in answers] == [whole[:3]] * 2 and len(steps) <= 2
    assert TOKENIZER.decode(answers[0].tokens) == whole[:3]
