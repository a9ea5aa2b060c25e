from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from claa_ops.ops.pool_heads import pool_heads
from claa_ops.selection.budget import Budget, Size, Sizes, is_count
from claa_ops.selection.method import Method
from claa_ops.selection.padding import mask_padding

if TYPE_CHECKING:
    from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class GemFilter(Method):
    """Two passes: an early layer picks tokens, then the model starts anew on those alone.

    The first pass runs the layers up to the filter layer. There each token's score is its inner
    product with the query of the prompt's last token, summed over all heads and pooled; no
    softmax and no window. The second pass runs the whole model on the chosen token ids as if they
    were the prompt: their positions are 0, 1, 2, ..., and decoding goes on behind them.

    Args:
        keep: tokens of the second pass: a rate of the prompt in (0, 1], or a number. Nothing is
            kept for certain, not even the last token.
        layer: the filter layer, from 0; the last layer of the first pass.
        kernel_size, pool_mode: see :class:`Method`; ``window`` is 1, the last token.

    Raises:
        ValueError: a setting is out of its range.

    Source: GemFilter (arXiv 2409.17422) and its public code
    (SalesforceAIResearch/GemFilter, 5f79b1a): 1024 tokens, layer 13 of 32, 19 of 40; as a rate,
    in the comparisons of FastKV and CLAA (layer 15 there). Departures: the sum over heads and
    the pooling stay in float32; batches are served, padding is never chosen before a token; the
    answer is no token longer than asked.

    Example:
        >>> method = GemFilter(keep=0.1, layer=13)
    """

    keep: float | int = 0.1
    layer: int = 13
    window: int = field(default=1, kw_only=True)
    kernel_size: int = field(default=5, kw_only=True)

    _keep: Budget = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_count(self.layer, 0), "layer", "an integer of at least 0")
        self.require(self.window == 1, "window", "1")
        object.__setattr__(self, "_keep", self.budget("keep"))

    @classmethod
    def defaults(cls, num_layers: int) -> dict[str, Any]:
        """Layer 13 of 32."""
        return {"layer": num_layers * 13 // 32}

    def check(self, num_layers: int) -> None:
        """Raise ValueError if the model has no such layer."""
        self.require(self.layer < num_layers, "layer", f"in [0, {num_layers - 1}]")

    @property
    def two_pass(self) -> bool:
        """Yes."""
        return True

    def ranks(self, layer: int) -> bool:
        """The layers of the first pass."""
        return layer <= self.layer

    def needs_scores(self, state: PrefillState, layer: int) -> bool:
        """Whether this is the filter layer of a prompt that is longer than the budget."""
        return layer == self.layer and state.length > self._tokens(state.sizes)

    def score(self, state: PrefillState, query: Tensor, key: Tensor, **attention: Any) -> Tensor:
        """Pooled inner products with the last query, summed over heads: ``[B, 1, N]``."""
        heads = query.unflatten(1, (key.shape[1], -1))[:, :, :, 0]  # [B, G, H / G, D]
        products = (heads @ key.transpose(2, 3)).float()  # [B, G, H / G, N]
        summed = products.sum(dim=(1, 2)).unsqueeze(1)
        summed = mask_padding(summed, attention["start"], 0.0)
        return pool_heads(summed, 1, kernel_size=self.kernel_size, pool_mode=self.pool_mode)

    def observe(self, state: PrefillState, layer: int) -> None:
        """The scores of one layer are the ranking."""
        state.importance = state.layer_scores[:, 0]

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """At the filter layer, the best tokens."""
        if not self.needs_scores(state, layer):
            return None
        assert state.importance is not None  # the filter layer was observed
        return self.keep_best(state, state.importance, self._tokens)

    def _tokens(self, sizes: Sizes[Size]) -> Size:
        return self._keep.tokens(sizes.prompt, 1)
