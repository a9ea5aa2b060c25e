"""The unit of every statement about cost: multiplications by weights, in the linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from claa_ops.prefill.huggingface import decoder_of


def linear_work(model: PreTrainedModel, tokens: Sequence[int]) -> int:
    """Multiplications by weights of a prefill whose i-th layer sees ``tokens[i]`` tokens.

    One for each weight of a layer's matrices and each token; embeddings, the head and attention
    itself do not count. Layers that did not run are left out of ``tokens``.
    """
    layers = decoder_of(model).layers[: len(tokens)]
    return sum(
        seen * sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1)
        for seen, layer in zip(tokens, layers, strict=True)
    )
