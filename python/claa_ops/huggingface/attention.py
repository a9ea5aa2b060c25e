"""The attention function of an attached model: the model's own, then the functional API."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from claa_ops.huggingface.cache import ClaaCache, Look, SlidingLayer
from claa_ops.huggingface.generation import AttachedCache
from claa_ops.huggingface.logsumexp import attention_and_logsumexp
from claa_ops.huggingface.rows import BLOCK, attention_of_rows, visible_to
from claa_ops.huggingface.sparse import LEAST, block_sparse_attention
from claa_ops.huggingface.transformers_api import (
    AttentionFunction,
    attention_function,
    attention_name,
    is_registered,
    mask_function,
    register_attention_function,
    sdpa_mask,
)


class LookDone(Exception):
    """Raised to leave a layer before its attention, of which the keys and queries were seen."""


@dataclass(frozen=True)
class AttachedAttention:
    """The attention of an attached model: the model's own, then scoring and compression.

    Attributes:
        base_name: the name of the model's own attention: sdpa, eager or a flash attention.
        family: the module that defines the model, and with it the eager attention of its family.
    """

    base_name: str
    family: str

    @classmethod
    def of(cls, configured: str, attention: nn.Module) -> AttachedAttention:
        """The attention of a model whose configuration has the name ``configured``."""
        # A configuration taken from an attached model has the name that attach gave it.
        eager = configured.startswith("claa_eager")
        name = {"claa_sdpa": "sdpa"}.get(configured, "eager" if eager else configured)
        return cls(name, type(attention).__module__)

    @property
    def name(self) -> str:
        """The name under which it is registered and configured.

        Each family of models has its own eager attention. Transformers loads flash attention by
        the name in the configuration, so flash attention has to keep its name; without a
        ClaaCache the function that takes its place only calls it.
        """
        eager = f"claa_eager_{self.family.rpartition('.')[2]}"
        return {"sdpa": "claa_sdpa", "eager": eager}.get(self.base_name, self.base_name)

    def base(self) -> AttentionFunction:
        """The model's own attention function; ValueError if it is of another kind than those."""
        family = import_module(self.family)
        if self.base_name == "eager" and hasattr(family, "eager_attention_forward"):
            return family.eager_attention_forward
        if self.base_name == "sdpa" or "flash" in self.base_name:
            return unwrapped(attention_function(self.base_name))
        raise ValueError(
            f"attach: attention must be sdpa, eager or flash attention, got {self.base_name}"
        )

    def register(self) -> None:
        """Register it with transformers under its name, for this process."""
        base = self.base()
        if is_registered(self.name) and _base_of(attention_function(self.name)) is base:
            return  # torch.compile would compile anew for a second one, although equal
        mask = _sdpa_mask if self.base_name == "sdpa" else mask_function(self.base_name)
        register_attention_function(self.name, _with_prefill(base, self.base_name), mask)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of an attached model may be loaded in a process that never attached one."""
        vars(self).update(state)
        self.register()


def check_attention(decoder: Any) -> None:
    """Raise RuntimeError unless an attached decoder computes the attention that attach set."""
    expected, found = decoder.claa_attached.name, attention_name(decoder)
    if found != expected:
        raise RuntimeError(
            f"ClaaCache: the attention of an attached model must stay {expected}, got {found}: "
            "call claa_ops.prefill.attach(model) again"
        )


def _sdpa_mask(**request: Any) -> Tensor | None:
    """SDPA's mask; none for a whole prompt or a single token without padding.

    Transformers does the same, but not while a graph is compiled or captured (5.17, and later
    releases with torch before 2.14): then it makes an N x N mask, for which SDPA takes slower
    kernels.
    """
    whole = request["q_length"] == 1 or request["q_length"] == request["kv_length"]
    special = request.get("attention_mask") is not None or request.get("local_size") is not None
    if whole and not special and request.get("allow_is_causal_skip", True):
        return None
    return sdpa_mask(**request)


def _with_prefill(base: AttentionFunction, base_name: str) -> AttentionFunction:
    def claa_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        claa_cache: AttachedCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if claa_cache is None:
            return base(module, query, key, value, attention_mask, **kwargs)
        layer: Any = module.layer_idx
        held = claa_cache.layers[layer]
        look = claa_cache.look if isinstance(claa_cache, ClaaCache) else None
        if isinstance(claa_cache, ClaaCache) and look is not None and look.key is None:
            _observe(claa_cache, layer, query, key, value, None, kwargs)
            look.key, look.value = key, value
            if torch.compiler.is_compiling():  # what follows is left out of the graph
                return _nothing(query, value), None
            raise LookDone
        if look is not None and look.index is not None:
            return _attention_of_selected(
                base, base_name, module, query, look, attention_mask, kwargs
            )
        if not claa_cache.prefilling and held.is_sliding and held.positions is not None:
            attention_mask = _window_mask(claa_cache, held, query, additive=base_name == "eager")
        if "flash" in base_name:
            if claa_cache.prefilling and held.is_sliding and claa_cache.has_selected:
                raise ValueError(
                    f"ClaaCache: a sliding window after a selection must go by position, use "
                    f"sdpa or eager attention, got {base_name} in layer {layer}"
                )
            # Positions with gaps would be taken for several sequences packed into one.
            kwargs.pop("position_ids", None)
        output, lse = None, None
        if claa_cache.prefilling:
            output, lse = _fused(
                claa_cache, base_name, module, query, key, value, attention_mask, kwargs
            )
        if output is None:
            attended = base(module, query, key, value, attention_mask, **kwargs)
        else:
            attended = output.transpose(1, 2).contiguous(), None
        if not isinstance(claa_cache, ClaaCache) or look is not None:
            return attended
        if claa_cache.taken is not None:
            claa_cache.put_in_order(layer, claa_cache.taken)
        elif claa_cache.prefilling or claa_cache.turn is not None:
            _observe(claa_cache, layer, query, key, value, lse, kwargs)
        return attended

    vars(claa_attention)["claa_base"] = base
    return claa_attention


def _fused(
    cache: AttachedCache,
    base_name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    attention: dict[str, Any],
) -> tuple[Tensor | None, Tensor | None]:
    """Output and logsumexp of a layer of the prompt, as far as they come from another kernel.

    That is a block-sparse one, if the method wants it and the attention is causal and nothing
    else, or SDPA's own, asked for the logsumexp too.
    """
    if not _is_plain(module, attention):
        return None, None
    scale, window = attention.get("scaling"), attention.get("sliding_window") or 0
    state = cache.state if isinstance(cache, ClaaCache) else None
    if isinstance(cache, ClaaCache) and state is not None:
        layer: Any = module.layer_idx
        share = cache.key_share(layer)
        windowed, long = 0 < window < key.shape[2], key.shape[2] > LEAST * BLOCK
        if share is not None and long and not windowed:
            cache.sparse[layer] = share
            return block_sparse_attention(query, key, value, share, state.start, scale), None
    if base_name != "sdpa" or mask is not None:
        return None, None
    return attention_and_logsumexp(query, key, value, scale) or (None, None)


def _observe(
    cache: ClaaCache,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor | None,
    attention: dict[str, Any],
) -> None:
    """Show a layer of the prompt, or of a turn that looks again."""
    see = cache.observe if cache.prefilling else cache.look_again
    see(
        layer,
        query,
        key,
        value=value,
        hidden=cache.hidden,
        lse=lse,
        scale=attention.get("scaling"),
        sliding_window=attention.get("sliding_window") or 0,
        softcap=attention.get("softcap") or 0.0,
        sink_logits=attention.get("s_aux"),
    )
    cache.hidden = None


def _nothing(query: Tensor, value: Tensor) -> Tensor:
    """What no one reads, in the form of an attention's output."""
    batch, heads, tokens, _ = query.shape
    return query.new_zeros(batch, tokens, heads, value.shape[3])


