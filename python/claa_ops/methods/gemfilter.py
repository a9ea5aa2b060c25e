from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from claa_ops.ops.pool_heads import pool_heads
from claa_ops.selection.budget import Budget, Size, Sizes, is_count
from claa_ops.selection.layer import Layer
from claa_ops.selection.method import Method
from claa_ops.selection.padding import mask_padding
from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class GemFilter(Method):
    """Two passes: an early layer picks tokens, then the model starts anew on those alone.

    The first pass runs the layers up to the filter layer. There each token's score is its inner
    product with the query of the prompt's last token, summed over all heads and pooled; no
    softmax and no window. The second pass runs the whole model on the chosen token ids as if they
    were the prompt: their positions are 0, 1, 2, ..., and decoding continues after them.

    Args:
        keep: tokens of the second pass: a rate of the prompt in (0, 1], or a number. No token is
            sure to be kept, not even the last.
        layer: the filter layer, from 0; the last layer of the first pass. None for
            :meth:`default_layer` of the model's depth.
        kernel_size, pool_mode: see :class:`Method`; ``window`` is 1, the last token.

    Raises:
        ValueError: a setting is out of its range.

    Source: GemFilter (arXiv 2409.17422) and its public code
    (SalesforceAIResearch/GemFilter, 5f79b1a): 1024 tokens, layer 13 of 32, 19 of 40; as a rate,
    in the comparisons of FastKV and CLAA (layer 15 there). Departures: the sum over heads and
    the pooling stay in float32; batches are served, and padding is never chosen before a token;
    the answer is not a token longer than asked for.

    Example:
        >>> method = GemFilter(keep=0.1, layer=13)
    """

    keep: float | int = 0.1
    layer: int | None = None
    window: int = field(default=1, kw_only=True)
    kernel_size: int = field(default=5, kw_only=True)

    _keep: Budget = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = self.layer is None or is_count(self.layer, 0)
        self.require(valid, "layer", "an integer of at least 0")
        self.require(self.window == 1, "window", "1")
        object.__setattr__(self, "_keep", self.budget("keep"))

    @staticmethod
    def default_layer(num_layers: int) -> int:
        """Layer 13 of 32."""
        return num_layers * 13 // 32

    def check(self, num_layers: int) -> None:
        """Raise ValueError if the model has no such layer."""
        (layer,) = self.selection_layers(num_layers)
        self.require(layer < num_layers, "layer", f"in [0, {num_layers - 1}]")

    @property
    def two_pass(self) -> bool:
        """True: the second pass reads the chosen tokens."""
        return True

    def last_layer(self, state: PrefillState) -> int | None:
        """The filter layer, if the prompt is longer than the budget."""
        (layer,) = self.selection_layers(state.num_layers)
        return layer if state.length > self._tokens(state.sizes) else None

    def ranks(self, state: PrefillState, layer: int) -> bool:
        """The layers of the first pass."""
        return layer <= self.selection_layers(state.num_layers)[0]

    def score(self, layer: Layer) -> Tensor:
        """Pooled inner products with the last query, summed over heads: ``[B, 1, N]``."""
        key = layer.key
        heads = layer.query.unflatten(1, (key.shape[1], -1))[:, :, :, 0]  # [B, G, H / G, D]
        products = (heads @ key.transpose(2, 3)).float()  # [B, G, H / G, N]
        summed = layer.reduce(products.sum(dim=(1, 2)).unsqueeze(1), "sum")
        summed = mask_padding(summed, layer.start, 0.0)
        return pool_heads(summed, 1, kernel_size=self.kernel_size, pool_mode=self.pool_mode)

    def observe(self, state: PrefillState, layer: Layer) -> None:
        """The scores of the filter layer are the ranking."""
        if layer.index == self.last_layer(state):
            state.update_ranking(layer.scores[:, 0])

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """After the filter layer, the best tokens."""
        if layer != self.last_layer(state):
            return None
        assert state.importance is not None  # the filter layer was observed
        return self.keep_best(state, state.importance, self._tokens)

    def _tokens(self, sizes: Sizes[Size]) -> Size:
        return self._keep.tokens(sizes.prompt, 1)
