"""Every method a second time: slow, plain PyTorch in float64, one prompt at a time.

Only the weights are the model's (a tiny Llama). It shares no code with claa_ops and none with
transformers, and it knows no padding: a row of a batch must equal its prompt alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Seen:
    """What a method sees in a layer: queries [H, n, D], keys and values [G, n, D]."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    kept: list[int]  # where these n stood in the prompt

    @property
    def length(self) -> int:
        return self.query.shape[1]

    def attention(self, rows: int) -> Tensor:
        """[H, rows, n]: causal attention of the last queries."""
        key = self.key.repeat_interleave(self.query.shape[0] // self.key.shape[0], dim=0)
        logits = self.query @ key.transpose(1, 2) / self.query.shape[-1] ** 0.5
        future = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        return logits.masked_fill(future, -torch.inf).softmax(-1)[:, -rows:]

    def scores(self, window: int, kernel: int, pool_mode: str = "avg") -> Tensor:
        """[G, M]: the score of the context tokens for each key/value head."""
        summed = self.attention(window).sum(1)[:, :-window]
        pooling = F.avg_pool1d if pool_mode == "avg" else F.max_pool1d
        pooled = pooling(summed[None], kernel, stride=1, padding=kernel // 2)[0]
        return pooled.view(self.key.shape[0], -1, pooled.shape[-1]).sum(1)


@dataclass
class Result:
    logits: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # of the prompt, in the last layer
    queries: list[list[Tensor]] = field(default_factory=list)  # by forward, by layer: [H, n, D]
    prompt_keys: list[Tensor] = field(default_factory=list)  # by layer: [G, n, D]
    work: float = 0.0  # token-layers


Compress = Callable[[Seen], list[list[int]] | None]  # what each key/value head caches
Select = Callable[[Seen], list[int] | None]  # what the next layer sees


class Llama:
    def __init__(self, model) -> None:
        self.weights = {name: x.double().cpu() for name, x in model.state_dict().items()}
        self.config = model.config
        self.layers = model.config.num_hidden_layers

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        return x * scale * self.weights[name + ".weight"]

    def heads(self, x: Tensor, name: str) -> Tensor:
        flat = x @ self.weights[name + ".weight"].T
        return flat.view(x.shape[0], -1, self.config.head_dim).transpose(0, 1)

    def rotate(self, heads: Tensor, positions: list[int]) -> Tensor:
        half = heads.shape[-1] // 2
        frequency = 10000.0 ** (-torch.arange(half).double() / half)
        angle = torch.tensor(positions).double()[:, None] * frequency
        a, b = heads[..., :half], heads[..., half:]
        return torch.cat(
            [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1
        )

    @torch.no_grad()
    def run(
        self,
        ids: list[int],
        steps: int,
        *,
        compress: Compress = lambda seen: None,
        select: Select = lambda seen: None,
        positions: list[int] | None = None,
        next_position: int | None = None,
        last_layer: int | None = None,
    ) -> Result:
        """Prefill, then greedy steps; ``last_layer`` ends it after that layer of the prefill."""
        result = Result()
        place = list(range(len(ids))) if positions is None else positions
        decode_at = place[-1] + 1 if next_position is None else next_position
        caches: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.layers)]
        kept = list(range(len(ids)))
        for step in range(steps):
            x = self.weights["model.embed_tokens.weight"][ids]
            queries = []
            for layer in range(self.layers):
                prefix = f"model.layers.{layer}."
                states = self.norm(x, prefix + "input_layernorm")
                query = self.rotate(self.heads(states, prefix + "self_attn.q_proj"), place)
                key = self.rotate(self.heads(states, prefix + "self_attn.k_proj"), place)
                value = self.heads(states, prefix + "self_attn.v_proj")
                queries.append(query)
                result.work += len(place)
                seen = Seen(layer, query, key, value, kept)
                attended = []
                for g in range(key.shape[0]):
                    pairs = [*caches[layer][g : g + 1], (key[g], value[g])]
                    keys, values = (torch.cat(x) for x in zip(*pairs, strict=True))
                    group = query.shape[0] // key.shape[0]
                    logits = query[g * group : (g + 1) * group] @ keys.T / query.shape[-1] ** 0.5
                    new = torch.ones(len(place), len(place), dtype=torch.bool).triu(1)
                    hidden = F.pad(new, (keys.shape[0] - len(place), 0))
                    attended.append(logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values)
                    if step > 0:
                        caches[layer][g] = keys, values
                attended = torch.cat(attended).transpose(0, 1).flatten(1)
                x = x + attended @ self.weights[prefix + "self_attn.o_proj.weight"].T
                states = self.norm(x, prefix + "post_attention_layernorm")
                gate = states @ self.weights[prefix + "mlp.gate_proj.weight"].T
                up = states @ self.weights[prefix + "mlp.up_proj.weight"].T
                x = x + (F.silu(gate) * up) @ self.weights[prefix + "mlp.down_proj.weight"].T
                if step > 0:
                    continue
                result.prompt_keys.append(key)
                index = compress(seen) or [list(range(len(place)))] * key.shape[0]
                caches[layer] = [(key[g][i], value[g][i]) for g, i in enumerate(index)]
                index = select(seen)
                if index is not None:
                    x, place = x[index], [place[i] for i in index]
                    kept = [kept[i] for i in index]
                if layer == last_layer:
                    result.positions = kept
                    return result
            result.queries.append(queries)
            if step == 0:
                result.positions = kept
            last = self.norm(x[-1:], "model.norm") @ self.weights["lm_head.weight"].T
            result.logits.append(last[0])
            result.tokens.append(int(last.argmax()))
            ids, place, decode_at = result.tokens[-1:], [decode_at], decode_at + 1
        return result

    def best(self, scores: Tensor, count: int, window: int, seen: Seen, num_sinks: int = 0):
        """The sinks, the window and the best of [M], ``count`` of them; or None for all."""
        if count >= seen.length:
            return None
        scores = scores.clone()
        scores[:num_sinks] = torch.inf
        order = sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))
        context = list(range(len(scores), seen.length))
        return sorted(order[: count - len(context)]) + context