def _attention_of_selected(
    base: AttentionFunction,
    base_name: str,
    module: nn.Module,
    query: Tensor,
    look: Look,
    mask: Tensor | None,
    attention: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention of the tokens that a layer selected within itself, to all that it saw."""
    key, value, index = look.key, look.value, look.index
    assert key is not None and value is not None and index is not None
    window = attention.get("sliding_window") or 0
    windowed = 0 < window < key.shape[2]
    if base_name != "eager" and _is_plain(module, attention) and not windowed:
        scale = attention.get("scaling")
        output = attention_of_rows(query, key, value, index, look.start, scale)
        return output.transpose(1, 2).contiguous(), None
    if "flash" in base_name:
        raise ValueError(
            "ClaaCache: a selection within a layer must be in one with plain causal attention, "
            f"use sdpa or eager attention, got {base_name} in layer {module.layer_idx}"
        )
    if mask is None:
        mask = visible_to(index, key.shape[2], look.start)
        if base_name == "eager":
            mask = _additive(mask, query.dtype)
    return base(module, query, key, value, mask, **attention)


def _base_of(attention: AttentionFunction) -> AttentionFunction | None:
    return getattr(attention, "claa_base", None)


def unwrapped(attention: AttentionFunction) -> AttentionFunction:
    """The attention that :class:`AttachedAttention` wrapped; ``attention`` itself if it did not."""
    return _base_of(attention) or attention


def _is_plain(module: nn.Module, attention: dict[str, Any]) -> bool:
    """Whether it is causal and nothing else, but perhaps within a sliding window."""
    special = ("dropout", "position_bias", "s_aux", "softcap")
    causal = attention.get("is_causal", getattr(module, "is_causal", True))
    given = [attention.get(name) for name in special]
    return causal is not False and not any(isinstance(each, Tensor) or each for each in given)


def _window_mask(
    cache: AttachedCache, held: SlidingLayer, query: Tensor, *, additive: bool
) -> Tensor:
    """The sliding window of later tokens over selected entries: by position, not by index."""
    seen = cache.get_seq_length()
    visible = held.visible(torch.arange(seen - query.shape[2], seen, device=query.device))[:, None]
    return _additive(visible, query.dtype) if additive else visible


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
