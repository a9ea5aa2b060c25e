"""A fixed-size cache of a prefilled prompt, for compiled decoding and CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from claa_ops.huggingface.cache import ClaaCache, StateLayer, visible_columns
from claa_ops.huggingface.generation import AttachedCache, Request
from claa_ops.huggingface.prompt import check_mask
from claa_ops.huggingface.transformers_api import StaticLayer
from claa_ops.selection.state import check_count


class StaticClaaCache(AttachedCache):
    """Copy of a prefilled :class:`ClaaCache` with room for a fixed number of new tokens.

    Every step of decoding then has the same shapes and addresses, so ``generate`` compiles it,
    and a CUDA graph can replay it. The layers keep their different lengths, and those without
    attention their states; the model must be attached.

    Args:
        cache: the cache of a prompt that has been prefilled. It can be dropped afterwards.
        max_new_tokens: how many more tokens there is room for.

    Raises:
        TypeError: ``cache`` is not a :class:`ClaaCache`, or ``max_new_tokens`` not an integer.
        ValueError: nothing has been prefilled, a layer has a sliding window or attention beside a
            recurrence, or ``max_new_tokens`` is below 1; later, more tokens come than there is
            room for.

    Example::

        cache = ClaaCache(model.config, CLAA(keep=0.1))
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        model.generate(
            torch.cat([ids, token], dim=1),
            past_key_values=StaticClaaCache(cache, max_new_tokens=64),
            max_new_tokens=63,
        )
    """

    layers: list[Any]

    def __init__(self, cache: ClaaCache, max_new_tokens: int) -> None:
        if not isinstance(cache, ClaaCache):
            raise TypeError(
                f"StaticClaaCache: cache must be a ClaaCache, got {type(cache).__name__}"
            )
        check_count("StaticClaaCache", "max_new_tokens", max_new_tokens)
        if cache.get_seq_length() == 0:
            raise ValueError("StaticClaaCache: a prompt must have been prefilled, got none")
        if any(layer.is_sliding for layer in cache.layers):
            raise ValueError("StaticClaaCache: all layers must have full attention, got a window")
        if "hybrid" in cache.layer_types:
            raise ValueError(
                "StaticClaaCache: layers must attend or hand on a state, got layers that do both"
            )
        super().__init__(layers=[_copy(layer, max_new_tokens) for layer in cache.layers])
        self.kinds, self._first = cache.kinds, cache.attending[0]
        first, seen = cache.layers[self._first], cache.get_seq_length()
        # A tensor, like the lengths of the layers: torch.compile compiles anew for another int.
        self._dropped = torch.tensor(seen - first.get_seq_length(), device=first.keys.device)
        longest = max(cache.lengths)
        self._mask_sizes = (longest + max_new_tokens, seen - longest)

    def begin_forward(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> None:
        """Called by an attached model before its layers."""
        (batch, new), rows = tokens.shape[:2], self.layers[self._first].keys.shape[0]
        if batch != rows:
            raise ValueError(f"StaticClaaCache: the batch must have its {rows} rows, got {batch}")
        if attention_mask is not None:
            check_mask(attention_mask)
        if attention_mask is not None and self._may_look(tokens):
            total = int(self.get_seq_length()) + new
            if attention_mask.dim() == 2 and attention_mask.shape[1] < total:
                raise ValueError(
                    f"StaticClaaCache: attention_mask must have {total} columns, of the tokens "
                    f"seen and {new} new ones, or more, got {attention_mask.shape[1]}"
                )
        super().begin_forward(tokens, attention_mask, position_ids)

    def begin_generate(self, request: Request) -> None:
        """Refuse more tokens than there is room for."""
        new, longest, ids = (
            request.setting("max_new_tokens"),
            request.setting("max_length"),
            request.input_ids,
        )
        if ids is None or (new is None and longest is None):
            return
        total = longest if new is None else ids.shape[1] + new
        self._require_room(total - 1 - int(self.get_seq_length()))  # the last one is not fed

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a layer; return its whole buffers."""
        if layer_idx == self._first and self._may_look(key_states):
            self._require_room(key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _may_look(self, tensor: Tensor) -> bool:
        """Whether the host may read a length: not in a graph, and not where a GPU would stall.

        On a GPU too many tokens fail its own bounds check.
        """
        return not tensor.is_cuda and not torch.compiler.is_compiling()

    def _require_room(self, tokens: int) -> None:
        layer = self.layers[self._first]
        room = layer.max_cache_len - int(layer.get_seq_length())
        if tokens > room:
            raise ValueError(
                f"StaticClaaCache: new tokens must fit into the room for {room} that is left, "
                f"got {tokens}"
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the model has seen, as a tensor, whether or not they are still held."""
        return self.layers[self._first].get_seq_length() + self._dropped

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask: that of the longest layer; others take its last columns.

        That is exact for the reason that :meth:`ClaaCache.get_mask_sizes` gives.
        """
        return self._mask_sizes


def _copy(held: Any, room: int) -> Any:
    """A layer of fixed size, with what a layer of a ClaaCache holds and room for more entries."""
    if isinstance(held, StateLayer):
        return copy.deepcopy(held)
    layer = _Layer(held.get_seq_length() + room)
    layer.update(held.keys, held.values)
    layer.start = held.start
    return layer


class _Layer(StaticLayer):
    start: Tensor | None = None

    def columns(self, mask: Tensor, new: int) -> Tensor:
        return visible_columns(mask, self.max_cache_len, self.start)
