"""A model of your own in plain PyTorch: four calls in its layer loop, under ``torch.compile``.

The prefill is one graph for every length of prompt (``fullgraph=True, dynamic=True``), with the ops
in it. The weights are random: what is shown is that the compiled model keeps the tokens, and gives
the logits, of the same model run eagerly.

    pip install claa-ops
    python examples/own_model_compiled.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from claa_ops import gather_tokens
from claa_ops.methods import CLAA
from claa_ops.prefill import begin

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 512, 128, 8, 2, 16, 3
Pair = tuple[Tensor, Tensor]


class Layer(nn.Module):
    """Attention with grouped heads and rotary positions, then a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.query = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.key = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.value = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.output = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def project(self, hidden: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, ``[B, heads, n, head dim]``."""
        x = self.norms[0](hidden)
        query, key, value = (
            linear(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        return rotate(query, rotary), rotate(key, rotary), value

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, ``[B, n, width]``, after its attention."""
        hidden = hidden + self.output(attended.transpose(1, 2).flatten(2))
        gate, up = self.up(self.norms[1](hidden)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """A decoder that drops tokens of the prompt after its selection layer."""

    def __init__(self, method: CLAA) -> None:
        super().__init__()
        self.method = method
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Pair], Tensor | None]:
        """Token ids in; the last token's logits, the caches and the kept positions out."""
        hidden = self.embedding(ids)
        rotary = angles(torch.arange(ids.shape[1], device=ids.device)).expand(len(ids), -1, -1)
        state = begin(self.method, num_layers=len(self.layers), prompt_length=ids.shape[1])
        cache = []
        for i, layer in enumerate(self.layers):
            query, key, value = layer.project(hidden, rotary)
            attended = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
            hidden = layer.finish(hidden, attended)
            state.observe(i, query, key)
            cache.append(state.compress(i, key, value))  # what decoding will read
            index = state.select(i)  # None, or the tokens that the next layers see
            if index is not None:
                hidden, rotary = gather_tokens(hidden, index), gather_tokens(rotary, index)
        return self.head(hidden[:, -1]), cache, state.positions


def angles(position: Tensor) -> Tensor:
    """The rotary angles ``[1, n, head dim / 2]`` of positions ``[n]``."""
    frequency = 10_000 ** -torch.linspace(0, 1, HEAD_DIM // 2 + 1, device=position.device)[:-1]
    return (position[:, None] * frequency)[None]


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Queries or keys ``[B, heads, n, head dim]`` turned by the angles of their positions."""
    cos, sin = rotary.cos()[:, None], rotary.sin()[:, None]
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def main() -> None:
    torch.manual_seed(0)
    model = Model(CLAA(keep=0.25, layer=1, first_full=1)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in (300, 301, 1000):
        ids = torch.randint(VOCABULARY, (2, length))
        logits, cache, positions = compiled(ids)
        expected, _, kept = model(ids)
        assert torch.equal(positions, kept)
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
        entries = [key.shape[2] for key, _ in cache]
        print(f"{length} tokens: {positions.shape[1]} reach the last layer; caches hold {entries}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
