"""A second turn of a batch is that of each prompt alone, or a plain one with all tokens kept."""

from dataclasses import replace

import pytest
import torch

from claa_ops.huggingface.replay import RecordedPrefill
from claa_ops.huggingface.turns import ask_again
from claa_ops.methods import (
    ASL,
    CLAA,
    Coarse,
    FullKV,
    GemFilter,
    LazyLLM,
    Peak,
    SnapKV,
    SpeculativePrefill,
)
from claa_ops.prefill import attach, decode, prefill
from support.tiny_models import build, decoded, prompt

METHODS = {
    "full": FullKV(),
    "claa": CLAA(keep=0.4, layer=1),
    "snapkv": SnapKV(keep=0.4, window=8),
    "lazyllm": LazyLLM(keep=0.2),
    "asl": ASL(keep=0.5, layer=0, last_n=1, window=8, tau=None),
    "gemfilter": GemFilter(keep=0.4, layer=1),
    "speculative": SpeculativePrefill(keep=0.4, look_ahead=3, chunk=None),
    "coarse": Coarse(keep=0.4, layer=0, ahead=1),
}
STEPS, ANSWERS, TURNS = 6, (6, 2, 4), (5, 9, 1)


def turns(lengths=TURNS):
    return [prompt(length, seed=7 + length)[0][0] for length in lengths]


def conversation(model, ids, method, answers, asked, mask=None, run=prefill):
    """The answers' tokens, and logits and tokens of what follows the second turn."""
    prefilled = run(model, ids, method, mask)
    written = decode(model, prefilled, max_new_tokens=STEPS, eos_token_id=[])
    said = [row[:length] for row, length in zip(written, answers, strict=True)]
    return said, *decoded(model, ask_again(model, prefilled, said, asked))


def replayed(model, ids, method, mask):
    return RecordedPrefill(model, ids, mask).run(method)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_with_all_tokens_kept_it_is_the_plain_model_s_turn(family):
    plain, model = build(family), attach(build(family))
    ids, (asked,) = prompt(50)[0], turns([7])
    said, logits, tokens = conversation(model, ids, FullKV(), (STEPS,), [asked])
    whole = torch.cat([ids[0], said[0], asked, tokens[0, :-1]])[None]
    with torch.no_grad():
        expected = plain(whole).logits[0, -4:]
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("run", [prefill, replayed], ids=["computed", "replayed"])
@pytest.mark.parametrize("lengths", [(80, 61, 70), (80, 80, 80)], ids=["padded", "of one length"])
@pytest.mark.parametrize("name", METHODS)
def test_a_row_goes_on_after_its_own_answer(name, lengths, run):
    """Whatever was decoded behind the end of its answer, and however long the other turns are."""
    model, method, asked = attach(build("llama")), METHODS[name], turns()
    ids, mask = prompt(*lengths)
    said, logits, _ = conversation(model, ids, method, ANSWERS, asked, mask, run)
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, -length:]
        prefilled = prefill(model, own, method)
        written = decode(model, prefilled, max_new_tokens=ANSWERS[row], eos_token_id=[])
        assert torch.equal(written[0], said[row])
        alone, _ = decoded(model, ask_again(model, prefilled, [written[0]], asked[row : row + 1]))
        torch.testing.assert_close(logits[row], alone[0], atol=1e-4, rtol=1e-4)


def test_a_third_turn_follows_the_second():
    plain, model = build("llama"), attach(build("llama"))
    ids, asked = prompt(40)[0], turns([3, 8])
    prefilled = prefill(model, ids, FullKV())
    written = decode(model, prefilled, max_new_tokens=3, eos_token_id=[])[0]
    prefilled = ask_again(model, prefilled, [written], asked[:1])
    logits = ask_again(model, prefilled, [written[:0]], asked[1:]).logits
    with torch.no_grad():
        expected = plain(torch.cat([ids[0], written, *asked])[None]).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(80, 62), (80, 80)], ids=["padded", "of one length"])
def test_a_second_question_finds_what_the_first_one_dropped(lengths):
    """Before the last layer: its keys follow from hidden states that are those of full prefill."""
    plain, model, asked = build("llama"), attach(build("llama")), turns([5, 9])
    ids, mask = prompt(*lengths)
    method, answers = Peak(keep=0.5, layer=2, second_look=True), (STEPS, 2)
    found, lost = (
        conversation(model, ids, each, answers, asked, mask)
        for each in (method, replace(method, second_look=False, keep_kv=1.0))
    )
    for row, length in enumerate(lengths):
        (said, logits, tokens), (lost_said, lost_logits, _) = found, lost
        assert torch.equal(said[row], lost_said[row])
        own = [ids[row, -length:], said[row], asked[row], tokens[row, :-1]]
        with torch.no_grad():
            expected = plain(torch.cat(own)[None]).logits[0, -len(logits[row]) :]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(lost_logits[row, 0], expected[0], atol=1e-2)


def test_what_cannot_follow_is_refused():
    model, (ids, mask) = attach(build("gemma2")), prompt(40, 30)
    prefilled = prefill(model, ids, FullKV(), mask)
    written = decode(model, prefilled, max_new_tokens=3, eos_token_id=[])
    with pytest.raises(ValueError, match="must have a token and .* at most 3 .*, got 0 after 3"):
        ask_again(model, prefilled, list(written), turns([2, 3])[:1] + [ids[0, :0]])
    with pytest.raises(ValueError, match="got 2 after 4"):
        ask_again(model, prefilled, [torch.ones(4), written[1]], turns([2, 3]))
    with pytest.raises(ValueError, match="of one length where layers have sliding windows"):
        ask_again(model, prefilled, list(written), turns([2, 3]))
    ask_again(model, prefilled, list(written), turns([3, 3]))
