"""The specification's inputs: 3 layers, H = 4, G = 2, 16 tokens, D = 4, window 4, kernel 3.

The expected numbers in the tests were computed from them in float64, by the public code's chain
of operations.
"""

from math import cos, sin

import torch

from claa_ops import prefill

LAYERS, TOKENS = 3, 16


def vector_query(layer, positions=range(TOKENS)):
    return torch.tensor(
        [[[[2 * sin(1 + 1.7 * h + 0.9 * i + 2.3 * c + 0.6 * layer + 0.05 * i * i)
            for c in range(4)] for i in positions] for h in range(4)]]
    )  # fmt: skip


def vector_key(layer):
    return torch.tensor(
        [[[[2 * cos(0.5 + 2.1 * g + 1.3 * i + 0.7 * c + 0.4 * layer + 0.03 * i * i)
            for c in range(4)] for i in range(TOKENS)] for g in range(2)]]
    )  # fmt: skip


def run(method, layers=LAYERS, **options):
    """The state after the last of these layers, and what that layer's cache keeps."""
    options["first_pass"] = method.two_pass
    state = prefill.begin(method, num_layers=LAYERS + 1, prompt_length=TOKENS, **options)
    positions = torch.arange(TOKENS).expand(1, 2, TOKENS)[..., None]
    for layer in range(layers):
        state.observe(layer, vector_query(layer), vector_key(layer))
        cached, _ = state.compress(layer, positions, positions)
    return state, cached[..., 0]
