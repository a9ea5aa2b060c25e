"""The hooks of an attached model: they act only when a ClaaCache is passed.

They are objects of the classes below, not closures, so that an attached model can be pickled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from claa_ops.huggingface.attention import LookDone, check_attention
from claa_ops.huggingface.cache import ClaaCache, Look, Parked, hide_before
from claa_ops.huggingface.generation import AttachedCache, new_cache
from claa_ops.huggingface.transformers_api import (
    Arguments,
    LayerKind,
    PreTrainedModel,
    attention_name,
    bind,
    cache_argument,
    cache_layers,
    cache_of,
    parameters,
    tensor_parallel_group,
)
from claa_ops.ops.gather_tokens import gather_tokens
from claa_ops.selection.parallel import Reduce, reduce_over
from claa_ops.selection.state import PrefillState, Turn
from claa_ops.selection.taken import TakenUp


class FirstPassDone(Exception):
    """Raised to end the first of two passes after its selection, before any later layer."""


def install_hooks(
    model: PreTrainedModel,
    decoder: nn.Module,
    layers: list[nn.Module],
    attentions: list[nn.Module],
) -> list[RemovableHandle]:
    """Install all hooks, once: torch.compile does not see those that are installed after it."""
    outer = [module for module in model.modules() if _holds(module, decoder)]
    kinds, reduce = tuple(cache_layers(model.config)), reduce_over(tensor_parallel_group(model))
    begin = BeginForward(parameters(decoder), kinds, reduce)
    before: list[tuple[nn.Module, Callable[..., Any]]] = [
        *((module, NoteArguments(parameters(module), module is model)) for module in outer),
        (decoder, begin),
        *(
            (layer, ContinueWithSelected(parameters(layer), index))
            for index, layer in enumerate(layers)
        ),
        *((module, PassCache(parameters(module))) for module in attentions),
    ]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in before]
    end = EndForward(parameters(decoder))
    return [*handles, decoder.register_forward_hook(end, with_kwargs=True)]


def _holds(module: nn.Module, decoder: nn.Module) -> bool:
    return module is not decoder and any(each is decoder for each in module.modules())


def remove_hooks(model: PreTrainedModel) -> None:
    """Take off what :func:`install_hooks` put on, wherever the model has been since."""
    for module in model.modules():
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]
                with_kwargs.pop(key, None)


@dataclass(frozen=True)
class _Hook:
    """A hook before or after a module of an attached model."""

    names: list[str]  # of the parameters of the module's forward

    def _arguments(self, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
        return bind(self.names, args, kwargs)


@dataclass(frozen=True)
class NoteArguments(_Hook):
    """Before the model and other modules around the decoder: refuse labels, note the mask.

    Multimodal models make the layers' masks themselves, and their decoders get only those.
    """

    is_model: bool

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        """Act on a ClaaCache, which is made here inside ``attached`` if there is none."""
        arguments = self._arguments(args, kwargs)
        made = new_cache(module, arguments) if self.is_model else None
        if made is not None:
            given = cache_argument(module, made)
            arguments, kwargs = {**arguments, **given}, {**kwargs, **given}
        self._note(arguments)
        return None if made is None else (args, kwargs)

    def _note(self, arguments: Arguments) -> None:
        cache = cache_of(arguments)
        if not isinstance(cache, AttachedCache):
            return
        if arguments.get("labels") is not None:
            raise ValueError(
                f"{type(cache).__name__}: labels must be None: logits are of selected tokens only"
            )
        if not isinstance(cache, ClaaCache):
            return
        if self.is_model:
            cache.given.clear()
        if "attention_mask" in self.names:
            cache.given.setdefault("attention_mask", arguments.get("attention_mask"))


@dataclass(frozen=True)
class BeginForward(_Hook):
    """Before the decoder: check that the cache fits, and tell it what comes."""

    kinds: tuple[LayerKind, ...]  # of each layer
    reduce: Reduce | None  # merges the scores of heads in several processes

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        """Act on a cache of an attached model."""
        arguments = self._arguments(args, kwargs)
        cache = cache_of(arguments)
        if not isinstance(cache, AttachedCache):
            return
        check_attention(module)
        if isinstance(cache, ClaaCache):
            arguments.update(cache.given)
            name = attention_name(module)
            if cache.method.looks_again and "flash" in name:
                raise ValueError(
                    f"ClaaCache: a second look needs sdpa or eager attention, got {name}"
                )
        name, layers = type(cache).__name__, len(self.kinds)
        if module.training:
            raise ValueError(f"{name}: the model must be in eval mode, call model.eval()")
        if arguments.get("use_cache") is False:
            raise ValueError(f"{name}: use_cache must not be False, because the cache is filled")
        if len(cache.layers) != layers:
            raise ValueError(
                f"{name}: the cache must be one of this model, which has {layers} layers, "
                f"got one of {len(cache.layers)}"
            )
        if cache.kinds != self.kinds:
            layer = next(i for i, kind in enumerate(self.kinds) if cache.kinds[i] != kind)
            raise ValueError(
                f"{name}: the cache must be one of this model, whose layer {layer} has "
                f"{_described(self.kinds[layer])}, got one with {_described(cache.kinds[layer])}"
            )
        tokens = arguments.get("input_ids")
        if tokens is None:
            tokens = arguments["inputs_embeds"]
        cache.reduce = self.reduce
        cache.begin_forward(tokens, arguments.get("attention_mask"), arguments.get("position_ids"))


def _described(kind: LayerKind) -> str:
    return kind.name if kind.window is None else f"{kind.name} over {kind.window} tokens"


@dataclass(frozen=True)
class EndForward(_Hook):
    """After the decoder."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments, output: Any
    ) -> None:
        """Act on a cache of an attached model."""
        cache = cache_of(self._arguments(args, kwargs))
        if not isinstance(cache, AttachedCache):
            return
        turn = cache.turn if isinstance(cache, ClaaCache) else None
        cache.end_forward()
        if turn is not None and turn.taken is not None:  # its tokens alone
            output.last_hidden_state = output.last_hidden_state[:, -turn.turn_length :]


