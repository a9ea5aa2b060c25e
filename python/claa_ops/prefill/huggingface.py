"""Attach a Hugging Face decoder: permanent hooks that act when a ClaaCache is passed."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from claa_ops.methods.claa import CLAA
from claa_ops.prefill.attention import register_attention, unwrapped
from claa_ops.prefill.cache import ClaaCache
from claa_ops.prefill.hooks import install_hooks
from claa_ops.prefill.transformers_api import (
    AttentionFunction,
    PreTrainedModel,
    attention_function,
    attention_name,
    cache_argument,
    cache_name,
    decoder_of,
    parameters,
    set_attention,
)


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare a decoder for :class:`ClaaCache`, once; without one it works as before.

    Installs forward pre-hooks and an attention function that calls the model's own, so nothing of
    the model is copied or replaced, and ``torch.compile`` may follow. Then two tiny forwards
    must show that keeping everything gives the plain model's logits and that keeping half
    shortens the sequence.

    Args:
        model: a decoder of transformers 5.17 or later whose layers take ``past_key_values`` and
            ``position_embeddings``, with sdpa, eager or flash attention, on one device.

    Returns:
        The same model.

    Raises:
        TypeError: the model's layers are not of that form.
        ValueError: its attention, the kind of a layer or its device map is not served, or it
            fails the self-test. The model is then as it was before.

    Example::

        model = attach(AutoModelForCausalLM.from_pretrained(name))
        model.generate(ids, past_key_values=ClaaCache(model.config, CLAA(keep=0.1)))
    """
    decoder = decoder_of(model)
    if getattr(decoder, "claa_attached", False):
        return model
    layers, attentions = _layers(model, decoder)
    configured = attention_name(decoder)
    base_name, base = _base_attention(configured, attentions[0])
    plain = _tiny_forward(model, None)

    family = type(attentions[0]).__module__.rpartition(".")[2]
    handles = install_hooks(model, decoder, layers, attentions)
    try:
        name = register_attention(base_name, base, family)
        set_attention(decoder, name)
        _self_test(model, plain)
    except Exception as error:
        for handle in handles:
            handle.remove()
        set_attention(decoder, configured)
        raise ValueError(f"attach: {type(model).__name__} failed the self-test: {error}") from error
    decoder.claa_attached = True
    return model


def _layers(model: PreTrainedModel, decoder: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The decoder's layers and their attention modules, if they have the form that is needed."""
    name = type(model).__name__
    layers = list(getattr(decoder, "layers", []))
    if len(layers) < 2:
        raise TypeError(
            f"attach: the decoder must have two or more `layers`, got {len(layers)} in {name}"
        )
    taken = parameters(layers[0])
    if cache_name(taken) is None or "position_embeddings" not in taken:
        raise TypeError(
            f"attach: layers must take a cache and `position_embeddings`, got "
            f"{type(layers[0]).__name__}, which takes {', '.join(taken)}"
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            f"attach: the model must be on one device and not tensor parallel, got "
            f"{', '.join(map(str, devices))} and tp_size {getattr(model, 'tp_size', None)}"
        )
    # A trial cache refuses the kinds of layers that none could serve.
    ClaaCache(model.config, _trial(keep=1.0))
    attentions = [
        module
        for layer in layers
        for module in layer.modules()
        if hasattr(module, "layer_idx")
        and cache_name(parameters(module)) is not None
        and module is not layer
    ]
    if len(attentions) != len(layers):
        raise TypeError(
            f"attach: each of the {len(layers)} layers must have one attention module with "
            f"`layer_idx` and `past_key_values`, got {len(attentions)} in {name}"
        )
    return layers, attentions


def _base_attention(name: str, attention: nn.Module) -> tuple[str, AttentionFunction]:
    """Name and function of the attention that the model computes."""
    # A configuration taken from an attached model has the name that attach gave it.
    name = {"claa_sdpa": "sdpa"}.get(name, "eager" if name.startswith("claa_eager") else name)
    family = sys.modules[type(attention).__module__]
    if name == "eager" and hasattr(family, "eager_attention_forward"):
        return name, family.eager_attention_forward
    if name == "sdpa" or "flash" in name:
        return name, unwrapped(attention_function(name))
    raise ValueError(f"attach: attention must be sdpa, eager or flash attention, got {name}")


_TRIAL_TOKENS, _TRIAL_PADDING = 16, 4


def _trial(keep: float) -> CLAA:
    return CLAA(keep=keep, layer=0, last_n=1, first_full=0, window=4, kernel_size=3)


@torch.no_grad()
def _tiny_forward(model: PreTrainedModel, cache: ClaaCache | None) -> Tensor:
    """Logits of two short prompts, one of them padded."""
    device = model.device
    ids = torch.arange(2 * _TRIAL_TOKENS, device=device).view(2, _TRIAL_TOKENS) + 1
    mask = torch.ones_like(ids)
    mask[0, :_TRIAL_PADDING] = 0
    training = model.training
    model.eval()
    try:
        output = model(
            input_ids=ids, attention_mask=mask, use_cache=True, **cache_argument(model, cache)
        )
    finally:
        model.train(training)
    return output[0]


def _self_test(model: PreTrainedModel, plain: Tensor) -> None:
    name = type(model).__name__
    # The last token only: what padding sees is unspecified.
    everything = _tiny_forward(model, ClaaCache(model.config, _trial(keep=1.0)))[:, -1]
    error = (everything - plain[:, -1]).abs().max().item()
    # Equal to the bit, unless the model itself is not deterministic, as some mixtures of experts.
    tolerance = max(1e-3, 4 * torch.finfo(plain.dtype).eps)
    if not error <= tolerance * plain[:, -1].abs().max().item():
        raise ValueError(
            f"attach: keeping all tokens must not change {name}, got error {error:.1e}"
        )
    cache = ClaaCache(model.config, _trial(keep=0.5))
    half = _tiny_forward(model, cache)
    if half.shape[1] != _TRIAL_TOKENS // 2 or cache.lengths[-1] > _TRIAL_TOKENS // 2:
        raise ValueError(
            f"attach: keeping half of {_TRIAL_TOKENS} tokens must shorten the layers of {name}, "
            f"got {half.shape[1]} tokens and caches of {cache.lengths}"
        )
