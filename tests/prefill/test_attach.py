"""attach() and ClaaCache used wrongly, or on unusual models."""

import pickle

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from claa_ops.methods import CLAA
from claa_ops.prefill import ClaaCache, attach, hooks, huggingface
from claa_ops.prefill.attention import unwrapped

from .tiny_models import build, generate, prompt

METHOD = CLAA(keep=0.5, layer=1, last_n=2)


@pytest.fixture(scope="module")
def model():
    return attach(build("llama"))


def count_hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_attaching_twice_is_attaching_once():
    model = build("llama")
    assert attach(model) is model
    installed = count_hooks(model)
    assert attach(model) is model and count_hooks(model) == installed > 0


def test_it_leaves_training_mode_as_it_was():
    model = build("llama").train()
    attach(model)
    assert model.training and all(module.training for module in model.modules())


def test_an_unattached_model_refuses_the_cache():
    model, ids = build("llama"), prompt(20)[0]
    with pytest.raises(RuntimeError, match=r"call claa_ops.prefill.attach\(model\) first"):
        generate(model, ids, ClaaCache(model.config, METHOD))
    cache = ClaaCache(model.config, METHOD)
    with torch.no_grad():
        attach(build("llama"))(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"call claa_ops.prefill.attach\(model\) first"):
        model(ids[:, :1], past_key_values=cache)


def test_another_attention_set_later_is_noticed():
    model, ids = attach(build("llama")), prompt(20)[0]
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="select: must be called for layer 0 once, after its ob"):
        generate(model, ids, ClaaCache(model.config, METHOD))


@pytest.mark.parametrize("layer", [3, 15])
def test_a_selection_layer_outside_the_model_is_refused(model, layer):
    with pytest.raises(ValueError, match=rf"CLAA: layer must be in \[0, 2\].*, got {layer}"):
        ClaaCache(model.config, CLAA(layer=layer))


def test_training_and_labels_are_refused(model):
    ids, _ = prompt(20)
    with pytest.raises(ValueError, match="labels must be None"):
        model(ids, labels=ids, past_key_values=ClaaCache(model.config, METHOD))
    model.train()
    with pytest.raises(ValueError, match=r"must be in eval mode, call model.eval\(\)"):
        model(ids, past_key_values=ClaaCache(model.config, METHOD))
    model.eval()


def test_an_empty_prompt_is_refused(model):
    ids = torch.zeros(1, 0, dtype=torch.int64)
    with pytest.raises(ValueError, match="begin: prompt_length must be at least 1, got 0"):
        model.model(ids, past_key_values=ClaaCache(model.config, METHOD))


def test_masks_other_than_left_padding_are_refused(model):
    ids, mask = prompt(20)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="prompts must be padded on the left"):
        model(ids, attention_mask=mask, past_key_values=ClaaCache(model.config, METHOD))
    full = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"must have shape \[1, 20\], got \[1, 1, 20, 20\]"):
        model(ids, attention_mask=full, past_key_values=ClaaCache(model.config, METHOD))


def test_cropping_and_speculative_decoding_are_refused(model):
    ids, _ = prompt(20)
    cache = ClaaCache(model.config, METHOD)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"crop is not served.*got crop\(-2\)"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="speculative decoding"):
        generate(model, ids, cache, prompt_lookup_num_tokens=2)


def test_more_than_one_device_is_refused():
    model = build("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="attach: the model must be on one device and not tensor"):
        attach(model)


def test_a_configuration_of_an_attached_model_can_be_attached(model):
    for attached in (model, attach(build("llama", attention="eager"))):
        other = type(model)(attached.config).eval()
        attach(other)
        assert other.config._attn_implementation == attached.config._attn_implementation


def test_other_attention_is_refused():
    model = build("llama")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match="must be sdpa, eager or flash attention, got flex_att"):
        attach(model)


def test_a_model_that_ignores_the_hooks_fails_the_self_test(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(hooks, "_continue_with_selected", lambda layer, index: lambda *a: None)
    message = "failed the self-test: attach: keeping half of 16 tokens must shorten"
    with pytest.raises(ValueError, match=message):
        attach(model)
    assert count_hooks(model) == 0 and model.config._attn_implementation == "sdpa"


def test_a_model_that_keeping_everything_changes_fails_the_self_test(monkeypatch):
    model = build("llama")
    broken = lambda module, query, key, value, mask, **kwargs: (query.transpose(1, 2) * 0, None)  # noqa: E731, E501
    monkeypatch.setattr(huggingface, "_base_attention", lambda name, attention: (name, broken))
    with pytest.raises(ValueError, match="keeping all tokens must not change LlamaForCausalLM"):
        attach(model)
    # The name is shared: put the right function back for the models after this one.
    monkeypatch.undo()
    attach(model)


def test_positional_arguments_are_understood(model):
    ids, mask = prompt(20, 15)
    by_name, by_position = (ClaaCache(model.config, METHOD) for _ in range(2))
    with torch.no_grad():
        expected = model.model(ids, attention_mask=mask, past_key_values=by_name)[0]
        output = model.model(ids, mask, None, by_position)[0]
    assert output.shape[1] == 10 and torch.equal(output, expected)


def test_embeddings_serve_as_the_prompt(model):
    ids, _ = prompt(20)
    caches = [ClaaCache(model.config, METHOD) for _ in range(2)]
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        output = model(inputs_embeds=embeddings, past_key_values=caches[0]).logits
        assert torch.equal(output, model(ids, past_key_values=caches[1]).logits)


def test_a_method_can_be_pickled_and_compared():
    assert pickle.loads(pickle.dumps(METHOD)) == METHOD != CLAA(keep=0.5, layer=2)


# Flash attention needs a GPU; its contract with transformers does not: a two-dimensional mask,
# a name that stays, and no position ids with gaps.


@pytest.fixture
def flash(monkeypatch):
    """Stands in for flash attention: causal by index, the padding mask two-dimensional."""
    calls = []

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        calls.append(kwargs)
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        visible = visible.tril(key.shape[2] - query.shape[2])[None, None]
        if attention_mask is not None:
            assert attention_mask.shape == (query.shape[0], key.shape[2])
            visible = visible & attention_mask[:, None, None].bool()
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
        logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, -1e9)
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    for interface, function in ((AttentionInterface, attention), (AttentionMaskInterface, None)):
        mapping = dict(interface._global_mapping)
        mapping["flash_attention_2"] = function or mapping["flash_attention_2"]
        monkeypatch.setattr(interface, "_global_mapping", mapping)
    return calls


def test_flash_attention_keeps_its_name_and_gets_no_position_ids(flash, model):
    flashing = build("llama")
    flashing.config._attn_implementation_internal = "flash_attention_2"
    attach(flashing)
    assert flashing.config._attn_implementation == "flash_attention_2"
    other = build("llama")
    other.config._attn_implementation_internal = "flash_attention_2"
    attach(other)
    registered = AttentionInterface._global_mapping["flash_attention_2"]
    assert unwrapped(unwrapped(registered)) is unwrapped(registered) is not registered
    ids, mask = prompt(60, 41)
    flash.clear()
    _, logits = generate(flashing, ids, ClaaCache(flashing.config, METHOD), mask)
    assert flash and not any("position_ids" in kwargs for kwargs in flash)
    _, expected = generate(model, ids, ClaaCache(model.config, METHOD), mask)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_flash_attention_has_no_windows_behind_a_selection(flash):
    model = build("mistral")
    model.config._attn_implementation_internal = "flash_attention_2"
    message = "a sliding window behind a selection must go by position.*got flash_attention_2"
    with pytest.raises(ValueError, match=message):
        attach(model)
