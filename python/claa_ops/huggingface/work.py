"""Counts the multiply-adds of a forward of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    linear = attention = 0
    blocks = decoder_of(model).layers
    layers = zip(tokens, blocks[first:], sizes.kinds[first:], strict=False)
    for layer, (seen, block, kind) in enumerate(layers, first):
        whole, pairs = seen, _visible_pairs(seen, kind.window) if kind.attends else 0
        if sparse is not None and layer in sparse:
            pairs = pairs_seen(seen, sparse[layer])
        if within is not None and layer in within:
            linear += seen * _projections_per_token(block, sizes)
            index = within[layer]
            if index is not None:
                whole, pairs = index.shape[1], _pairs_of(index, kind.window)
        linear += whole * _weights_per_token(block, sizes)
        attention += 2 * sizes.heads * _head_dim(block, sizes) * pairs
    return Work(linear, attention, logits * sizes.hidden_size * sizes.vocab_size)


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
