from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from claa_ops.methods.pruning import Pruning
from claa_ops.ops.peak_attention import peak_attention
from claa_ops.ops.pool_heads import pool_heads
from claa_ops.selection.layer import Layer
from claa_ops.selection.padding import gather_kept
from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class Peak(Pruning):
    """The oracle's statistic, asked of the prompt's own last tokens instead of the answer.

    A token's importance is the most attention that it receives from any token of the window, in
    any head of any layer so far. Sums and means, over heads or over the window, drown the few
    heads that look a fact up in the first layers; a peak does not. And a fact is a run of tokens,
    of which these heads hit some: a wide pooling kernel keeps the whole run.

    Args:
        keep, layer, keep_kv, first_full, equal_cache, keep_least, mass: see :class:`Pruning`.
            Each layer's cache is compressed by that layer's own scores, as in FastKV.
        num_sinks: first tokens of the prompt that are always kept; the earlier the selection, the
            more the layers after it miss them.
        window, kernel_size, pool_mode: see :class:`Method`. The window must reach back into the
            question, past what a chat template appends to it.

    The ranking needs every layer up to the last selection. As in the oracle, the softmax is over
    all keys, without a causal mask inside the window, softcaps, sliding windows or sink logits.

    Raises:
        ValueError: a setting is out of its range.

    Source: ours; the reduction is that of CLAA's Answer-Informed Oracle (arXiv 2602.16054), but
    for the maximum over the queries where the oracle takes the mean. It is measured in
    docs/quality-needles.md.

    Example:
        >>> method = Peak(keep=0.1, layer=8)
    """

    num_sinks: int = 4
    window: int = field(default=16, kw_only=True)
    kernel_size: int = field(default=25, kw_only=True)

    def rank(self, layer: Layer, before: Tensor | None) -> Tensor:
        """The peaks of the context tokens over layers, heads and window, pooled."""
        highest = self.highest(layer)[:, None]
        return pool_heads(highest, 1, kernel_size=self.kernel_size, pool_mode=self.pool_mode)[:, 0]

    def highest(self, layer: Layer) -> Tensor:
        """``[B, M]``, float32: the same without pooling."""
        notes = layer.state.notes  # the peaks of each query of the window, [B, W, n]
        notes["peaks"] = peaks = peak_attention(
            layer.query,
            layer.key,
            scale=layer.attention["scale"],
            running=notes.get("peaks"),
            start=layer.start,
        )
        highest = peaks[..., : peaks.shape[2] - peaks.shape[1]].amax(dim=1)
        return self.merge_maxima(layer, highest)

    def informs(self, state: PrefillState, layer: int) -> bool:
        """Every layer up to the last selection."""
        return layer <= max(self.stages(state.num_layers))

    @staticmethod
    def default_layer(num_layers: int) -> int:
        """Layer 8 of 30, which is known to be good for one small model."""
        return num_layers * 4 // 15

    def _informs_drop(self, state: PrefillState, layer: int) -> bool:
        """Whether any selection from this layer on drops tokens: all layers before it count."""
        stages = self.stages(state.num_layers)
        return any(stage >= layer and self._drops(state, stage) for stage in stages)

    def keep_notes(self, state: PrefillState, layer: int, index: Tensor) -> None:
        """The peaks of the tokens that continue."""
        state.notes["peaks"] = gather_kept(state.notes["peaks"], index)
