"""`attach`: once, on copies, on unusual models, and what it refuses."""

import copy
import io
import pickle
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from packaging.specifiers import SpecifierSet
from transformers import AttentionInterface, AttentionMaskInterface

from claa_ops.huggingface import hooks, transformers_api
from claa_ops.huggingface.attention import AttachedAttention, unwrapped
from claa_ops.huggingface.transformers_api import cache_argument
from claa_ops.methods import CLAA
from claa_ops.prefill import ClaaCache, attach
from claa_ops.prefill import generate as answer
from support.tiny_models import build, generate, prompt

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


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids, **cache_argument(model, ClaaCache(model.config, METHOD))).logits


@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_another_attention_set_later_is_noticed_and_can_be_attached(other, model):
    changed, ids = attach(build("llama")), prompt(20)[0]
    changed.set_attn_implementation(other)
    message = rf"must stay claa_sdpa, got {other}: call claa_ops.prefill.attach\(model\) again"
    with pytest.raises(RuntimeError, match=message):
        logits_of(changed, ids)
    installed = count_hooks(changed)
    attach(changed)
    assert count_hooks(changed) == installed
    torch.testing.assert_close(logits_of(changed, ids), logits_of(model, ids))


def test_threads_attach_a_model_once():
    ids = prompt(40)[0]
    expected = answer(build("llama"), ids, METHOD, max_new_tokens=3)
    for _ in range(5):
        model, answers = build("llama"), []

        def ask(model=model, answers=answers):
            answers.append(answer(model, ids, METHOD, max_new_tokens=3))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 4 and all(torch.equal(each, expected) for each in answers)


def test_a_copy_works_as_the_model_does(model):
    ids, expected = prompt(20)[0], logits_of(model, prompt(20)[0])
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    )
    for each in copies:
        assert torch.equal(logits_of(each, ids), expected)
        assert attach(each) is each and count_hooks(each) == count_hooks(model)


_LOAD = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
saved = torch.load(sys.argv[2], weights_only=False)
with torch.no_grad():
    assert torch.equal(model(saved["ids"], attention_mask=saved["mask"]).logits, saved["plain"])
    from claa_ops.prefill import ClaaCache, attach
    from claa_ops.huggingface.transformers_api import cache_argument
    for each in (model, attach(model)):
        cache = cache_argument(each, ClaaCache(each.config, saved["method"]))
        logits = each(saved["ids"], attention_mask=saved["mask"], **cache).logits
        assert torch.equal(logits, saved["logits"])
