"""What the adapter requires of a model, and why it refuses one, in one sentence."""

from __future__ import annotations

from typing import Any

from torch import nn

from claa_ops.huggingface.transformers_api import (
    WITH_NOTHING,
    WITH_STATES,
    PreTrainedModel,
    attention_can_be_set,
    cache_layers,
    cache_name,
    has_alibi,
    is_encoder_decoder,
    parameters,
    placement,
)

_SERVED = ("full_attention", "sliding_attention", *WITH_STATES, *WITH_NOTHING)


def layers_and_attentions(
    model: PreTrainedModel, decoder: nn.Module
) -> tuple[list[nn.Module], list[nn.Module]]:
    """The decoder's layers, and the attention module of each that has one.

    Raises:
        TypeError: the model is not of the form that the adapter needs.
        ValueError: its weights are not where its layers run, or a layer is of a kind not served.
    """
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise TypeError(f"attach: model must be attached before torch.compile, got {name}")
    obstacle = placement(model)
    if obstacle is not None:
        raise ValueError(f"attach: {name} must {obstacle}")
    reason = _unserved_form(model, decoder)
    if reason is not None:
        raise TypeError(f"attach: {name} is not served: {reason}")
    kinds = cache_layers(model.config)
    layers = _stack(decoder)[1]
    reason = _unserved_kinds([kind.name for kind in kinds], len(layers))
    if reason is not None:
        raise ValueError(f"attach: {name} is not served: {reason}")
    attending = [index for index, kind in enumerate(kinds) if kind.attends]
    if len(attending) < 2:
        raise TypeError(
            f"attach: {name} is not served: a selection goes between two layers that attend, "
            f"got {len(attending)}"
        )
    attentions = [each for index in attending for each in _attentions(layers[index])]
    if len(attentions) != len(attending):
        raise TypeError(
            f"attach: {name} is not served: each of its {len(attending)} layers that attend must "
            f"have one attention module with `layer_idx` that takes the cache, got "
            f"{len(attentions)} in all"
        )
    numbers: list[Any] = [each.layer_idx for each in attentions]
    if numbers != attending:
        raise TypeError(
            f"attach: {name} is not served: the attention of its layers "
            f"{', '.join(map(str, attending))} must have their numbers, got "
            f"{', '.join(map(str, numbers))}: layers share it"
        )
    return layers, attentions


def _unserved_form(model: PreTrainedModel, decoder: nn.Module) -> str | None:
    """What keeps a decoder from being served, the deepest reason first."""
    config = model.config.get_text_config(decoder=True)
    if is_encoder_decoder(model.config):
        return "it is an encoder-decoder, whose prompt the encoder reads"
    stack, layers = _stack(decoder)
    if not layers:
        return f"its decoder, {type(decoder).__name__}, has no list of layers"
    block, taken = type(layers[0]).__name__, parameters(layers[0])
    kinds = cache_layers(model.config)
    if all(kind.states and not kind.attends for kind in kinds) or "state" in taken:
        return f"its layers ({block}) are recurrent alone, and a ranking is made of attention"
    if has_alibi(config, taken):
        return (
            f"its layers ({block}) know positions from a bias on attention (ALiBi), "
            "which goes by the places of the tokens in the cache"
        )
    learned = _position_module(decoder, stack)
    if "position_embeddings" not in taken and learned is not None:
        return (
            f"it adds positions to the embeddings (`{learned}`), and its layers ({block}) take no "
            "`position_embeddings`"
        )
    if stack != "layers":
        return f"its layers are called `{stack}`, not `layers`"
    if "position_embeddings" not in taken and not _orders_by_recurrence(model, decoder):
        return f"its layers ({block}) take no `position_embeddings`, got {', '.join(taken)}"
    if cache_name(taken) is None:
        return f"its layers ({block}) take no cache, got {', '.join(taken)}"
    if not attention_can_be_set(decoder):
        return f"{type(decoder).__name__} computes attention by code of its own that cannot be set"
    return None


def _unserved_kinds(kinds: list[str], layers: int) -> str | None:
    """Why layers of these kinds cannot be served, if they cannot."""
    strange = sorted(set(kinds) - set(_SERVED))
    if "dummy" in strange or len(kinds) < layers:
        return "it has layers that use the keys of others or none"
    if strange:
        kinds_named = ", ".join(strange)
        return f"its layers attend otherwise than in full or in sliding windows: {kinds_named}"
    return None


def _stack(decoder: nn.Module) -> tuple[str, list[nn.Module]]:
    """The longest list of modules in a decoder, and what it is called."""
    lists = {
        name: list(module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and "." not in name
    } or {
        name: list(module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if "layers" in lists:
        return "layers", lists["layers"]
    return max(lists.items(), key=lambda item: len(item[1]), default=("", []))


def _position_module(decoder: nn.Module, stack: str) -> str | None:
    """The module outside the layers that positions are looked up in, if there is one."""
    outside = (name for name, _ in decoder.named_modules() if not name.startswith(stack))
    last = ((name, name.rpartition(".")[2]) for name in outside)
    return next((name for name, end in last if end == "wpe" or "position" in end), None)


def _orders_by_recurrence(model: PreTrainedModel, decoder: nn.Module) -> bool:
    """Whether attention knows no positions, which is for the recurrent layers to know."""
    recurrent = any(kind.states for kind in cache_layers(model.config))
    return recurrent and not any("rotary" in name for name, _ in decoder.named_modules())


def _attentions(layer: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in layer.modules()
        if module is not layer
        and hasattr(module, "layer_idx")
        and cache_name(parameters(module)) is not None
        and not _convolves(module)  # a recurrence, which takes the cache too
    ]


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv1d) for part in module.modules())