@dataclass(frozen=True)
class ContinueWithSelected(_Hook):
    """Before a layer: select after the layer before it, and hand on what was selected."""

    index: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        """Act on a ClaaCache."""
        arguments = self._arguments(args, kwargs)
        cache = cache_of(arguments)
        if not isinstance(cache, ClaaCache) or not (cache.prefilling or cache.turn):
            return None
        if cache.turn is not None:
            return self._look_again(cache, cache.turn, arguments)
        if cache.taken is not None:
            return None  # called by the hook of a later layer, which has prepared all
        hidden = arguments.pop("hidden_states")
        if hidden.dim() != 3:
            raise TypeError(
                f"hidden states must have shape [batch, tokens, width], "
                f"got {list(hidden.shape)} in {type(module).__name__}"
            )
        state = cache.state
        assert state is not None  # begin_forward made it
        if not state.between_layers:
            hidden = self._select(cache, state, hidden)
        if cache.parked is not None:
            cache.parked.calls[self.index] = module, dict(arguments)
        cache.seen.append(hidden.shape[1])
        if state.positions is not None:
            # The model hands the same tensors to all layers of a type, so gather them once.
            kind = cache.layer_types[self.index]
            if kind not in cache.selected:
                cache.selected[kind] = _gather(arguments, state.positions, state.start)
            arguments.update(cache.selected[kind])
        if cache.method.reads_hidden:
            cache.hidden = hidden
        cache.look = None
        if cache.selects_within(self.index):
            hidden = self._select_within(module, hidden, arguments, cache)
        return (hidden,), arguments

    def _select_within(
        self, module: nn.Module, hidden: Tensor, arguments: Arguments, cache: ClaaCache
    ) -> Tensor:
        """Select before the layer's attention; return the hidden states that go through it.

        The layer runs twice: of all tokens up to the attention, which sees their keys, and whole
        of those that are selected. ``arguments`` become what goes with these.
        """
        state = cache.state
        assert state is not None  # begin_forward made it
        cache.look = look = Look(state.start)
        try:
            module.forward(hidden, **arguments)
        except LookDone:
            pass
        index = cache.select(self.index)
        look.index = cache.within[self.index] = index
        if index is None:
            return hidden
        if cache.first_pass:
            raise FirstPassDone
        cache.selected.clear()
        mask = arguments.pop("attention_mask", None)
        arguments.update(_gather(arguments, index, state.start))
        arguments["attention_mask"] = _mask_rows(mask, index)
        return gather_tokens(hidden, index)

    def _select(self, cache: ClaaCache, state: PrefillState, hidden: Tensor) -> Tensor:
        """The hidden states ``[B, k, C]`` of what continues, of those after the layer before."""
        taken = None if cache.parked is None else state.take_up(self.index - 1)
        if taken is not None:
            hidden = self._take_up(cache, state, taken, hidden)
        selected = cache.select(self.index - 1)
        if selected is not None and cache.first_pass:
            raise FirstPassDone
        if selected is None:
            return hidden
        cache.selected.clear()
        if not cache.method.may_park or state.layer == self.index - 1:
            cache.parked = None if state.parked is None else Parked(hidden)
            return gather_tokens(hidden, selected)
        # The method went back: the layers since then run anew, on other tokens.
        parked = cache.parked
        assert parked is not None  # the layer to which it went back
        again = range(state.layer + 1, self.index)
        cache.forget(again)
        del cache.seen[state.layer + 1 :]
        cache.parked = None
        hidden = gather_tokens(parked.hidden, selected.to(parked.hidden.device))
        for layer in again:
            block, arguments = parked.calls[layer]
            hidden = _output(block(hidden, **arguments))
        return self._select(cache, state, hidden)

    def _take_up(
        self, cache: ClaaCache, state: PrefillState, taken: TakenUp, hidden: Tensor
    ) -> Tensor:
        """Take parked tokens through the layers up to this one, and put them among the others."""
        parked = cache.parked
        assert parked is not None and state.parked is not None  # or none could be taken up
        joining = _joining(parked, taken)
        cache.selected.clear()
        cache.taken = taken
        for layer in range(state.parked + 1, self.index):
            block, given = parked.calls[layer]
            kind = cache.layer_types[layer]
            if kind not in cache.selected:
                cache.selected[kind] = _of_taken(given, taken, given.get("attention_mask"))
            joining = _output(block(joining, **{**given, **cache.selected[kind]}))
            cache.seen[layer] += joining.shape[1]
        cache.selected.clear()
        cache.taken = None
        return gather_tokens(torch.cat([hidden, joining], dim=1), taken.order())

    def _look_again(self, cache: ClaaCache, turn: Turn, arguments: Arguments) -> Any:
        """Hand on the tokens of a turn, and from the parked layer on those that it takes up."""
        assert turn.parked is not None and cache.parked is not None  # or there were no turn
        hidden = arguments.pop("hidden_states")
        if self.index == turn.parked + 1:
            cache.taken = taken = turn.take_up(turn.parked)
            if taken is not None:
                joining = _joining(cache.parked, taken)
                hidden = torch.cat([joining.to(hidden.device), hidden], dim=1)
        if cache.taken is not None:
            kind = cache.layer_types[self.index]
            if kind not in cache.selected:
                given = cache.parked.of_tokens[kind]
                cache.selected[kind] = _with_turn(given, cache.taken, arguments)
            arguments.update(cache.selected[kind])
        return (hidden,), arguments


