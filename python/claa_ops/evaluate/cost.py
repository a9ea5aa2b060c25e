"""What prefill has to compute: the share that a selection layer leaves of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from claa_ops.prefill.huggingface import decoder_of


@dataclass(frozen=True)
class PrefillCost:
    """Floating-point operations of one prefill; a multiplication and an addition count as two."""

    linear: float  # projections and MLPs of all layers
    attention: float  # products of queries with keys, and of probabilities with values
    head: float  # logits of the last token

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.attention + self.head


def prefill_cost(
    model: PreTrainedModel, tokens: int, kept: int | None = None, layer: int | None = None
) -> PrefillCost:
    """Count the operations of a prefill that selects `kept` of its tokens after `layer`.

    Layers up to and including `layer` see all `tokens`, deeper ones see `kept`; without a layer
    all see all. Scoring, selecting and gathering count as nothing: a measured time ratio above
    the ratio of two totals is what they, and everything else that is no product of matrices, cost.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    linear = attention = 0.0
    for index, block in enumerate(decoder_of(model).layers):
        seen = tokens if layer is None or kept is None or index <= layer else kept
        linear += 2.0 * seen * _weights_per_token(block, config)
        pairs = _visible_pairs(seen, _sliding_window(config, index))
        attention += 4.0 * heads * head_dim * pairs
    head = 2.0 * config.hidden_size * config.vocab_size
    return PrefillCost(linear, attention, head)


def _weights_per_token(block: nn.Module, config: PreTrainedConfig) -> float:
    """Matrix entries that one token meets; stacked experts (3-d) count as far as they are used."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = getattr(config, "num_experts_per_tok", None)
    active = used / experts if used and experts else 1.0
    shapes = [weight.shape for weight in block.parameters()]
    dense = sum(shape.numel() for shape in shapes if len(shape) == 2)
    return dense + active * sum(shape.numel() for shape in shapes if len(shape) == 3)


def _sliding_window(config: PreTrainedConfig, layer: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    return window if kinds and kinds[layer] == "sliding_attention" else None


def _visible_pairs(tokens: int, window: int | None) -> float:
    """Query-key pairs under a causal mask: half the square, less what a sliding window hides."""
    hidden = max(0, tokens - window) if window else 0
    return (tokens * (tokens + 1) - hidden * (hidden + 1)) / 2
