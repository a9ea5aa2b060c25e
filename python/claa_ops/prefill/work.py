"""The unit of every statement about cost: the multiplications of a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from claa_ops.prefill.huggingface import decoder_of


@dataclass(frozen=True)
class Work:
    """Multiplications of one forward or more, for one prompt.

    Attributes:
        linear: by the weights of the layers.
        attention: of queries with keys, and of probabilities with values.
        head: by the weights of the head.
    """

    linear: int = 0
    attention: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.head

    def __add__(self, other: Work) -> Work:
        return Work(
            self.linear + other.linear, self.attention + other.attention, self.head + other.head
        )


def count_work(model: PreTrainedModel, tokens: Sequence[int], logits: int = 1) -> Work:
    """Count the multiplications of a forward whose i-th layer sees ``tokens[i]`` tokens.

    A prompt and the T - 1 tokens that were decoded from it count as one forward over all of them:
    under a causal mask that is the same. Experts count as far as they are used. Embeddings,
    norms, scores, selections and gathers count as nothing.

    Args:
        model: the model.
        tokens: of each layer that ran, from the first on.
        logits: of how many tokens the head is computed.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    linear = attention = 0
    for layer, (seen, block) in enumerate(zip(tokens, decoder_of(model).layers, strict=False)):
        linear += seen * _weights_per_token(block, config)
        attention += 2 * heads * head_dim * _visible_pairs(seen, _sliding_window(config, layer))
    return Work(linear, attention, logits * config.hidden_size * config.vocab_size)


def _weights_per_token(block: nn.Module, config: PreTrainedConfig) -> int:
    """Matrix entries that one token meets; stacked experts (3-d) count as far as they are used."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = getattr(config, "num_experts_per_tok", None)
    shapes = [weight.shape for weight in block.parameters()]
    dense = sum(shape.numel() for shape in shapes if len(shape) == 2)
    stacked = sum(shape.numel() for shape in shapes if len(shape) == 3)
    return dense + (stacked * used // experts if used and experts else stacked)


def _sliding_window(config: PreTrainedConfig, layer: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    return window if kinds and kinds[layer] == "sliding_attention" else None


def _visible_pairs(tokens: int, window: int | None) -> int:
    """Query-key pairs under a causal mask: half the square, less what a sliding window hides."""
    hidden = max(0, tokens - window) if window else 0
    return (tokens * (tokens + 1) - hidden * (hidden + 1)) // 2