@dataclass(frozen=True)
class PassCache(_Hook):
    """Before an attention module: give it the cache, and its layer's columns of the mask.

    The cache is passed here because some layers do not pass on arguments that they do not know.
    The mask was made for the layer that holds most.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        """Act on a ClaaCache."""
        arguments = self._arguments(args, kwargs)
        cache = cache_of(arguments)
        if not isinstance(cache, AttachedCache):
            return None
        mask = arguments.get("attention_mask")
        # Within a layer that selects it is of all tokens that the layer saw.
        if mask is not None and not (isinstance(cache, ClaaCache) and cache.look is not None):
            layer: Any = module.layer_idx
            new = arguments["hidden_states"].shape[1]
            arguments["attention_mask"] = cache.layers[layer].columns(mask, new)
        return (), {**arguments, "claa_cache": cache}


def _mask_rows(mask: Tensor | None, index: Tensor) -> Tensor | None:
    """The rows ``[B, heads, k, n]`` of a mask ``[B, heads, n, n]``; others as they are."""
    if mask is None or mask.dim() == 2:
        return mask
    mask = mask.expand(index.shape[0], -1, -1, -1)
    row = torch.arange(index.shape[0], device=index.device)[:, None]
    return mask[row, :, index.clamp_min(0)].movedim(1, 2)


_MASKS = ("attention_mask", "mamba_attention_mask")  # the latter of layers that have two
_OF_TOKENS = ("position_embeddings", "position_ids", *_MASKS)


def _gather(arguments: Arguments, positions: Tensor, start: Tensor | None) -> Arguments:
    """The arguments that go with the tokens, at the selected positions: rotary angles, masks.

    Args:
        arguments: those of a layer.
        positions: ``[B, k]``, -1 for padding.
        start: ``[B]``: the first of these that is not padding; None without padding.
    """
    angles = _angles(arguments)
    selected: Arguments = {}
    if angles:  # recurrences know the order of the tokens without them
        # A model over several devices hands what goes with the tokens from its first to all.
        device = angles[0].device
        positions, start = positions.to(device), None if start is None else start.to(device)
        # Some models transpose theirs, and gather_tokens moves whole rows.
        rows = (gather_tokens(x.contiguous(), positions) for x in angles)
        selected["position_embeddings"] = tuple(rows)
    if start is not None:
        positions = positions.clamp_min(0)
    ids = arguments.get("position_ids")
    if ids is not None:
        selected["position_ids"] = ids.expand(positions.shape[0], -1).gather(1, positions)
    for name in _MASKS:
        if (mask := arguments.get(name)) is not None:
            mask = _gather_mask(mask, positions)
            selected[name] = mask if start is None else hide_before(mask, start)
    return selected


def _angles(arguments: Arguments) -> tuple[Tensor, ...]:
    """Cosines and sines ``[batch, tokens, D]``, the only ones of a layer's tokens; or none."""
    unknown = sorted(
        name
        for name, value in arguments.items()
        if name not in _OF_TOKENS and isinstance(value, Tensor) and value.dim() > 1
    )
    if unknown:
        raise TypeError(f"layers must take nothing else of each token, got {', '.join(unknown)}")
    angles = arguments.get("position_embeddings")
    if angles is None:
        return ()
    if not isinstance(angles, tuple) or any(x.dim() != 3 for x in angles):
        raise TypeError("position_embeddings must be cosines and sines [batch, tokens, D]")
    return angles


