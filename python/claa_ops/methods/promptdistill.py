from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from claa_ops.methods.pruning import Keep, Pruning
from claa_ops.ops.pool_heads import pool_heads
from claa_ops.selection.layer import Layer
from claa_ops.selection.padding import mask_padding


@dataclass(frozen=True)
class PromptDistill(Pruning):
    """GemFilter's ranking in a single pass: the hidden states of the best tokens continue.

    At the selection layer each token's score is the inner product of its key with the query of
    the prompt's last token, averaged over all heads and pooled; no softmax. The last token always
    continues. Layers up to the selection keep their whole caches, later ones what reached them.

    Args:
        keep: tokens that continue, the last one included: see :class:`Pruning`.
        layer: the selection layer, or several: see :class:`Pruning`. None for
            :meth:`default_layer` of the model's depth.
        keep_kv: tokens that a layer's cache keeps, by that layer's own ranking; all by default.
        first_full, num_sinks, equal_cache: see :class:`Pruning`.
        kernel_size: see :class:`Method`; pooling averages, and ``window`` is 1, the last token.

    Raises:
        ValueError: a setting is out of its range.

    Source: PromptDistill (arXiv 2503.23274) and its public code (declare-lab/PromptDistill,
    68e7bb1): 1024 tokens and the last one after layer 13 of 32; several stages are an option there
    too. Departures: the sum over heads and the pooling stay in float32, padding is not scored, and
    the last token counts as kept. Its cache truncation, off by default there, is not served: it
    cuts the caches of the layers up to a selection to the selected tokens, which are not known
    when those caches are filled. ``keep_kv`` goes by each layer's own ranking instead.

    Example:
        >>> method = PromptDistill(keep=1025, layer=13)
    """

    keep_kv: Keep | None = 1.0
    window: int = field(default=1, kw_only=True)
    kernel_size: int = field(default=5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.window == 1, "window", "1")
        self.require(self.pool_mode == "avg", "pool_mode", "'avg'")

    @staticmethod
    def default_layer(num_layers: int) -> int:
        """Layer 13 of 32."""
        return num_layers * 13 // 32

    def score(self, layer: Layer) -> Tensor:
        """Pooled inner products with the last query, summed over each group: ``[B, G, M]``."""
        key = layer.key[:, :, : layer.context]
        heads = layer.query.unflatten(1, (key.shape[1], -1))[:, :, :, 0]  # [B, G, H / G, D]
        products = (heads @ key.transpose(2, 3)).float().sum(dim=2)
        products = mask_padding(products, layer.start, 0.0)
        return pool_heads(products, key.shape[1], kernel_size=self.kernel_size)