"""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_copy_works_in_a_process_that_attached_nothing(attention, tmp_path):
    model = attach(build("llama", attention=attention))
    ids, mask = prompt(20, 15)
    cache = cache_argument(model, ClaaCache(model.config, METHOD))
    with torch.no_grad():
        saved = {
            "ids": ids,
            "mask": mask,
            "method": METHOD,
            "plain": model(ids, attention_mask=mask).logits,
            "logits": model(ids, attention_mask=mask, **cache).logits,
        }
    torch.save(model, tmp_path / "model.pt")
    torch.save(saved, tmp_path / "saved.pt")
    command = [sys.executable, "-c", _LOAD, tmp_path / "model.pt", tmp_path / "saved.pt"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("tokens", [2, 3, 4, 16, 33])
def test_small_vocabularies_are_served(tokens):
    model = attach(build("llama", vocab_size=tokens, bos_token_id=None))
    assert logits_of(model, torch.arange(20)[None] % tokens).shape == (1, 10, tokens)


def test_the_self_test_takes_eight_forwards():
    model, forwards = build("llama"), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    attach(model)
    assert len(forwards) == 8


UNTESTED = rf"tested with transformers<5.10, found {transformers_api.transformers.__version__}: pip"


def test_a_release_that_was_not_tested_is_tried(monkeypatch):
    monkeypatch.setattr(transformers_api, "tested_versions", lambda: SpecifierSet("<5.10"))
    model = build("llama")
    with pytest.warns(UserWarning, match=UNTESTED):
        assert attach(model) is model
    logits_of(model, prompt(20)[0])


def test_a_release_that_was_not_tested_is_named_first(monkeypatch):
    monkeypatch.setattr(transformers_api, "tested_versions", lambda: SpecifierSet("<5.10"))
    model = build("llama")
    del model.model.layers[0].self_attn.layer_idx
    with pytest.raises(TypeError, match=rf"^claa_ops is {UNTESTED} install .*; attach: Llama"):
        attach(model)


def test_the_declared_releases_of_transformers_were_tested():
    declared = transformers_api.tested_versions()
    assert declared.contains("5.17.0") and not declared.contains("5.16.9")


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


def test_weights_that_are_not_there_are_refused():
    model = build("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="must have its weights in memory, .* the meta device"):
        attach(model)


def test_offloaded_weights_are_refused():
    model = cpu_offload(build("llama"), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"weights in memory, .* the disk \(device_map\)"):
        attach(model)


def test_several_devices_without_a_map_are_refused(monkeypatch):
    model = build("llama")
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    weights = [type("Weight", (), {"device": device}) for device in devices]
    monkeypatch.setattr(model, "parameters", lambda: iter(weights))
    message = "must be on one device or spread by a device_map, got cuda:0, cuda:1"
    with pytest.raises(ValueError, match=message):
        attach(model)


def test_a_model_without_a_head_is_served():
    model, ids = attach(build("llama").model), prompt(20)[0]
    with torch.no_grad():
        output = model(ids, **cache_argument(model, ClaaCache(model.config, METHOD)))
    assert output.last_hidden_state.shape[1] == 10


def test_a_compiled_model_that_was_attached_before_is_served(model):
    torch.compiler.reset()
    ids = prompt(20)[0]
    compiled = torch.compile(model, backend="eager")
    expected = answer(model, ids, METHOD, max_new_tokens=2)
    assert torch.equal(answer(compiled, ids, METHOD, max_new_tokens=2), expected)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="must be a decoder of transformers, got Linear"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="attached before torch.compile, got OptimizedModule"):
        attach(torch.compile(build("llama"), backend="eager"))


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
    monkeypatch.setattr(hooks.ContinueWithSelected, "__call__", lambda *_: None)
    message = "failed the self-test: keeping 8 of 16 tokens must shorten"
    with pytest.raises(ValueError, match=message):
        attach(model)
    assert count_hooks(model) == 0 and model.config._attn_implementation == "sdpa"


def test_a_model_that_keeping_everything_changes_fails_the_self_test(monkeypatch):
    model = build("llama")

    def broken(module, query, key, value, mask, **kwargs):
        return query.transpose(1, 2) * 0, None

    monkeypatch.setattr(AttachedAttention, "base", lambda self: broken)
    message = "LlamaForCausalLM failed the self-test: keeping all tokens must not change it"
    with pytest.raises(ValueError, match=message):
        attach(model)
    # The name is shared: put the right function back for the models after this one.
    monkeypatch.undo()
    attach(model)


def test_a_family_that_cuts_the_mask_at_the_wrong_end_fails_the_self_test(monkeypatch):
    """Its prompts are right, and what it decodes after them is not."""

    def first_columns(self, module, args, kwargs):
        whole = kwargs.get("attention_mask")
        args, kwargs = last_columns(self, module, args, kwargs) or (args, kwargs)
        if whole is not None:
            kwargs["attention_mask"] = whole[..., : kwargs["attention_mask"].shape[-1]]
        return args, kwargs

    last_columns = hooks.PassCache.__call__
    monkeypatch.setattr(hooks.PassCache, "__call__", first_columns)
    message = "a padded row must be as the row alone, got logits of the next token that are off by"
    with pytest.raises(ValueError, match=message):
        attach(build("llama"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "smollm3"])
def test_rounding_does_not_fail_the_self_test(family, dtype):
    for scale in (0.4, 1.0):
        model = build(family).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale if parameter.dim() > 1 else 1)
        assert attach(model) is model


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
        last = key.shape[2] - query.shape[2]
        window = kwargs.get("sliding_window") or key.shape[2]
        visible = visible.tril(last).triu(last - window + 1)[None, None]
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


def test_flash_attention_selects_within_a_plain_layer(flash, model):
    flashing = build("llama")
    flashing.config._attn_implementation_internal = "flash_attention_2"
    attach(flashing)
    ids, mask = prompt(60, 41)
    method = replace(METHOD, in_layer=True)
    cache = ClaaCache(flashing.config, method)
    _, logits = generate(flashing, ids, cache, mask)
    assert [*cache.within] == [1]
    _, expected = generate(model, ids, ClaaCache(model.config, METHOD), mask)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    for layer in flashing.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "sliding_window": 16}), with_kwargs=True
        )
    message = "within a layer must be in one with plain causal attention, use sdpa or eager att"
    with pytest.raises(ValueError, match=message):
        generate(flashing, ids, ClaaCache(flashing.config, method), mask)


def test_flash_attention_has_no_windows_after_a_selection(flash):
    model = build("mistral")
    model.config._attn_implementation_internal = "flash_attention_2"
    message = "a sliding window after a selection must go by position.*got flash_attention_2"
    with pytest.raises(ValueError, match=message):
        attach(model)
