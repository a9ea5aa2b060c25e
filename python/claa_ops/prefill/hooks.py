"""The hooks of an attached model: they act only when a ClaaCache is passed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from claa_ops.ops.gather_tokens import gather_tokens
from claa_ops.prefill.attached import AttachedCache
from claa_ops.prefill.cache import ClaaCache, hide_before
from claa_ops.prefill.transformers_api import Arguments, bind, cache_of, parameters


class FirstPassDone(Exception):
    """Ends the first of two passes after its selection: no layer behind it runs."""


def install_hooks(
    model: nn.Module,
    decoder: nn.Module,
    layers: list[nn.Module],
    attentions: list[nn.Module],
) -> list[RemovableHandle]:
    """Hooks stay for good: torch.compile does not see those that come after it."""
    handles = [
        model.register_forward_pre_hook(_refuse_labels(model), with_kwargs=True),
        decoder.register_forward_pre_hook(_begin_forward(decoder), with_kwargs=True),
        decoder.register_forward_hook(_end_forward(decoder), with_kwargs=True),
    ]
    for index, layer in enumerate(layers[1:], start=1):
        hook = _continue_with_selected(layer, index)
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    for attention in attentions:
        hook = _pass_cache(attention)
        handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def _refuse_labels(model: nn.Module) -> Callable[..., None]:
    names = parameters(model)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        arguments = bind(names, args, kwargs)
        cache = cache_of(arguments)
        if isinstance(cache, ClaaCache) and arguments.get("labels") is not None:
            raise ValueError("ClaaCache: labels must be None: logits are of selected tokens only")

    return hook


def _begin_forward(decoder: nn.Module) -> Callable[..., None]:
    names = parameters(decoder)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        arguments = bind(names, args, kwargs)
        cache = cache_of(arguments)
        if not isinstance(cache, AttachedCache):
            return
        name, layers = type(cache).__name__, len(cast(Any, module).layers)
        if module.training:
            raise ValueError(f"{name}: the model must be in eval mode, call model.eval()")
        if arguments.get("use_cache") is False:
            raise ValueError(f"{name}: use_cache must not be False, because the cache is filled")
        if len(cache.layers) != layers:
            raise ValueError(
                f"{name}: the cache must be one of this model, which has {layers} layers, "
                f"got one of {len(cache.layers)}"
            )
        tokens = arguments.get("input_ids")
        if tokens is None:
            tokens = arguments["inputs_embeds"]
        cache.begin_forward(tokens, arguments.get("attention_mask"), arguments.get("position_ids"))

    return hook


def _end_forward(decoder: nn.Module) -> Callable[..., None]:
    names = parameters(decoder)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments, output: Any) -> None:
        cache = cache_of(bind(names, args, kwargs))
        if isinstance(cache, AttachedCache):
            cache.end_forward()

    return hook


def _continue_with_selected(layer: nn.Module, index: int) -> Callable[..., Any]:
    """Before a layer: select after the layer before it, and hand on what was selected."""
    names = parameters(layer)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        arguments = bind(names, args, kwargs)
        cache = cache_of(arguments)
        if not isinstance(cache, ClaaCache) or not cache.prefilling:
            return None
        hidden = arguments.pop("hidden_states")
        if hidden.dim() != 3:
            raise TypeError(
                f"attach: hidden states must have shape [batch, tokens, width], "
                f"got {list(hidden.shape)} in {type(module).__name__}"
            )
        state = cache.state
        assert state is not None  # begin_forward made it
        selected = state.select(index - 1)
        if selected is not None and cache.first_pass:
            raise FirstPassDone
        if selected is not None:
            cache.selected.clear()
            hidden = gather_tokens(hidden, selected)
        if state.positions is not None:
            # The model hands the same tensors to all layers of a type, so gather them once.
            kind = cache.layer_types[index]
            if kind not in cache.selected:
                cache.selected[kind] = _gather(arguments, state.positions, state.start)
            arguments.update(cache.selected[kind])
        return (hidden,), arguments

    return hook


def _pass_cache(attention: nn.Module) -> Callable[..., Any]:
    """Some layers do not forward what they do not know: the attention module gets the cache."""
    names = parameters(attention)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        cache = cache_of(bind(names, args, kwargs))
        attached = isinstance(cache, AttachedCache)
        return (args, {**kwargs, "claa_cache": cache}) if attached else None

    return hook


def _gather(arguments: Arguments, positions: Tensor, start: Tensor | None) -> Arguments:
    """What goes with the tokens, for the selected positions; these keep their rotary angles.

    Args:
        arguments: of a layer.
        positions: ``[B, k]``, -1 for padding.
        start: ``[B]``: the first of these that is not padding; None without padding.
    """
    embeddings = arguments["position_embeddings"]
    if not isinstance(embeddings, tuple) or any(x.dim() != 3 for x in embeddings):
        raise TypeError("attach: position_embeddings must be cosines and sines [batch, tokens, D]")
    # Some models transpose theirs, and rows are moved whole.
    rows = (gather_tokens(x.contiguous(), positions) for x in embeddings)
    selected: Arguments = {"position_embeddings": tuple(rows)}
    if start is not None:
        positions = positions.clamp_min(0)
    ids, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    if ids is not None:
        selected["position_ids"] = ids.expand(positions.shape[0], -1).gather(1, positions)
    if mask is not None and mask.dim() == 2:
        mask = mask.gather(1, positions)
    elif mask is not None:
        row = torch.arange(positions.shape[0], device=positions.device)[:, None, None]
        mask = mask.expand(positions.shape[0], -1, -1, -1)
        kept = mask[row, :, positions[:, :, None], positions[:, None, :]]  # [B, k, k, heads]
        mask = kept.movedim(-1, 1)
    if mask is not None:
        selected["attention_mask"] = mask if start is None else hide_before(mask, start)
    return selected
