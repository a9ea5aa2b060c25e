"""Counts the multiply-adds of a forward of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from claa_ops.huggingface.sparse import pairs_seen
from claa_ops.huggingface.transformers_api import (
    Dimensions,
    PreTrainedModel,
    decoder_of,
    dimensions,
)
from claa_ops.selection.budget import Budget
from claa_ops.selection.work import Work


def count_work(
    model: PreTrainedModel,
    tokens: Sequence[int],
    logits: int = 1,
    first: int = 0,
    within: Mapping[int, Tensor | None] | None = None,
    sparse: Mapping[int, Budget] | None = None,
) -> Work:
    """Count the multiply-adds of a forward whose i-th layer sees ``tokens[i]`` tokens.

    A prompt and the T - 1 tokens that were decoded from it count as one forward over all of them:
    under a causal mask that is the same. Experts count as far as they are used. Embeddings,
    norms, scores, selections and gathers count as nothing, and of a layer that hands on a state
    only its weights count.

    Args:
        model: the model.
        tokens: of each layer that ran, from layer ``first`` on.
        logits: of how many tokens the head is computed.
        first: the first layer that ran.
        within: of each layer that selected before its attention, which of its tokens, ``[B, k]``,
            as :attr:`ClaaCache.within`: it projects all of them to queries, keys and values, and
            these go through the whole layer.
        sparse: of each layer that attended to a share of its keys, the share, as
            :attr:`ClaaCache.sparse`.
    """
    sizes = dimensions(model.config)
    work = Work(head=logits * sizes.hidden_size * sizes.vocab_size)
    costs = layer_costs(model, first, first + len(tokens))
    for layer, (seen, cost) in enumerate(zip(tokens, costs, strict=False), first):
        share = None if sparse is None else sparse.get(layer)
        if within is None or layer not in within:
            work += cost.work(seen, share)
        else:
            work += cost.work_within(seen, within[layer], share)
    return work


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs.

    Attributes:
        weights: multiply-adds of a token with all of its weights.
        projections: of these, those that make query, key and value.
        pair: multiply-adds of a query with a key, and of its probability with a value.
        window: keys that a query sees, where the attention slides; None elsewhere.
    """

    weights: int
    projections: int
    pair: int
    window: int | None

    def work(self, tokens: int, share: Budget | None = None) -> Work:
        """Of so many tokens, which attend to all keys before them or to a share of these."""
        pairs = _visible_pairs(tokens, self.window) if self.pair else 0
        if share is not None:
            pairs = pairs_seen(tokens, share)
        return Work(tokens * self.weights, self.pair * pairs)

    def work_within(self, tokens: int, index: Tensor | None, share: Budget | None = None) -> Work:
        """Where the layer selected ``index``, ``[B, k]``, before its attention; None for all."""
        projected = Work(tokens * self.projections)
        if index is None:
            return projected + self.work(tokens, share)
        attention = self.pair * _pairs_of(index, self.window)
        return projected + Work(index.shape[1] * self.weights, attention)


def layer_costs(model: PreTrainedModel, first: int = 0, last: int | None = None) -> list[LayerCost]:
    """What each layer costs, from layer ``first`` to the one before ``last``."""
    sizes = dimensions(model.config)
    layers = slice(first, last)
    return [
        LayerCost(
            _weights_per_token(block, sizes),
            _projections_per_token(block, sizes) if kind.attends else 0,
            2 * sizes.heads * _head_dim(block, sizes) if kind.attends else 0,
            kind.window,
        )
        for block, kind in zip(decoder_of(model).layers[layers], sizes.kinds[layers], strict=True)
    ]


def _weights_per_token(block: nn.Module, sizes: Dimensions) -> int:
    """Matrix entries that one token uses; stacked experts (3-d) count as far as they are used.

    So do convolutions whose channels are apart, of which a token uses every weight.
    """
    experts, used = sizes.experts, sizes.experts_used
    convolutions = [module.weight for module in block.modules() if isinstance(module, nn.Conv1d)]
    convolved = sum(weight.numel() for weight in convolutions)
    shapes = [weight.shape for weight in block.parameters()]
    dense = sum(shape.numel() for shape in shapes if len(shape) == 2) + convolved
    stacked = sum(shape.numel() for shape in shapes if len(shape) == 3) - convolved
    return dense + (stacked * used // experts if used and experts else stacked)


def _projections_per_token(block: nn.Module, sizes: Dimensions) -> int:
    """Matrix entries that make a token's query, key and value, by whatever names."""
    attention = next(module for module in block.modules() if hasattr(module, "layer_idx"))
    matrices = (weight for weight in attention.parameters() if weight.dim() == 2)
    output = sizes.heads * _head_dim(block, sizes) * sizes.hidden_size
    return sum(weight.numel() for weight in matrices) - output


def _pairs_of(index: Tensor, window: int | None) -> int:
    """Query-key pairs of the tokens at ``[B, k]`` of those that a layer sees, for one prompt."""
    visible = index.clamp_min(-1) + 1
    visible = visible.clamp_max(window) if window else visible
    return int(visible.sum()) // index.shape[0]


def _head_dim(block: nn.Module, sizes: Dimensions) -> int:
    """The size of a head in this layer: in some models layers differ."""
    found = (getattr(module, "head_dim", None) for module in block.modules())
    return next((size for size in found if isinstance(size, int)), sizes.head_dim)


def _visible_pairs(tokens: int, window: int | None) -> int:
    """Query-key pairs under a causal mask: half the square, less what a sliding window hides."""
    hidden = max(0, tokens - window) if window else 0
    return (tokens * (tokens + 1) - hidden * (hidden + 1)) // 2
