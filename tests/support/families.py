"""The families of models that the tests build: those that attach, and those that are refused."""

import copy

from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from support.tiny_models import COMMON, EXTRA, SLIDING_WINDOW, UNSET, build, initialized

_MIXTURE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}

_WINDOWS = {
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

# Settings besides those that all have.
SERVED: dict[str, dict] = {
    "afmoe": {**_MIXTURE, **_WINDOWS},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": _WINDOWS,
    "cwm": _WINDOWS,
    "doge": {},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone4": _WINDOWS,
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma4_text": {
        **_WINDOWS,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": _MIXTURE,
    "gpt_neox": {},
    "gpt_oss": {},
    "granite": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jais2": {},
    "llama": {},
    "minimax_m2": _MIXTURE,
    "ministral": _WINDOWS,
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": _WINDOWS,
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOWS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2_moe": {**_MIXTURE, "shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_moe": _MIXTURE,
    "seed_oss": {},
    "smollm3": {},
    "solar_open": _MIXTURE,
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": _WINDOWS,
}

_DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
_CONV = {"layer_types": ["conv", "full_attention"] * 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
_SHARED_EXPERT = {**_MIXTURE, "shared_expert_intermediate_size": 32}

# What the layers, or parts of layers, without attention are; and settings.
HYBRID: dict[str, tuple[str, dict]] = {
    "lfm2": ("short convolutions", _CONV),
    "lfm2_moe": ("short convolutions", {**_MIXTURE, **_CONV, "num_dense_layers": 1}),
    "qwen3_next": ("gated delta rules", {**_SHARED_EXPERT, **_DELTA}),
    "qwen3_5_text": ("gated delta rules", _DELTA),
    "qwen3_5_moe_text": ("gated delta rules", {**_SHARED_EXPERT, **_DELTA}),
    "olmo_hybrid": ("gated delta rules", _DELTA),
    "falcon_h1": (
        "Mamba 2, beside the attention of each layer",
        {**_MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 32},
    ),
    "bamba": ("Mamba 2", {**_MAMBA, "attn_layer_indices": [1, 3]}),
    "granitemoehybrid": (
        "Mamba 2",
        {**_MAMBA, "layer_types": _DELTA["layer_types"], "position_embedding_type": "nope"},
    ),
    "nemotron_h": (
        "Mamba 2 and feed-forward layers",
        {
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "jamba": ("Mamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
}

# Settings, and words of the refusal.
REFUSED: dict[str, tuple[dict, str]] = {
    "bloom": ({}, "bias on attention (ALiBi)"),
    "codegen": ({"rotary_dim": 8}, "its layers are called `h`, not `layers`"),
    "deepseek_v3": (
        {
            **_MIXTURE,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 2,
        },
        "attention must see the heads that the cache holds, got 4 and 1",
    ),
    "diffllama": ({}, "a layer must attend once, got two calls"),
    "falcon": ({"head_dim": UNSET}, "its layers are called `h`, not `layers`"),
    "gemma3n_text": (
        {
            "num_kv_shared_layers": 2,
            "sliding_window": 16,
            "vocab_size_per_layer_input": 99,
            "hidden_size_per_layer_input": 16,
            "altup_num_inputs": 2,
            "laurel_rank": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": None,
        },
        "layers that use the keys of others",
    ),
    "gpt2": ({}, "adds positions to the embeddings (`wpe`)"),
    "gpt_bigcode": ({}, "adds positions to the embeddings (`wpe`)"),
    "gpt_neox_japanese": ({}, "computes attention by code of its own"),
    "gptj": ({"rotary_dim": 8}, "its layers are called `h`, not `layers`"),
    "jetmoe": ({}, "attention must see the heads that the cache holds, got 4 and 2"),
    "kimi_linear": (
        {
            **_MIXTURE,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
        },
        "attention must see the heads that the cache holds, got 4 and 1",
    ),
    "llama4_text": (
        {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 16,
            "intermediate_size_mlp": 48,
        },
        "attend otherwise than in full or in sliding windows: chunked_attention",
    ),
    "mamba": ({}, "recurrent alone"),
    "minimax": (
        {**_MIXTURE, "layer_types": ["linear_attention", "full_attention"] * 2},
        "uses cache of its own",
    ),
    "mpt": ({"d_model": 32, "n_layers": 4, "n_heads": 4}, "bias on attention (ALiBi)"),
    "opt": (
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "adds positions to the embeddings (`embed_positions`)",
    ),
    "recurrent_gemma": ({}, "take no `position_embeddings`"),
    "rwkv": ({"attention_hidden_size": 32}, "recurrent alone"),
    "zamba2": (
        {
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "num_mem_blocks": 1,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "mamba_d_state": 8,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
        "layers share it",
    ),
}

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_CLIP = {**_VISION, "model_type": "clip_vision_model"}
_SIGLIP = {**_VISION, "model_type": "siglip_vision_model"}
_PIXTRAL = {**_VISION, "model_type": "pixtral", "head_dim": 8}
_QWEN_VISION = {
    "depth": 1,
    "embed_dim": 16,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "intermediate_size": 16,
    "out_hidden_size": 32,
}
_QWEN_ROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
}
_INDEX, _ID = {"image_token_index": 98}, {"image_token_id": 98}
_QWEN_IDS = {**_ID, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}

# Models that also read images, given text: the text model, and the settings around it.
MULTIMODAL: dict[str, tuple[str, dict, dict]] = {
    "aya_vision": ("cohere2", _WINDOWS, {"vision_config": _SIGLIP, **_INDEX}),
    "cohere2_vision": ("cohere2", _WINDOWS, {"vision_config": _SIGLIP, **_ID}),
    "gemma3": ("gemma3_text", {}, {"vision_config": _SIGLIP, **_INDEX, "mm_tokens_per_image": 1}),
    "glm4v": ("glm4v_text", _QWEN_ROPE, {"vision_config": {**_QWEN_VISION, "hidden_size": 16}}),
    "idefics3": (
        "llama",
        {},
        {"vision_config": {**_VISION, "model_type": "idefics3_vision"}, **_ID, "pad_token_id": 0},
    ),
    "internvl": (
        "qwen2",
        {},
        {
            "vision_config": {
                **_VISION,
                "model_type": "internvl_vision",
                "image_size": [28, 28],
                "patch_size": [14, 14],
            },
            **_ID,
        },
    ),
    "llava": ("llama", {}, {"vision_config": _CLIP, **_INDEX}),
    "llava_next": ("mistral", {}, {"vision_config": _CLIP, **_INDEX}),
    "llava_onevision": ("qwen2", {}, {"vision_config": _SIGLIP, **_INDEX}),
    "mistral3": ("mistral", {}, {"vision_config": _PIXTRAL, **_INDEX}),
    "qwen2_vl": (
        "qwen2_vl_text",
        _QWEN_ROPE,
        {"vision_config": {**_QWEN_VISION, "hidden_size": 32}, **_QWEN_IDS},
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl_text",
        _QWEN_ROPE,
        {"vision_config": {**_QWEN_VISION, "hidden_size": 16}, **_QWEN_IDS},
    ),
    "qwen3_vl": (
        "qwen3_vl_text",
        _QWEN_ROPE,
        {
            "vision_config": {
                **_QWEN_VISION,
                "hidden_size": 16,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            **_QWEN_IDS,
        },
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {**_DELTA, **_QWEN_ROPE},
        {
            "vision_config": {**_QWEN_VISION, "hidden_size": 16, "num_position_embeddings": 16},
            **_QWEN_IDS,
        },
    ),
    "lfm2_vl": (
        "lfm2",
        _CONV,
        {"vision_config": {**_VISION, "model_type": "siglip2_vision_model"}, **_ID},
    ),
    "gemma4": (
        "gemma4_text",
        SERVED["gemma4_text"],
        {
            "vision_config": {**_VISION, "model_type": "gemma4_vision", "head_dim": 8},
            "audio_config": None,
            **_ID,
        },
    ),
    "smolvlm": ("llama", {}, {"vision_config": {**_VISION, "model_type": "smolvlm_vision"}, **_ID}),
}

# Families that give wrong results in a release without this package.
NOT_IN = {("doge", "5.17"): "a padded row is not the row alone in the plain model"}


def missing(family: str, release: str) -> str | None:
    """Why a release of transformers has no such model, if it has none."""
    if family not in CONFIG_MAPPING:
        return f"transformers {release} has no {family}"
    return NOT_IN.get((family, ".".join(release.split(".")[:2])))


def _settings(family: str) -> dict:
    if family in HYBRID:
        return HYBRID[family][1]
    return SERVED[family] if family in SERVED else REFUSED[family][0]


def build_family(family: str, attention: str | None = None) -> PreTrainedModel:
    """A tiny random model of any of the families above."""
    if family not in MULTIMODAL:
        return build(family, attention, **_settings(family))
    text, changes, around = MULTIMODAL[family]
    # Copies: configurations change what they are given.
    text_config = {**COMMON, **EXTRA.get(text, {}), **copy.deepcopy(changes), "model_type": text}
    config = AutoConfig.for_model(family, text_config=text_config, **around)
    return initialized(lambda: AutoModelForImageTextToText.from_config(config))


_PAGE = """# Architectures

What `attach` was tested on, by the names that configurations call `model_type`: tiny random models
of every family here, built, prefilled and decoded by tests/huggingface/test_models.py with
transformers {releases}. Other models of the same form are likely to work; `attach` tests the
one that it is given and says why it refuses one.

## Served

For each of them: without a `ClaaCache` the model works as before; `keep=1.0` generates the plain
model's tokens and logits; with `keep < 1` the caches shrink, and every row of a padded batch is
prefilled and decoded as it is alone. Llama and Mistral are also compared, for `keep < 1`, with
loops written by hand (tests/huggingface/hand_loop.py).

| family | attention | with these releases |
|---|---|---|
{served}

## Hybrid decoders

Most of their layers, or a part of each layer, hand a state of fixed size from token to token
instead of attending. The same holds for them, and `keep < 1` is also compared with a loop written
by hand around the plain layers, in several turns (tests/support/layer_loop.py). Real models were
not at hand: **what a selection costs in accuracy was not measured**, and a state that reads only
the kept tokens is another state than one of the whole prompt.

- Layers that attend rank and have caches that are compressed. After the selection all layers, the
  recurrent ones too, read the kept tokens alone, in their order; states of earlier layers are of
  the whole prompt. In a padded batch the padding stays hidden from them.
- `layer` names any layer of the model: tokens are dropped after it, by the ranking of the layers
  with attention up to it. There must be one of these up to it, and one after it. A default that
  finds none moves to the nearest layer that has both.
- All else that a method counts is layers with attention: `last_n`, `first_full`, `equal_cache`
  and the depth of a pyramid.
- `cache.lengths` is 0 where nothing attends, `cache.nbytes()` has the states, and the work that is
  reported has the weights of all layers and the attention of those that attend.

| family | besides full attention | with these releases |
|---|---|---|
{hybrid}

A turn of several tokens is what the plain model makes of it: in Jamba that forgets the states of
the prompt. `StaticClaaCache` holds states, but no layers that attend and recur at once
(`falcon_h1`).

## Served with prompts of text

The decoders of models that read images too. Prompts with images were not tested.

| family | decoder | with these releases |
|---|---|---|
{multimodal}

## Refused

Also `gemma4_text` and `gemma4` where layers use the keys of others (`num_kv_shared_layers`), as in
E2B and E4B.

| family | because |
|---|---|
{refused}
"""


def page(releases: str) -> str:
    """docs/architectures.md."""

    def tested(family: str) -> str:
        but = [f"{release}: {why}" for (name, release), why in NOT_IN.items() if name == family]
        return f"all but {', '.join(but)}" if but else "all"

    def attention(family: str) -> str:
        sliding = "sliding_window" in {**SERVED[family], **EXTRA.get(family, {})}
        return "full and sliding windows" if sliding else "full"

    lines = {
        "served": [f"| `{name}` | {attention(name)} | {tested(name)} |" for name in SERVED],
        "hybrid": [f"| `{name}` | {what} | {tested(name)} |" for name, (what, _) in HYBRID.items()],
        "multimodal": [
            f"| `{name}` | `{text}` | {tested(name)} |" for name, (text, *_) in MULTIMODAL.items()
        ],
        "refused": [f"| `{name}` | {why} |" for name, (_, why) in REFUSED.items()],
    }
    return _PAGE.format(releases=releases, **{key: "\n".join(each) for key, each in lines.items()})