def tokens(keep: float | int, length: int) -> int:
    return keep if isinstance(keep, int) else int(length * keep + 1e-9)


def by_layer_scores(
    llama: Llama,
    *,
    stages: dict[int, int],
    capacity: Callable[[Seen], int],
    window: int,
    kernel: int = 7,
    pool_mode: str = "avg",
    first_full: int = 0,
    num_sinks: int = 0,
    rank: Callable[[list[Tensor]], Tensor] = lambda scores: scores[-1].sum(0),
) -> tuple[Compress, Select]:
    """FastKV and its relatives; ``rank`` has the scores since the last selection."""
    history: list[Tensor] = []

    def compress(seen):
        history.append(seen.scores(window, kernel, pool_mode))
        if seen.layer < first_full:
            return None
        heads = [llama.best(row, capacity(seen), window, seen, num_sinks) for row in history[-1]]
        return None if heads[0] is None else heads

    def select(seen):
        if seen.layer not in stages:
            return None
        index = llama.best(rank(history), stages[seen.layer], window, seen, num_sinks)
        history.clear()
        return index

    return compress, select


def pool(x: Tensor, kernel: int) -> Tensor:
    return F.avg_pool1d(x[None, None], kernel, stride=1, padding=kernel // 2)[0, 0]


def hop_scores(
    scores: Tensor, states: Tensor, *, hops: int, seeds: int, temperature: float, kernel: int
) -> list[Tensor]:
    """[M] for each hop: what of the states [M, C] is like those of the best tokens before it."""
    states = states - states.mean(0)
    states = states / states.norm(dim=-1, keepdim=True)
    found, used = [], set()
    for _ in range(hops):
        order = sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))
        best = [j for j in order if j not in used][:seeds]
        used |= set(best)
        links = []
        for seed in best:
            alike = states @ states[seed] / temperature
            alike[max(0, seed - 8) : seed + 9] = -torch.inf
            links.append(alike.softmax(0))
        raw = torch.stack(links).amax(0) if links else torch.zeros_like(scores)
        scores = pool(raw, kernel)
        found.append(scores)
    return found


def places(scores: Tensor) -> list[int]:
    """The place of each token in a ranking, from 0."""
    order = sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))
    return [order.index(j) for j in range(len(order))]


def echo(states: Tensor, question: int, temperature: float) -> Tensor:
    """[n]: how like a token is to one of the last; 0 for these."""
    order = torch.arange(len(states)).double()
    found = hop_scores(order, states, hops=1, seeds=question, temperature=temperature, kernel=7)[0]
    found[max(0, len(found) - question) :] = 0
    return found


def reached(scores: Tensor, before: int, after: int) -> Tensor:
    """The best score from ``after`` tokens before a token to ``before`` behind it."""
    return torch.stack(
        [scores[max(0, j - after) : j + before + 1].max() for j in range(len(scores))]
    )


def in_turn(direct: list[Tensor], linked: list[Tensor], first: int) -> Tensor:
    """[M]: a ranking of which each given one has its share: the direct ones two, the linked one.

    The direct ones have the first tokens for themselves, one each in turn. Then the linked ones
    take one each in turn, until each has half of what a direct one has.
    """
    shares = 2 * len(direct) + len(linked)
    due = []
    for ranking in direct:
        due.append(
            [
                place * len(direct)
                if place * len(direct) < first
                else max(first, place * shares / 2)
                for place in places(ranking)
            ]
        )
    for ranking in linked:
        due.append(
            [max(first + len(linked) * place, shares * place) + 0.25 for place in places(ranking)]
        )
    return -torch.tensor(due).double().amin(0)


