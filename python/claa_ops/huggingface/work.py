"""Counts the multiply-adds of a forward of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from claa_ops.huggingface.transformers_api import (
    Dimensions,
    PreTrainedModel,
    decoder_of,
    dimensions,
)
from claa_ops.selection.work import Work


def count_work(
    model: PreTrainedModel, tokens: Sequence[int], logits: int = 1, first: int = 0
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
    """
    sizes = dimensions(model.config)
    linear = attention = 0
    blocks = decoder_of(model).layers
    layers = zip(tokens, blocks[first:], sizes.kinds[first:], strict=False)
    for seen, block, kind in layers:
        linear += seen * _weights_per_token(block, sizes)
        if kind.attends:
            width = sizes.heads * _head_dim(block, sizes)
            attention += 2 * width * _visible_pairs(seen, kind.window)
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


def _head_dim(block: nn.Module, sizes: Dimensions) -> int:
    """The size of a head in this layer: in some models layers differ."""
    found = (getattr(module, "head_dim", None) for module in block.modules())
    return next((size for size in found if isinstance(size, int)), sizes.head_dim)


def _visible_pairs(tokens: int, window: int | None) -> int:
    """Query-key pairs under a causal mask: half the square, less what a sliding window hides."""
    hidden = max(0, tokens - window) if window else 0
    return (tokens * (tokens + 1) - hidden * (hidden + 1)) // 2
