"""What a prefill left, in buffers of fixed size: for compiled decoding and for CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch

from claa_ops.prefill.cache import ClaaCache
from claa_ops.prefill.transformers_api import Cache, StaticLayer


class StaticClaaCache(Cache):
    """Copy of a prefilled :class:`ClaaCache` with room for a fixed number of new tokens.

    Every step of decoding then has the same shapes and addresses, so ``generate`` compiles it,
    and a CUDA graph can replay it. The layers keep their different lengths; the model must be
    attached.

    Args:
        cache: the cache of a prompt that has been prefilled. It can be dropped afterwards.
        max_new_tokens: how many more tokens there is room for.

    Raises:
        ValueError: nothing has been prefilled, or a layer has a sliding window.

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
        if cache.get_seq_length() == 0:
            raise ValueError("StaticClaaCache: a prompt must have been prefilled, got none")
        if any(layer.is_sliding for layer in cache.layers):
            raise ValueError("StaticClaaCache: all layers must have full attention, got a window")
        super().__init__(layers=[StaticLayer(kept + max_new_tokens) for kept in cache.lengths])
        for layer, held in zip(self.layers, cache.layers, strict=True):
            layer.update(held.keys, held.values)
        first, seen = cache.layers[0], cache.get_seq_length()
        # A tensor, like the lengths of the layers: torch.compile compiles anew for another int.
        self._dropped = torch.tensor(seen - first.get_seq_length(), device=first.keys.device)
        longest = max(cache.lengths)
        self._mask_sizes = (longest + max_new_tokens, seen - longest)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the model has seen, as a tensor, whether or not they are still held."""
        return self.layers[0].get_seq_length() + self._dropped

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask: that of the longest layer; others take its last columns.

        The mask is exact for the reason that :meth:`ClaaCache.get_mask_sizes` gives.
        """
        return self._mask_sizes
