"""Families of models: those served keep every promise, the others are refused unharmed."""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel

from claa_ops.methods import CLAA
from claa_ops.prefill import ClaaCache, attach

from .tiny_models import SLIDING_WINDOW, build, generate, prompt

SERVED = [
    "llama", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_oss", "stablelm",
    "gpt_neox",
]  # fmt: skip


@pytest.mark.parametrize("family", SERVED)
def test_a_served_family_keeps_the_promises(family):
    model = build(family)
    ids, mask = prompt(60, 41, 18)
    tokens, plain = generate(model, ids, mask=mask, steps=4)
    attach(model)

    everything = CLAA(keep=1.0, layer=1)
    kept_tokens, logits = generate(model, ids, ClaaCache(model.config, everything), mask, steps=4)
    assert torch.equal(kept_tokens, tokens)
    assert (logits - plain).abs().max().item() == 0

    method = CLAA(keep=24, keep_kv=16, layer=1, last_n=2, first_full=0)
    cache = ClaaCache(model.config, method)
    _, logits = generate(model, ids, cache, mask, steps=4)
    assert logits.isfinite().all() and max(cache.lengths) <= 27
    assert (logits - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("lengths", [(60, 41, 18), (26, 9)])  # 9 < 16: padding within windows
def test_a_padded_row_is_the_row_alone(family, lengths):
    model = attach(build(family))
    ids, mask = prompt(*lengths)

    def padding_error(make_cache):
        batch = generate(model, ids, make_cache(), mask, steps=4)[1]
        error = 0.0
        for row, length in enumerate(lengths):
            alone = generate(model, ids[row : row + 1, -length:], make_cache(), steps=4)[1]
            error = max(error, (batch[row] - alone[0]).abs().max().item())
        return error, batch.abs().max().item()

    method = CLAA(keep=24, keep_kv=16, layer=1, last_n=2, first_full=0)
    error, _ = padding_error(lambda: ClaaCache(model.config, method))
    plain_error, size = padding_error(lambda: None)
    # As alike as the plain model's rows, which differ by rounding.
    assert error <= max(10 * plain_error, 1e-4 * size)


@dataclass(frozen=True)
class Recording(CLAA):
    """Keeps what each layer's attention says of itself."""

    seen: list = field(default_factory=list, compare=False)

    def score(self, state, query, key, **attention):
        self.seen.append({name: attention[name] for name in attention if name != "start"})
        return super().score(state, query, key, **attention)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_scores_are_made_as_the_layer_attends(family):
    settings = {"query_pre_attn_scalar": 25} if family == "gemma2" else {}
    model = attach(build(family, **settings))
    method = Recording(keep=0.5, layer=2, last_n=3, first_full=9)
    with torch.no_grad():
        model(prompt(40)[0], past_key_values=ClaaCache(model.config, method))
    assert len(method.seen) == 3
    for layer, seen in enumerate(method.seen):
        sliding = family != "llama" and layer % 2 == 0
        assert seen["sliding_window"] == (SLIDING_WINDOW if sliding else 0)
        assert seen["softcap"] == (50.0 if family == "gemma2" else 0.0)
        assert seen["scale"] == (25**-0.5 if family == "gemma2" else 8**-0.5)
        if family == "gpt_oss":
            assert torch.equal(seen["sinks"], model.model.layers[layer].self_attn.sinks)
        else:
            assert seen["sinks"] is None


def refusal(model, kind, message):
    attention, ids = model.config._attn_implementation, prompt(20)[0]
    with torch.no_grad():
        before = model(ids).logits
    with pytest.raises(kind, match=message):
        attach(model)
    assert model.config._attn_implementation == attention
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_layers_of_another_name_are_refused():
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    refusal(
        GPT2LMHeadModel(config).eval(),
        TypeError,
        "attach: the decoder must have two or more `layers`, got 0 in GPT2LMHeadModel",
    )


def test_layers_of_another_form_are_refused():
    opt = build("opt", ffn_dim=48, word_embed_proj_dim=32)
    refusal(opt, TypeError, "attach: layers must take a cache and `position_embeddings`, got OPTD")


def test_alibi_models_are_refused():
    bloom = build("bloom", n_layer=4, n_head=4)
    refusal(bloom, TypeError, "attach: the decoder must have two or more `layers`, got 0 in Bloom")


def test_falcon_is_refused():
    config = FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    message = "attach: the decoder must have two or more `layers`, got 0 in Falcon"
    refusal(FalconForCausalLM(config).eval(), TypeError, message)


def test_chunked_attention_is_refused():
    llama4 = build(
        "llama4_text",
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=16,
        intermediate_size_mlp=48,
    )
    refusal(llama4, ValueError, "layers must be full_attention or .*, got chunked_attention for")


def test_shared_keys_are_refused():
    gemma3n = build(
        "gemma3n_text",
        num_kv_shared_layers=2,
        sliding_window=16,
        vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=16,
        altup_num_inputs=2,
        laurel_rank=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=None,
    )
    refusal(gemma3n, ValueError, "hidden states must have shape|got dummy for layer 2")


def test_latent_attention_is_refused_by_the_self_test():
    deepseek = build(
        "deepseek_v3",
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        n_shared_experts=1,
        first_k_dense_replace=2,
    )
    refusal(deepseek, ValueError, "failed the self-test: .*the 4 heads that attention sees, got 1")


def test_recurrent_layers_are_refused():
    config = build("llama").config
    config.layer_types = ["full_attention", "linear_attention"] * 2
    with pytest.raises(ValueError, match="got linear_attention for layer 1"):
        ClaaCache(config, CLAA(layer=1))