def answer_attention(
    llama: Llama, ids: list[int], steps: int, pool_heads: int = 1
) -> tuple[Tensor, Result]:
    """[n]: the attention of the answer to the prompt; pooled for each head, or not at all."""
    result = llama.run(ids, steps)
    peaks = []
    for queries in result.queries:
        rows = []
        for query, key in zip(queries, result.prompt_keys, strict=True):
            key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
            logits = (key @ query[:, -1, :, None])[..., 0] / query.shape[-1] ** 0.5
            rows += [pool(row, pool_heads) for row in logits.softmax(-1)]
        peaks.append(torch.stack(rows).amax(0))
    return torch.stack(peaks).mean(0), result


def asl_variance(layers: list[Tensor], k: int) -> float:
    ranks, union = [], set()
    for scores in layers:
        order = sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))
        ranks.append({token: place for place, token in enumerate(order, start=1)})
        union |= set(order[:k])
    total = 0.0
    for token in union:
        row = [rank[token] for rank in ranks]
        mean = sum(row) / len(row)
        total += sum((x - mean) ** 2 for x in row) / len(row)
    return total / len(union)


def asl_layer(
    llama: Llama, ids: list[int], *, keep: int, window: int, first: int, last_n: int, tau: float
) -> tuple[int | None, list[Tensor]]:
    """The layer that selects, if any, and the ranking of every layer in a full prefill."""
    history: list[Tensor] = []
    llama.run(ids, 1, compress=lambda seen: history.append(seen.scores(window, 7).sum(0)))
    measure = None
    for layer in range(first, llama.layers):
        variance = asl_variance(history[layer - last_n + 1 : layer + 1], keep - window)
        measure = variance if measure is None else measure
        if variance < tau * measure:
            return layer, history
    return None, history


def gemfilter_scores(seen: Seen, kernel: int) -> Tensor:
    key = seen.key.repeat_interleave(seen.query.shape[0] // seen.key.shape[0], dim=0)
    return pool((key @ seen.query[:, -1, :, None]).sum(0)[:, 0], kernel)


def pyramidinfer(
    llama: Llama,
    length: int,
    *,
    rho: float,
    recent: float,
    weight: float,
    num_sinks: int,
    least: int,
) -> Select:
    rows = 1 + int(length * recent)

    def select(seen):
        context = seen.length - rows
        share = rho + (1 - rho) * (1 + cos(pi * seen.layer / llama.layers)) / 2
        kept = int(context * share)
        if kept <= least or kept == context:
            return None
        ramp = torch.linspace(1.0, weight, rows, dtype=torch.float64)
        scores = (seen.attention(rows).mean(0) * ramp[:, None]).mean(0)[:-rows]
        return llama.best(scores, kept + rows, rows, seen, num_sinks)

    return select


def promptdistill_scores(seen: Seen, kernel: int) -> Tensor:
    """[n - 1]: pooled after the last token, which is not a candidate, was set to zero."""
    key = seen.key.repeat_interleave(seen.query.shape[0] // seen.key.shape[0], dim=0)
    logits = (key @ seen.query[:, -1, :, None])[..., 0].mean(0) / seen.query.shape[-1] ** 0.5
    return pool(torch.cat([logits[:-1], torch.zeros(1)]), kernel)[:-1]


def uniprefill_tokens(seen: Seen, *, top_p: float, block: int, num_sinks: int, window: int):
    """The tokens that continue; None for all of a short prompt."""
    n = seen.length
    if n <= num_sinks + window:
        return None
    mean = seen.attention(window).mean((0, 1))
    masses = [float(part.sum()) for part in mean.split(block)]
    kept, covered = set(), 0.0
    for b in sorted(range(len(masses)), key=lambda b: (-masses[b], b)):
        if covered <= top_p:
            kept.add(b)
        covered += masses[b]
    return [j for j in range(n) if j < num_sinks or j >= n - window or j // block in kept]


def self_information(llama: Llama, ids: list[int]) -> Tensor:
    """[n]: what each prefix says of the token after it; nothing says anything of the first."""
    found = [0.0]
    for j in range(1, len(ids)):
        found.append(-float(llama.run(ids[:j], 1).logits[0].log_softmax(-1)[ids[j]]))
    return torch.tensor(found, dtype=torch.float64)


def chunks_of(ranking: Tensor, chunk: int, rate: float) -> list[int]:
    means = [float(part.mean()) for part in ranking.split(chunk)]
    best = sorted(range(len(means)), key=lambda c: (-means[c], c))[: ceil(len(means) * rate)]
    return [j for j in range(len(ranking)) if j // chunk in best]
