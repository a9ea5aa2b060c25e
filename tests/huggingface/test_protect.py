"""Protected tokens in transformers' models: by a mask, and as parts of a chat."""

from functools import cache

import pytest
import torch

from claa_ops import attached
from claa_ops.methods import CLAA, GemFilter, Hops, Peak
from claa_ops.prefill import ChatParts, ClaaCache, StaticClaaCache, attach, generate, prefill
from support import chat_templates as forms
from support.chat_templates import HELP, TOOLS, TURNS
from support.tiny_checkpoint import tiny_tokenizer
from support.tiny_models import build, prompt
from support.tiny_models import generate as generate_with

METHOD = CLAA(keep=0.1, keep_kv=0.05, layer=2, last_n=2, first_full=1)
NEW = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return attach(build("llama"))


def spans(batch, length, *rows):
    """A mask of these begins and ends in each row."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row, pairs in enumerate(rows):
        for begin, end in pairs:
            mask[row, begin:end] = True
    return mask


@cache
def chat_model():
    tokenizer = forms.chat_tokenizer(forms.CHATML)
    chat = tokenizer.apply_chat_template(
        [HELP, *TURNS], tools=TOOLS, add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    size = dict(vocab_size=len(tokenizer), max_position_embeddings=4096)
    return attach(build("llama", **size)), tokenizer, chat["input_ids"]


@pytest.mark.parametrize(
    "method", [METHOD, Peak(keep=0.1, layer=1), Hops(keep=0.1, layer=1, keep_least=0)]
)
def test_each_row_of_a_padded_batch_is_as_alone(model, method):
    ids, mask = prompt(90, 67)
    protect = spans(2, 90, [(0, 20), (50, 53)], [(30, 70)])
    together = prefill(model, ids, method, mask, protect=protect)
    for row, begin in enumerate((0, 23)):
        one = slice(row, row + 1)
        alone = prefill(model, ids[one, begin:], method, protect=protect[one, begin:])
        kept = together.positions[row]
        assert torch.equal(kept[kept >= begin] - begin, alone.positions[0])
        assert torch.isin(protect[one, begin:][0].nonzero()[:, 0], alone.positions[0]).all()
        torch.testing.assert_close(together.logits[one], alone.logits, atol=1e-4, rtol=1e-4)
    answers = generate(model, ids, method, attention_mask=mask, protect=protect, max_new_tokens=5)
    for row, begin in enumerate((0, 23)):
        one = slice(row, row + 1)
        alone = generate(
            model, ids[one, begin:], method, protect=protect[one, begin:], max_new_tokens=5
        )
        assert torch.equal(answers[one], alone)


def test_compressed_caches_hold_them_in_every_layer(model):
    ids, _ = prompt(90)
    protect = spans(1, 90, [(10, 40)])
    prefilled = prefill(model, ids, METHOD, protect=protect)
    others = 90 - 30
    assert prefilled.cache.lengths == [90, *[30 + max(8, others // 20)] * 3]
    assert prefilled.positions.shape[1] == 30 + max(8, others // 10)


def test_everything_protected_is_the_plain_model(model):
    ids, mask = prompt(60, 41)
    protect = torch.ones(2, 60, dtype=torch.bool)
    cache = ClaaCache(model.config, METHOD, protect=protect)
    tokens, logits = generate_with(model, ids, cache, mask)
    plain_tokens, plain = generate_with(model, ids, mask=mask)
    assert torch.equal(tokens, plain_tokens)
    torch.testing.assert_close(logits, plain, atol=1e-4, rtol=1e-4)


def test_a_static_cache_decodes_from_them(model):
    ids, mask = prompt(60, 41)
    protect = spans(2, 60, [(5, 30)], [(40, 50)])
    dynamic = prefill(model, ids, METHOD, mask, protect=protect)
    expected = model(
        dynamic.logits.argmax(-1)[:, None],
        attention_mask=torch.cat([mask, mask[:, -1:]], dim=1),
        position_ids=dynamic.next_position[:, None],
        past_key_values=dynamic.cache,
    ).logits
    again = prefill(model, ids, METHOD, mask, protect=protect)
    static = StaticClaaCache(again.cache, 4)
    logits = model(
        again.logits.argmax(-1)[:, None],
        attention_mask=torch.cat([mask, mask[:, -1:]], dim=1),
        position_ids=again.next_position[:, None],
        past_key_values=static,
    ).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_two_passes_read_them(model):
    ids, _ = prompt(90)
    protect = spans(1, 90, [(10, 40)])
    prefilled = prefill(model, ids, GemFilter(keep=0.1, layer=1), protect=protect)
    assert torch.isin(torch.arange(10, 40), prefilled.positions[0]).all()
    assert prefilled.positions.shape[1] == 30 + 60 // 10


def test_a_later_turn_may_take_up_the_others(model):
    ids, _ = prompt(90)
    method = Peak(keep=0.1, layer=1, second_look=True)
    cache = ClaaCache(model.config, method, protect=spans(1, 90, [(10, 40)]))
    model(ids, past_key_values=cache)
    held = set(cache.state.positions[0].tolist())
    assert set(range(10, 40)) < held
    model(prompt(12, seed=3)[0], past_key_values=cache)
    assert held < set(cache.state.positions[0].tolist())


@pytest.mark.parametrize("names", ["system", "tools", "system, template", ["tools", "template"]])
def test_parts_of_a_chat_are_found_and_kept(names):
    model, tokenizer, ids = chat_model()
    protect = ChatParts(tokenizer, names)
    mask = protect(ids)
    assert mask.shape == ids.shape and mask.any() and not mask.all()
    text = tokenizer.decode(ids[0, mask[0]])
    assert ("weather" in text) == (names not in ("template",))
    with attached(model, METHOD, protect=protect):
        tokens = model.generate(ids, **NEW)
    cache = ClaaCache(model.config, METHOD, protect=mask)
    expected = model.generate(ids, past_key_values=cache, **NEW)
    assert torch.equal(tokens, expected)
    assert torch.isin(mask[0].nonzero()[:, 0], cache.state.positions[0]).all()


def test_they_are_found_in_each_row_of_a_batch_and_of_a_beam_search():
    model, tokenizer, ids = chat_model()
    other = tokenizer.apply_chat_template(
        [HELP, TURNS[0]], add_generation_prompt=True, return_dict=False
    )
    pad = ids.shape[1] - len(other)
    batch = torch.cat([ids, torch.tensor([[tokenizer.pad_token_id or 0] * pad + other])])
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0
    protect = ChatParts(tokenizer, "system")
    with attached(model, METHOD, protect=protect):
        tokens = model.generate(batch, attention_mask=mask, num_beams=2, **NEW)
        for row, begin in enumerate((0, pad)):
            alone = model.generate(batch[row : row + 1, begin:], num_beams=2, **NEW)
            new = tokens[row, batch.shape[1] :]
            assert torch.equal(new, alone[0, batch.shape[1] - begin :])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("", "names must be any of system, tools, template, got ''"),
        ("sytem", "names must be any of system, tools, template, got 'sytem'"),
        (["system", 3], r"names must be any of system, tools, template, got \['system', 3\]"),
        ([], r"names must be any of system, tools, template, got \[\]"),
        ([["system"]], r"names must be any of .*, got \[\['system'\]\]"),
    ],
)
def test_other_names_are_refused(names, message):
    with pytest.raises(ValueError, match=f"^ChatParts: {message}$"):
        ChatParts(chat_model()[1], names)


def test_what_a_template_cannot_have_is_refused_at_once():
    tokenizer = forms.chat_tokenizer(forms.OLD_MISTRAL)
    with pytest.raises(ValueError, match='^ChatParts: "system" needs a chat template that puts'):
        ChatParts(tokenizer, "system")
    with pytest.raises(ValueError, match="^ChatParts: what is protected must be positions where"):
        ChatParts(tiny_tokenizer(chat=False), "system")


def test_rows_of_one_length_may_protect_the_same(model):
    ids, _ = prompt(60, 60)
    protect = spans(2, 60, [(0, 19)], [(0, 19)])
    together = prefill(model, ids, METHOD, protect=protect)
    alone = prefill(model, ids[1:], METHOD, protect=protect[1:])
    assert torch.equal(together.positions[1], alone.positions[0])


def test_rows_of_one_length_that_protect_other_tokens_are_refused(model):
    """Transformers makes no mask for them, which rows that keep less would need."""
    message = "^ClaaCache: protect keeps more of one prompt than of another, so a batch must be"
    with pytest.raises(ValueError, match=message):
        prefill(model, prompt(60, 60)[0], METHOD, protect=spans(2, 60, [(0, 9)], []))


@pytest.mark.parametrize(
    ("protect", "error", "message"),
    [
        (torch.ones(1, 59, dtype=torch.bool), ValueError, r"must have shape \[batch, 60\], got"),
        (torch.ones(2, 60, dtype=torch.bool), ValueError, r"must have shape \[1, 60\], got \[2, 6"),
        (torch.ones(1, 60), ValueError, "must be bool, got torch.float32"),
        (lambda ids: ids.tolist(), TypeError, "must be a tensor, got list"),
        (lambda ids: ids, ValueError, "must be bool, got torch.int64"),
    ],
)
def test_what_is_no_mask_of_the_prompt_is_refused_and_nothing_is_lost(
    model, protect, error, message
):
    ids, _ = prompt(60)
    cache = ClaaCache(model.config, METHOD, protect=protect)
    with pytest.raises(error, match=f"^ClaaCache: protect {message}"):
        model(ids, past_key_values=cache)
    cache.protect = None
    assert model(ids, past_key_values=cache).logits.isfinite().all()


def test_what_is_neither_a_mask_nor_a_function_is_refused_at_once(model):
    message = "^ClaaCache: protect must be a mask, or a function of input_ids .*, got str$"
    with pytest.raises(TypeError, match=message), attached(model, METHOD, protect="system"):
        pass


def test_embeddings_need_a_mask(model):
    ids, _ = prompt(60)
    embeds = model.get_input_embeddings()(ids)
    protect = spans(1, 60, [(10, 40)])
    cache = ClaaCache(model.config, METHOD, protect=lambda ids: ids > 0)
    with pytest.raises(ValueError, match="^ClaaCache: protect must be a mask where a prompt comes"):
        model(inputs_embeds=embeds, past_key_values=cache)
    cache = ClaaCache(model.config, METHOD, protect=protect)
    model(inputs_embeds=embeds, past_key_values=cache)
    expected = prefill(model, ids, METHOD, protect=protect)
    assert torch.equal(cache.state.positions, expected.positions)
