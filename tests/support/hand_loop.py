"""CLAA by hand, for tiny Llama-like models: only the weights are the model's.

Own rotary embedding, masks, cache and scores, in float64 and plain loops, for one prompt without
padding. It shares no code with claa_ops and none with transformers.
"""

from dataclasses import dataclass, field
from math import exp, sqrt

import torch
from torch import Tensor


@dataclass
class Settings:
    """CLAA with budgets in tokens."""

    kept: int
    capacity: int
    layer: int
    last_n: int
    first_full: int
    window: int = 8
    kernel: int = 7
    zscore: bool = False
    sliding_window: int | None = None
    first_sliding: int = 0
    in_layer: bool = False  # the selection layer computes its queries for kept tokens alone

    def sees(self, layer: int, query_position: int, key_position: int) -> bool:
        distance = query_position - key_position
        return 0 <= distance and (not self.slides(layer) or distance < self.sliding_window)

    def slides(self, layer: int) -> bool:
        return self.sliding_window is not None and layer >= self.first_sliding


@dataclass
class Result:
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # one [vocabulary] per token
    lengths: list[int] = field(default_factory=list)  # of each layer's cache, at the end
    positions: list[int] = field(default_factory=list)  # that survive the selection


@torch.no_grad()
def generate(model, ids: list[int], steps: int, settings: Settings) -> Result:
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config = model.config
    result = Result()
    caches = [None] * config.num_hidden_layers
    positions = list(range(len(ids)))
    result.positions = positions
    for step in range(steps):
        hidden = weights["model.embed_tokens.weight"][ids]
        ranking = []
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            states = norm(hidden, weights[prefix + "input_layernorm.weight"], config)
            query, key, value = project(states, positions, weights, prefix, config)
            entries = [
                [(positions[i], key[g, i], value[g, i]) for i in range(len(ids))]
                for g in range(key.shape[0])
            ]
            seen = (
                entries
                if step == 0
                else [a + b for a, b in zip(caches[layer], entries, strict=True)]
            )
            caches[layer], index = seen, None
            if step == 0:
                scores = window_scores(query, key, positions, settings, layer)
                ranking.append(standardise(scores) if settings.zscore else scores)
                compressible = layer >= settings.first_full and not settings.slides(layer)
                if compressible and len(ids) > settings.capacity:
                    caches[layer] = [
                        [seen[g][i] for i in best(scores[g], settings.capacity, settings.window)]
                        for g in range(len(seen))
                    ]
                if layer == settings.layer and len(ids) > settings.kept:
                    rows = [row for scored in ranking[-settings.last_n :] for row in scored]
                    importance = [max(column) for column in zip(*rows, strict=True)]
                    index = best(importance, settings.kept, settings.window)
                    ids, positions = [ids[i] for i in index], [positions[i] for i in index]
                    result.positions = positions
            if index is not None and settings.in_layer:
                hidden, query, asking = hidden[index], query[:, index], positions
            else:
                asking = [position for position, _, _ in entries[0]]
            hidden = hidden + attend(query, asking, seen, settings, layer) @ (
                weights[prefix + "self_attn.o_proj.weight"].T
            )
            states = norm(hidden, weights[prefix + "post_attention_layernorm.weight"], config)
            gate = states @ weights[prefix + "mlp.gate_proj.weight"].T
            up = states @ weights[prefix + "mlp.up_proj.weight"].T
            hidden = hidden + (gate * gate.sigmoid() * up) @ (
                weights[prefix + "mlp.down_proj.weight"].T
            )
            if index is not None and not settings.in_layer:
                hidden = hidden[index]
        last = norm(hidden[-1:], weights["model.norm.weight"], config)
        result.logits.append((last @ weights["lm_head.weight"].T)[0])
        result.tokens.append(int(result.logits[-1].argmax()))
        ids, positions = result.tokens[-1:], [positions[-1] + 1]
    result.lengths = [len(cache[0]) for cache in caches]
    return result


def norm(x: Tensor, weight: Tensor, config) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()


def project(x: Tensor, positions: list[int], weights, prefix: str, config):
    """Query [H, n, D] and key, value [G, n, D]; the first two rotated."""
    dim = config.head_dim
    projected = []
    for name in ("q", "k", "v"):
        heads = x @ weights[f"{prefix}self_attn.{name}_proj.weight"].T
        heads = heads.view(len(positions), -1, dim)
        per_head = f"{prefix}self_attn.{name}_norm.weight"
        if per_head in weights:
            heads = norm(heads, weights[per_head], config)
        if name != "v":
            heads = torch.stack([rotate(row, p) for row, p in zip(heads, positions, strict=True)])
        projected.append(heads.transpose(0, 1))
    return projected


def rotate(heads: Tensor, position: int) -> Tensor:
    half = heads.shape[-1] // 2
    angle = torch.tensor([position * 10000.0 ** (-i / half) for i in range(half)]).double()
    first, second = heads[:, :half], heads[:, half:]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()],
        dim=1,
    )


def attend(query: Tensor, positions: list[int], entries, settings: Settings, layer: int) -> Tensor:
    """Attention of each query to the entries that it sees: [n, H * D]."""
    heads, group = query.shape[0], query.shape[0] // len(entries)
    rows = []
    for i, position in enumerate(positions):
        row = []
        for h in range(heads):
            seen = [e for e in entries[h // group] if settings.sees(layer, position, e[0])]
            keys, values = torch.stack([e[1] for e in seen]), torch.stack([e[2] for e in seen])
            row.append((keys @ query[h, i] / sqrt(query.shape[-1])).softmax(0) @ values)
        rows.append(torch.cat(row))
    return torch.stack(rows)


def window_scores(query: Tensor, key: Tensor, positions: list[int], settings: Settings, layer: int):
    """Scores of the context tokens, for each key/value head: lists of floats."""
    count, window = len(positions), settings.window
    context, group = count - window, query.shape[0] // key.shape[0]
    half = settings.kernel // 2
    totals = [[0.0] * context for _ in range(key.shape[0])]
    for h in range(query.shape[0]):
        summed = [0.0] * context
        for i in range(context, count):
            seen = [j for j in range(count) if settings.sees(layer, positions[i], positions[j])]
            logits = (key[h // group][seen] @ query[h, i] / sqrt(query.shape[-1])).tolist()
            terms = [exp(logit - max(logits)) for logit in logits]
            for j, term in zip(seen, terms, strict=True):
                if j < context:
                    summed[j] += term / sum(terms)
        for j in range(context):
            neighbours = summed[max(0, j - half) : j + half + 1]
            totals[h // group][j] += sum(neighbours) / settings.kernel
    return totals


def standardise(scores):
    rows = []
    for row in scores:
        mean = sum(row) / len(row)
        deviation = sqrt(sum((x - mean) ** 2 for x in row) / (len(row) - 1))
        rows.append([(x - mean) / (deviation + 1e-8) for x in row])
    return rows


def best(scores: list[float], count: int, window: int) -> list[int]:
    """The window and the tokens of best score, ascending; a tie goes to the lower position."""
    ranked = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return sorted(ranked[: count - window]) + list(range(len(scores), len(scores) + window))