def _joining(parked: Parked, taken: TakenUp) -> Tensor:
    """``[B, r, C]``: the parked hidden states of tokens that are taken up."""
    return gather_tokens(parked.hidden, taken.among_parked.to(parked.hidden.device))


def _of_taken(given: Arguments, taken: TakenUp, mask: Tensor | None) -> Arguments:
    """The arguments that go with tokens that were taken up.

    Args:
        given: those of a layer, for all tokens of the prompt.
        taken: which of them they are.
        mask: one that the layer's attention takes: theirs has its form.
    """
    angles = _angles(given)
    index = taken.index.to(angles[0].device)  # the first of a model's devices
    rows = (gather_tokens(x.contiguous(), index) for x in angles)
    of_taken: Arguments = {"position_embeddings": tuple(rows)}
    if (ids := given.get("position_ids")) is not None:
        ids = ids.expand(index.shape[0], -1)
        of_taken["position_ids"] = ids.gather(1, index.clamp_min(0))
    visible = taken.visible()[:, None]
    if mask is not None and mask.is_floating_point():
        hidden = torch.finfo(mask.dtype).min
        visible = torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, hidden)
    return {**of_taken, "attention_mask": visible}


def _with_turn(given: Arguments, taken: TakenUp, arguments: Arguments) -> Arguments:
    """The same, and after them those of a turn, whose own ``arguments`` are."""
    joined = _of_taken(given, taken, arguments.get("attention_mask"))
    batch = taken.index.shape[0]
    joined["position_embeddings"] = tuple(
        torch.cat([old, new.expand(batch, -1, -1)], dim=1)
        for old, new in zip(joined["position_embeddings"], _angles(arguments), strict=True)
    )
    if (ids := arguments.get("position_ids")) is not None:
        joined["position_ids"] = torch.cat([joined["position_ids"], ids.expand(batch, -1)], dim=1)
    return joined


def _output(output: Any) -> Tensor:
    """The hidden states that a layer returns, in some models with other things."""
    return output[0] if isinstance(output, tuple) else output


def _gather_mask(mask: Tensor, positions: Tensor) -> Tensor:
    """A mask ``[B, N]`` or ``[B, heads, N, N]`` at the positions ``[B, k]``."""
    if mask.dim() == 2:
        return mask.gather(1, positions)
    row = torch.arange(positions.shape[0], device=positions.device)[:, None, None]
    mask = mask.expand(positions.shape[0], -1, -1, -1)
    kept = mask[row, :, positions[:, :, None], positions[:, None, :]]  # [B, k, k, heads]
    return kept.movedim(-1, 1)
