"""Models in the shapes of known ones, with random weights."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import dispatch_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_LLAMA = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "vocab_size": 128_256,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": ("llama", _LLAMA),
    "Llama-3.2-3B": (
        "llama",
        _LLAMA
        | {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "tie_word_embeddings": True,
        },
    ),
    "Mistral-Nemo-12B": (
        "mistral",
        _LLAMA
        | {
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "vocab_size": 131_072,
            "sliding_window": None,
        },
    ),
    "Qwen3-8B": (
        "qwen3",
        _LLAMA | {"intermediate_size": 12_288, "num_hidden_layers": 36, "vocab_size": 151_936},
    ),
    "Llama-3.1-70B": (
        "llama",
        _LLAMA
        | {
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
    ),
}
_STD = 0.02


def build(name: str, devices: Sequence[str], **changes: Any) -> PreTrainedModel:
    """A model of these shapes in bfloat16, its layers spread evenly over the devices in order.

    Args:
        name: one of ``MODELS``.
        devices: such as ``["cuda:0", "cuda:1"]``.
        changes: of the configuration.
    """
    family, sizes = MODELS[name]
    config = AutoConfig.for_model(family, max_position_embeddings=1 << 18, **(sizes | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    places = _places(model, devices)
    for path, device in places.items():
        model.get_submodule(path).to_empty(device=device)
    decoder: Any = model.get_decoder()
    with torch.device(devices[0]):  # it computes its buffer where it is made
        decoder.rotary_emb = type(decoder.rotary_emb)(config)
    model.tie_weights()
    for parameter_name, parameter in model.named_parameters():
        _fill(parameter_name, parameter)
    if len(devices) == 1:
        return model
    passed: Any = model._skip_keys_device_placement  # caches, whose layers stay where they are
    return dispatch_model(model, places, main_device=devices[0], skip_keys=passed)


def _places(model: PreTrainedModel, devices: Sequence[str]) -> dict[str, str]:
    """Of each module that holds weights its device; the head is where the last layer is."""
    layers = len(model.get_decoder().layers)
    return {
        "model.embed_tokens": devices[0],
        "model.rotary_emb": devices[0],
        **{f"model.layers.{i}": devices[i * len(devices) // layers] for i in range(layers)},
        "model.norm": devices[-1],
        "lm_head": devices[-1],
    }


@torch.no_grad()
def _fill(name: str, parameter: nn.Parameter) -> None:
    if parameter.dim() > 1:
        parameter.normal_(std=_STD)
    else:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
