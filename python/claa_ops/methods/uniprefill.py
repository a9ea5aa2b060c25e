from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from claa_ops.selection.budget import is_count, is_number
from claa_ops.selection.layer import Layer
from claa_ops.selection.method import Method
from claa_ops.selection.padding import places_in_prompt
from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class UniPrefill(Method):
    """Drop blocks of tokens at several layers, all that hold little of the attention.

    At each selection layer the attention of the last ``window`` tokens, averaged over them and
    over all heads, is added up over blocks of neighbouring tokens. The fewest blocks that hold more
    than ``top_p`` of it continue, and so do the first and the last tokens. A layer's cache is what
    reached it. Each row of a batch keeps a number of its own.

    Args:
        top_p: the share of the attention, in (0, 1], that the kept blocks hold.
        layer: the selection layer, or several, ascending. None for 7, 11, 15, 19, 23 and 27 of 32.
        block: tokens of a block; blocks are formed anew of the tokens that a layer sees.
        num_sinks: how many first tokens are never dropped.
        window: how many last tokens are never dropped; theirs is the attention that counts.
        kernel_size, pool_mode: unused: nothing is pooled.

    Raises:
        ValueError: a setting is out of its range.

    Source: UniPrefill (arXiv 2605.06221) and its public code (qhfan/UniPrefill, bfe08cd), whose
    kernels and PyTorch version differ where the mass reaches ``top_p`` and in how the last tokens
    are counted; this follows the kernels, and knows no softcaps, sliding windows or sink logits
    either. The defaults are those of Llama-3.1-8B there, their scaling with the depth is ours;
    Gemma 3 has ``layer=(29, 35, 41), top_p=0.975``. Departures: scores are in float32; the
    selection layer's MLP still sees all tokens, at its cost and with the same result.

    Example:
        >>> method = UniPrefill(top_p=0.9, layer=(7, 15, 23))
    """

    top_p: float = 0.99
    layer: int | tuple[int, ...] | None = None
    block: int = 64
    num_sinks: int = 128
    window: int = field(default=128, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        layers = self.selection_layers(32)
        valid = all(is_count(layer, 0) for layer in layers) and [*layers] == sorted({*layers})
        self.require(valid and len(layers) > 0, "layer", "an integer of at least 0, or several")
        self.require(is_count(self.block, 1), "block", "a positive integer")
        self.require(is_count(self.num_sinks, 0), "num_sinks", "an integer of at least 0")

    @property
    def differs_by_row(self) -> bool:
        """True: the attention of each prompt decides how many."""
        return True

    @staticmethod
    def default_layer(num_layers: int) -> tuple[int, ...]:
        """7, 11, 15, 19, 23 and 27 of 32; fewer if the model has too few."""
        return tuple(sorted({max(0, num_layers * part // 8 - 1) for part in range(2, 8)}))

    def check(self, num_layers: int) -> None:
        """Raise ValueError if no layer comes after the last selection layer."""
        fits = max(self.selection_layers(num_layers)) <= num_layers - 2
        self.require(fits, "layer", f"in [0, {num_layers - 2}]")

    def score(self, layer: Layer) -> Tensor:
        """The attention of the window to every token, ``[B, 1, n]``, over all heads and queries."""
        query, key = layer.query, layer.key
        scale = layer.attention["scale"] or key.shape[3] ** -0.5
        places = torch.arange(key.shape[2], device=key.device)
        hidden = (places > places[-query.shape[2] :, None])[None, None]  # [1 or B, 1, W, n]
        if layer.start is not None:
            hidden = hidden | (places < layer.start[:, None])[:, None, None]
        scores = torch.zeros(key.shape[0], key.shape[2], device=key.device)
        for heads, keys in zip(query.chunk(key.shape[1], dim=1), key.split(1, dim=1), strict=True):
            logits = scale * (heads @ keys.transpose(2, 3)).float()
            attention = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
            scores += attention.masked_fill(hidden, 0).sum(dim=(1, 2))  # a query may be padding
        return layer.reduce(scores, "sum")[:, None]

    def observe(self, state: PrefillState, layer: Layer) -> None:
        """The scores of a selection layer are the ranking; short prompts need none."""
        long = state.length > self.num_sinks + self.window
        if long and layer.index in self.selection_layers(state.num_layers):
            state.update_ranking(layer.scores[:, 0])

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """The tokens of the best blocks, the first and the last ones, ``[B, k]``."""
        if layer not in self.selection_layers(state.num_layers) or state.running is None:
            return None
        mass = state.running.double()
        place = places_in_prompt(state.length, state.start, mass.device).expand_as(mass)
        block = (place // self.block).clamp_min(0)  # padding has no mass
        sums = torch.zeros_like(mass).scatter_add_(1, block, mass)
        ordered, order = sums.sort(dim=1, descending=True, stable=True)
        held = ordered.cumsum(dim=1) - ordered <= self.top_p * sums.sum(dim=1, keepdim=True)
        kept = held.gather(1, order.argsort(dim=1)).gather(1, block) | (place < self.num_sinks)
        kept[:, -self.window :] = True
        if state.protected is not None:
            kept |= state.protected
        kept &= place >= 0
        return self.keep_best(state, kept.float(), kept.sum(dim=1))
