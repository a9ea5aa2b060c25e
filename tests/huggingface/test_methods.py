"""Each method through `prefill` and `decode`, against a slow version of it, alone and padded."""

from functools import partial
from math import ceil

import pytest
import torch

from claa_ops.methods import (
    ASL,
    CLAA,
    METHODS,
    Coarse,
    FastKV,
    FastKVDeferral,
    FullKV,
    GemFilter,
    Hops,
    LazyLLM,
    Oracle,
    Peak,
    PromptDistill,
    PyramidInfer,
    PyramidKV,
    Random,
    SelectiveContext,
    SinksRandom,
    SnapKV,
    SpeculativePrefill,
    StreamingLLM,
    UniPrefill,
)
from claa_ops.prefill import attach, prefill
from support import slow_methods
from support.slow_methods import Llama, by_layer_scores, tokens
from support.tiny_models import build, decoded, prompt

LENGTH, LAYERS, STEPS = 90, 6, 4
SHORT = 67  # the other row of a batch


@pytest.fixture(scope="module")
def model(device):
    return attach(build("llama", num_hidden_layers=LAYERS).to(device))


@pytest.fixture(scope="module")
def llama(model):
    return Llama(model)


# The slow versions. Each takes (llama, ids) and, by name, the settings of a case, and returns a
# Result. `kept` tokens continue and a cache keeps `cached`: a number, or a rate of the prompt.


def slow_full(llama, ids):
    return llama.run(ids, STEPS)


def stages_of(layer, kept, length) -> dict[int, int]:
    """How many tokens continue after each selection layer, of which there may be several."""
    if not isinstance(layer, tuple):
        layer, kept = (layer,), (kept,)
    return {at: tokens(keep, length) for at, keep in zip(layer, kept, strict=True)}


def slow_layered(llama, ids, *, kept, cached=None, layer=2, window=8, **settings):
    """FastKV and its relatives.

    `cached` may also be a function of the prompt's length and of what the layer sees; None for
    what continues after the last selection.
    """
    length = len(ids)
    stages = stages_of(layer, kept, length)
    if cached is None:
        cached = list(stages.values())[-1]

    def capacity(seen):
        return cached(length, seen) if callable(cached) else tokens(cached, length)

    compress, select = by_layer_scores(
        llama, stages=stages, capacity=capacity, window=window, **settings
    )
    return llama.run(ids, STEPS, compress=compress, select=select)


def a_fifth_of_the_layer(length, seen):
    """0.21 of what a layer sees; twice that after a selection of one half, at layer 2."""
    return tokens(0.21 if seen.layer <= 2 else 0.42, seen.length)


def equal_bytes(length, seen, keep):
    """6 layers of `keep` tokens each: the first holds the whole prompt, five share the rest."""
    return (6 * tokens(keep, length) - length) // 5


# How CLAA ranks, by the scores [G, M] of each layer so far.


def joint_max(history, last_n):
    return torch.cat(history[-last_n:]).amax(0)


def joint_mean(history, last_n):
    return torch.stack([scores.sum(0) for scores in history[-last_n:]]).mean(0)


def zscored_max(history, last_n, summed=False):
    rows = [scores.sum(0, keepdim=True) if summed else scores for scores in history[-last_n:]]
    rows = torch.cat(rows)
    return ((rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)).amax(0)


def slow_ranked(llama, ids, ranking, *, kept, cached, layer=2, window=8, num_sinks=0):
    """One ranking of the prompt, [n], decides in every selection and for all heads of a cache."""
    stages = stages_of(layer, kept, len(ids))
    capacity = tokens(cached, len(ids))

    def best(seen, count):
        scores = ranking[torch.tensor(seen.kept)][:-window]
        return llama.best(scores, count, window, seen, num_sinks)

    def compress(seen):
        index = best(seen, capacity)
        return None if index is None else [index] * seen.key.shape[0]

    def select(seen):
        return best(seen, stages[seen.layer]) if seen.layer in stages else None

    return llama.run(ids, STEPS, compress=compress, select=select)


def slow_random(llama, ids, *, seed, window=8, **settings):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(len(ids) - window, generator=generator).flip(0).double()
    draw = torch.cat([draw, torch.zeros(window)])  # the window is not drawn for
    return slow_ranked(llama, ids, draw, window=window, **settings)


def slow_oracle(llama, ids, *, answer_tokens, kernel=13, **settings):
    attention, answer = slow_methods.answer_attention(llama, ids, answer_tokens)
    result = slow_ranked(llama, ids, slow_methods.pool(attention, kernel), **settings)
    result.work += answer.work
    return result


def slow_peak(
    llama,
    ids,
    *,
    kept,
    cached,
    kernel,
    layer=2,
    window=8,
    num_sinks=0,
    rank=lambda scores, seen: scores,
):
    stages = stages_of(layer, kept, len(ids))
    capacity = tokens(cached, len(ids))
    peak = torch.zeros(len(ids)).double()

    def compress(seen):
        key = seen.key.repeat_interleave(seen.query.shape[0] // seen.key.shape[0], dim=0)
        logits = seen.query[:, -window:] @ key.transpose(1, 2) / key.shape[-1] ** 0.5
        peak[seen.kept] = torch.maximum(peak[seen.kept], logits.softmax(-1).amax((0, 1)))
        scores = seen.scores(window, kernel)
        heads = [llama.best(row, capacity, window, seen, num_sinks) for row in scores]
        return None if heads[0] is None else heads

    def select(seen):
        if seen.layer not in stages:
            return None
        scores = rank(slow_methods.pool(peak[seen.kept][:-window], kernel), seen)
        return llama.best(scores, stages[seen.layer], window, seen, num_sinks)

    return llama.run(ids, STEPS, compress=compress, select=select)


def slow_hops(
    llama, ids, *, hops, question, opening, seeds, temperature, least, kernel, **settings
):
    led: list[list[dict[int, float]]] = []  # of the first selection: the echo, and the hops

    def rank(peaks, seen):
        if not led:
            states = seen.value.transpose(0, 1).flatten(1)
            start, reached, linked = peaks, [], []
            if question:
                echo = slow_methods.echo(states, question, temperature)[: len(peaks)]
                reached = [slow_methods.reached(echo, 8, 12)]
                both = zip(slow_methods.places(peaks), slow_methods.places(echo), strict=True)
                start = -torch.tensor([min(pair) for pair in both]).double()
            if hops:
                first = torch.arange(len(peaks)) < seeds // 2
                linked = slow_methods.hop_scores(
                    start.masked_fill(first & opening, torch.inf),
                    states[: len(peaks)],
                    hops=hops,
                    seeds=seeds,
                    temperature=temperature,
                    kernel=kernel,
                )
            for rankings in (reached, linked):
                led.append([dict(zip(seen.kept, each.tolist(), strict=False)) for each in rankings])
        kept = seen.kept[: len(peaks)]
        reached, linked = (
            [torch.tensor([each[j] for j in kept]).double() for each in rankings]
            for rankings in led
        )
        return slow_methods.in_turn([peaks, *reached], linked, least)

    return slow_peak(llama, ids, kernel=kernel, rank=rank, **settings)


def slow_coarse(llama, ids, *, kept, cached, layer, ahead, every, kernel, window=8, num_sinks=0):
    """Two prefills: the first ends with the part's last layer, the second knows what is kept."""
    length, peak, part = len(ids), torch.zeros(len(ids) - window).double(), []
    context = [j for j in range(length - window) if j < num_sinks or j % every == 0]

    def take_part(seen):
        if seen.layer == layer and tokens(kept, length) < length:
            part.extend(context + list(range(length - window, length)))
            return part
        if seen.layer > layer and part:
            key = seen.key.repeat_interleave(seen.query.shape[0] // seen.key.shape[0], dim=0)
            logits = seen.query[:, -window:] @ key.transpose(1, 2) / key.shape[-1] ** 0.5
            highest = logits.softmax(-1).amax((0, 1))[:-window]
            peak[context] = torch.maximum(peak[context], highest)

    first = llama.run(ids, 1, select=take_part, last_layer=ahead)
    ranking = slow_methods.pool(peak, kernel)

    def select(seen):
        if seen.layer == layer:
            return llama.best(ranking, tokens(kept, length), window, seen, num_sinks)

    compress, _ = by_layer_scores(
        llama,
        stages={},
        capacity=lambda seen: tokens(cached, length),
        window=window,
        kernel=kernel,
        num_sinks=num_sinks,
    )
    result = llama.run(ids, STEPS, compress=compress, select=select)
    result.work += first.work - (layer + 1) * length if part else 0
    return result


def slow_streaming(llama, ids, *, cached, num_sinks):
    def compress(seen):
        capacity = max(num_sinks + 1, tokens(cached, seen.length))
        if capacity >= seen.length:
            return None
        last = range(seen.length - capacity + num_sinks, seen.length)
        return [[*range(num_sinks), *last]] * seen.key.shape[0]

    return llama.run(ids, STEPS, compress=compress)


def slow_pyramidkv(llama, ids, *, cached, beta=20, window=8):
    average = tokens(cached, len(ids)) - window
    first = min(2 * average - average / beta, len(ids) - window)
    last = 2 * average - first

    def capacity(seen):
        return window + round(first + (last - first) * seen.layer / (LAYERS - 1))

    compress, _ = by_layer_scores(llama, stages={}, capacity=capacity, window=window, kernel=5)
    return llama.run(ids, STEPS, compress=compress)


def slow_pyramidinfer(llama, ids, **settings):
    select = slow_methods.pyramidinfer(llama, len(ids), **settings)
    return llama.run(ids, STEPS, select=select)


def slow_revival(llama, ids, *, kept, layer):
    return slow_methods.revival(llama, ids, STEPS, stages_of(layer, kept, len(ids)))


def slow_promptdistill(llama, ids, *, kept, layer=2, kernel=5):
    stages = stages_of(layer, kept, len(ids))

    def select(seen):
        if seen.layer not in stages:
            return None
        scores = slow_methods.promptdistill_scores(seen, kernel)
        return llama.best(scores, stages[seen.layer], 1, seen)

    return llama.run(ids, STEPS, select=select)


def slow_uniprefill(llama, ids, *, layers, **settings):
    def select(seen):
        if seen.layer not in layers:
            return None
        return slow_methods.uniprefill_tokens(seen, **settings)

    return llama.run(ids, STEPS, select=select)


# Methods of two passes.


def second_pass(llama, ids, chosen, *, contiguous, work):
    """A prefill of the chosen tokens, in positions 0, 1, 2, ... or in their own."""
    result = llama.run(
        [ids[j] for j in chosen],
        STEPS,
        positions=list(range(len(chosen))) if contiguous else chosen,
        next_position=len(chosen) if contiguous else len(ids),
    )
    result.positions = chosen
    result.work += work
    return result


def slow_gemfilter(llama, ids, *, kept, layer, kernel=5):
    chosen = []

    def select(seen):
        if seen.layer == layer:
            scores = slow_methods.gemfilter_scores(seen, kernel)
            best = llama.best(scores, tokens(kept, len(ids)), 0, seen)
            chosen.extend(range(len(ids)) if best is None else best)

    first = llama.run(ids, 1, select=select, last_layer=layer)
    return second_pass(llama, ids, chosen, contiguous=True, work=first.work)


def slow_asl(llama, ids, *, kept, first, last_n, tau, window=8, passes=1, full_before=False):
    layer, history = slow_methods.asl_layer(
        llama, ids, keep=kept, window=window, first=first, last_n=last_n, tau=tau
    )
    if passes == 2:
        last = LAYERS - 1 if layer is None else layer
        order = sorted(range(len(ids) - window), key=lambda j: -float(history[last][j]))
        chosen = sorted(order[: kept - window]) + list(range(len(ids) - window, len(ids)))
        work = (last + 1) * len(ids)
        return second_pass(llama, ids, chosen, contiguous=True, work=work)
    first_full = 0
    if full_before:
        first_full = LAYERS if layer is None else layer + 1
    compress, select = by_layer_scores(
        llama,
        stages={} if layer is None else {layer: kept},
        capacity=lambda seen: kept,
        window=window,
        first_full=first_full,
    )
    return llama.run(ids, STEPS, compress=compress, select=select)


def slow_speculative(llama, ids, *, kept, look_ahead, kernel=13, draft=None):
    """The draft is the model itself if there is no other; a rate is rounded up."""
    reader = llama if draft is None else Llama(draft)
    ranking, answer = slow_methods.answer_attention(reader, ids, look_ahead, kernel)
    order = sorted(range(len(ids)), key=lambda j: -float(ranking[j]))
    chosen = sorted(order[: kept if isinstance(kept, int) else ceil(kept * len(ids))])
    return second_pass(llama, ids, chosen, contiguous=False, work=answer.work)


def slow_speculative_chunks(llama, ids, *, rate, look_ahead, chunk, kernel=13):
    ranking, answer = slow_methods.answer_attention(llama, ids, look_ahead, kernel)
    chosen = slow_methods.chunks_of(ranking, chunk, rate)
    return second_pass(llama, ids, chosen, contiguous=False, work=answer.work)


def slow_selective(llama, ids, *, kept, window=8, draft=None):
    reader = llama if draft is None else Llama(draft)
    information = slow_methods.self_information(reader, ids)
    context = sorted(range(1, len(ids) - window), key=lambda j: -float(information[j]))
    certain = [0, *range(len(ids) - window, len(ids))]
    chosen = sorted(certain + context[: tokens(kept, len(ids)) - len(certain)])
    return second_pass(llama, ids, chosen, contiguous=True, work=reader.layers * len(ids))


# The cases: a method, and the slow version with the same settings in plain words.


SMALL = {"layer": 2, "window": 8}
DRAFT = build("llama", num_hidden_layers=2)
CASES = {
    "full": (FullKV(), slow_full),
    # Compressed caches after a full prefill.
    "snapkv": (
        SnapKV(keep=30, window=8),
        partial(slow_layered, kept=(), layer=(), cached=30, kernel=5),
    ),
    "snapkv, rate, max": (
        SnapKV(keep=0.3, window=12, kernel_size=7, pool_mode="max"),
        partial(slow_layered, kept=(), layer=(), cached=0.3, window=12, pool_mode="max"),
    ),
    "streaming": (
        StreamingLLM(keep=30, num_sinks=3),
        partial(slow_streaming, cached=30, num_sinks=3),
    ),
    "streaming, rate": (
        StreamingLLM(keep=0.31, num_sinks=3),
        partial(slow_streaming, cached=0.31, num_sinks=3),
    ),
    "pyramidkv": (
        PyramidKV(keep=30, window=8, beta=10),
        partial(slow_pyramidkv, cached=30, beta=10),
    ),
    "pyramidkv, clipped": (PyramidKV(keep=60, window=8), partial(slow_pyramidkv, cached=60)),
    "pyramidkv, rate": (PyramidKV(keep=0.35, window=8), partial(slow_pyramidkv, cached=0.35)),
    "pyramidkv, high rate": (PyramidKV(keep=0.7, window=8), partial(slow_pyramidkv, cached=0.7)),
    # FastKV.
    "fastkv": (FastKV(keep=30, **SMALL), partial(slow_layered, kept=30)),
    "fastkv, constant": (
        FastKV(keep=40, keep_kv=24, **SMALL),
        partial(slow_layered, kept=40, cached=24),
    ),
    "fastkv, rates, max": (
        FastKV(keep=0.4, keep_kv=0.2, pool_mode="max", **SMALL),
        partial(slow_layered, kept=0.4, cached=0.2, pool_mode="max"),
    ),
    "fastkv, rates of the layer": (
        FastKV(keep=0.5, keep_kv=0.21, rates_of="layer", **SMALL),
        partial(slow_layered, kept=0.5, cached=a_fifth_of_the_layer),
    ),
    "fastkv, staged": (
        FastKV(keep=(60, 40, 24), layer=(0, 1, 3)),
        partial(slow_layered, kept=(60, 40, 24), layer=(0, 1, 3)),
    ),
    "fastkv, staged rates": (
        FastKV(keep=(0.63, 0.47, 0.2), layer=(0, 1, 3), window=8),
        partial(slow_layered, kept=(0.63, 0.47, 0.2), layer=(0, 1, 3)),
    ),
    "fastkv, sinks": (
        FastKV(keep=30, num_sinks=5, **SMALL),
        partial(slow_layered, kept=30, num_sinks=5),
    ),
    "fastkv, padding stays": (FastKV(keep=80, **SMALL), partial(slow_layered, kept=80)),
    "fastkv-deferral": (
        FastKVDeferral(keep=30, first_full=2, **SMALL),
        partial(slow_layered, kept=30, first_full=2),
    ),
    # CLAA.
    "claa": (
        CLAA(keep=40, keep_kv=24, last_n=2, first_full=1, **SMALL),
        partial(slow_layered, kept=40, cached=24, first_full=1, rank=partial(joint_max, last_n=2)),
    ),
    "claa, rates": (
        CLAA(keep=0.37, keep_kv=0.23, last_n=2, first_full=1, **SMALL),
        partial(
            slow_layered, kept=0.37, cached=0.23, first_full=1, rank=partial(joint_max, last_n=2)
        ),
    ),
    "claa, z-scored": (
        CLAA(keep=30, zscore=True, last_n=3, first_full=1, **SMALL),
        partial(slow_layered, kept=30, first_full=1, rank=partial(zscored_max, last_n=3)),
    ),
    "claa, z-scored, rates": (
        CLAA(keep=0.37, zscore=True, last_n=3, first_full=1, **SMALL),
        partial(slow_layered, kept=0.37, first_full=1, rank=partial(zscored_max, last_n=3)),
    ),
    "claa, ranking script": (
        CLAA(keep=30, zscore=True, over_heads="sum", last_n=3, first_full=1, **SMALL),
        partial(
            slow_layered, kept=30, first_full=1, rank=partial(zscored_max, last_n=3, summed=True)
        ),
    ),
    "claa, mean": (
        CLAA(keep=30, over_heads="sum", over_layers="mean", last_n=2, first_full=0, **SMALL),
        partial(slow_layered, kept=30, rank=partial(joint_mean, last_n=2)),
    ),
    "claa, staged": (
        CLAA(keep=(60, 30), layer=(2, 4), last_n=3, first_full=2),
        partial(
            slow_layered,
            kept=(60, 30),
            layer=(2, 4),
            first_full=2,
            rank=partial(joint_max, last_n=3),
        ),
    ),
    "claa, equal bytes": (
        CLAA(keep=30, last_n=2, first_full=1, equal_cache=True, **SMALL),
        partial(
            slow_layered,
            kept=30,
            cached=partial(equal_bytes, keep=30),
            first_full=1,
            rank=partial(joint_max, last_n=2),
        ),
    ),
    "claa, rates, equal bytes": (
        CLAA(keep=0.4, last_n=2, first_full=1, equal_cache=True, **SMALL),
        partial(
            slow_layered,
            kept=0.4,
            cached=partial(equal_bytes, keep=0.4),
            first_full=1,
            rank=partial(joint_max, last_n=2),
        ),
    ),
    # Rankings that no layer makes.
    "random": (Random(keep=30, seed=5, **SMALL), partial(slow_random, kept=30, cached=30, seed=5)),
    "random, staged": (
        Random(keep=(60, 30), keep_kv=24, layer=(1, 3), seed=5),
        partial(slow_random, kept=(60, 30), cached=24, seed=5, layer=(1, 3)),
    ),
    "random, staged rates": (
        Random(keep=(0.6, 0.3), keep_kv=0.2, layer=(1, 3), seed=5),
        partial(slow_random, kept=(0.6, 0.3), cached=0.2, seed=5, layer=(1, 3)),
    ),
    "sinks-random": (
        SinksRandom(keep=30, seed=6, **SMALL),
        partial(slow_random, kept=30, cached=30, seed=6, num_sinks=4),
    ),
    "oracle": (
        Oracle(keep=40, keep_kv=24, max_new_tokens=5, **SMALL),
        partial(slow_oracle, kept=40, cached=24, answer_tokens=5),
    ),
    "oracle, staged": (
        Oracle(keep=(60, 30), layer=(1, 3), max_new_tokens=5),
        partial(slow_oracle, kept=(60, 30), cached=30, answer_tokens=5, layer=(1, 3)),
    ),
    "oracle, staged rates": (
        Oracle(keep=(0.6, 0.3), layer=(1, 3), max_new_tokens=5),
        partial(slow_oracle, kept=(0.6, 0.3), cached=0.3, answer_tokens=5, layer=(1, 3)),
    ),
    # Other rankings by layer.
    "peak": (
        Peak(keep=30, kernel_size=9, num_sinks=0, **SMALL),
        partial(slow_peak, kept=30, cached=30, kernel=9),
    ),
    "peak, staged, sinks": (
        Peak(keep=(60, 30), keep_kv=24, layer=(1, 3), kernel_size=9, window=8),
        partial(slow_peak, kept=(60, 30), cached=24, kernel=9, layer=(1, 3), num_sinks=4),
    ),
    "peak, staged rates, sinks": (
        Peak(keep=(0.6, 0.3), keep_kv=0.25, layer=(1, 3), kernel_size=9, window=8),
        partial(slow_peak, kept=(0.6, 0.3), cached=0.25, kernel=9, layer=(1, 3), num_sinks=4),
    ),
    "hops": (
        Hops(
            keep=30,
            kernel_size=5,
            num_sinks=0,
            question=9,
            reach=12,
            num_seeds=6,
            least=4,
            temperature=0.2,
            **SMALL,
        ),
        partial(
            slow_hops,
            kept=30,
            cached=1.0,
            kernel=5,
            hops=3,
            question=9,
            opening=True,
            seeds=6,
            least=4,
            temperature=0.2,
        ),
    ),
    "hops, staged": (
        Hops(
            keep=(0.7, 0.4),
            layer=(1, 3),
            keep_least=0,
            kernel_size=5,
            num_sinks=2,
            window=8,
            question=9,
            reach=12,
            opening=False,
            num_seeds=6,
            least=6,
            temperature=0.2,
        ),
        partial(
            slow_hops,
            kept=(0.7, 0.4),
            cached=1.0,
            layer=(1, 3),
            num_sinks=2,
            kernel=5,
            hops=3,
            question=9,
            opening=False,
            seeds=6,
            least=6,
            temperature=0.2,
        ),
    ),
    "hops, no question": (
        Hops(
            keep=(0.6, 0.4),
            keep_kv=0.3,
            layer=(1, 3),
            kernel_size=3,
            window=8,
            least=5,
            keep_least=0,
            question=0,
        ),
        partial(
            slow_hops,
            kept=(0.6, 0.4),
            cached=0.3,
            layer=(1, 3),
            kernel=3,
            num_sinks=4,
            hops=3,
            question=0,
            opening=True,
            seeds=64,
            least=5,
            temperature=0.05,
        ),
    ),
    "hops, echo alone": (
        Hops(
            keep=0.4,
            keep_kv=None,
            keep_least=0,
            kernel_size=5,
            num_sinks=0,
            question=9,
            reach=12,
            hops=0,
            least=10,
            **SMALL,
        ),
        partial(
            slow_hops,
            kept=0.4,
            cached=0.4,
            kernel=5,
            hops=0,
            question=9,
            opening=False,
            seeds=64,
            least=10,
            temperature=0.05,
        ),
    ),
    "coarse": (
        Coarse(keep=30, layer=1, ahead=3, num_sinks=0, kernel_size=9, window=8),
        partial(slow_coarse, kept=30, cached=30, layer=1, ahead=3, every=2, kernel=9),
    ),
    "coarse, rates, sinks, every third": (
        Coarse(keep=0.4, keep_kv=0.3, layer=0, ahead=4, every=3, kernel_size=7, window=8),
        partial(
            slow_coarse, kept=0.4, cached=0.3, layer=0, ahead=4, every=3, kernel=7, num_sinks=4
        ),
    ),
    "coarse, caches whole": (
        Coarse(keep=0.2, keep_kv=1.0, layer=2, num_sinks=3, kernel_size=5, window=8),
        partial(
            slow_coarse, kept=0.2, cached=1.0, layer=2, ahead=3, every=2, kernel=5, num_sinks=3
        ),
    ),
    "coarse, padding stays": (
        Coarse(keep=80, layer=1, ahead=3, num_sinks=0, kernel_size=9, window=8),
        partial(slow_coarse, kept=80, cached=80, layer=1, ahead=3, every=2, kernel=9),
    ),
    "pyramidinfer": (
        PyramidInfer(rho=0.3, recent=0.2, least=10),
        partial(slow_pyramidinfer, rho=0.3, recent=0.2, weight=1.2, num_sinks=4, least=10),
    ),
    "lazyllm": (
        LazyLLM(keep=20),
        partial(slow_layered, kept=(60, 40, 20), cached=1.0, layer=(0, 2, 3), window=1, kernel=1),
    ),
    "lazyllm, rate": (
        LazyLLM(keep=0.37),
        partial(
            slow_layered, kept=(1.0, 0.74, 0.37), cached=1.0, layer=(0, 2, 3), window=1, kernel=1
        ),
    ),
    "lazyllm, given layers": (
        LazyLLM(keep=0.3, layer=(1, 3)),
        partial(slow_layered, kept=(0.6, 0.3), cached=1.0, layer=(1, 3), window=1, kernel=1),
    ),
    "lazyllm, given stages, caches cut": (
        LazyLLM(keep=(0.7, 0.4), layer=(1, 4), keep_kv=0.3),
        partial(slow_layered, kept=(0.7, 0.4), cached=0.3, layer=(1, 4), window=1, kernel=1),
    ),
    "lazyllm, revived": (
        LazyLLM(keep=(40, 35, 30), layer=(0, 1, 3), revive=True),
        partial(slow_revival, kept=(40, 35, 30), layer=(0, 1, 3)),
    ),
    "lazyllm, revived, rates": (
        LazyLLM(keep=(0.5, 0.4, 0.3), layer=(0, 2, 4), revive=True),
        partial(slow_revival, kept=(0.5, 0.4, 0.3), layer=(0, 2, 4)),
    ),
    "promptdistill": (PromptDistill(keep=30), partial(slow_promptdistill, kept=30)),
    "promptdistill, staged rates": (
        PromptDistill(keep=(0.63, 0.31), layer=(1, 3), kernel_size=3),
        partial(slow_promptdistill, kept=(0.63, 0.31), layer=(1, 3), kernel=3),
    ),
    "uniprefill": (
        UniPrefill(top_p=0.7, block=8, num_sinks=8, window=12),
        partial(slow_uniprefill, layers=range(5), top_p=0.7, block=8, num_sinks=8, window=12),
    ),
    "uniprefill, odd blocks": (
        UniPrefill(top_p=0.5, layer=(1, 3), block=7, num_sinks=3, window=16),
        partial(slow_uniprefill, layers=(1, 3), top_p=0.5, block=7, num_sinks=3, window=16),
    ),
    "uniprefill, the short row whole": (
        UniPrefill(top_p=0.2, layer=2, block=4, num_sinks=40, window=40),
        partial(slow_uniprefill, layers=(2,), top_p=0.2, block=4, num_sinks=40, window=40),
    ),
    # Two passes.
    "gemfilter": (GemFilter(keep=30, layer=3), partial(slow_gemfilter, kept=30, layer=3)),
    "gemfilter, rate": (GemFilter(keep=0.31, layer=3), partial(slow_gemfilter, kept=0.31, layer=3)),
    "gemfilter, padding stays": (
        GemFilter(keep=80, layer=3),
        partial(slow_gemfilter, kept=80, layer=3),
    ),
    "speculative": (
        SpeculativePrefill(keep=30, look_ahead=4, chunk=None),
        partial(slow_speculative, kept=30, look_ahead=4),
    ),
    "speculative, rate": (
        SpeculativePrefill(keep=0.31, look_ahead=4, chunk=None),
        partial(slow_speculative, kept=0.31, look_ahead=4),
    ),
    "speculative, padding stays": (
        SpeculativePrefill(keep=80, look_ahead=4, chunk=None),
        partial(slow_speculative, kept=80, look_ahead=4),
    ),
    "speculative, draft": (
        SpeculativePrefill(keep=30, look_ahead=4, chunk=None, draft=DRAFT),
        partial(slow_speculative, kept=30, look_ahead=4, draft=DRAFT),
    ),
    "speculative, forked": (
        SpeculativePrefill(keep=25, look_ahead=2, chunk=None, kernel_size=7),
        partial(slow_speculative, kept=25, look_ahead=2, kernel=7),
    ),
    "selective-context": (SelectiveContext(keep=30, window=8), partial(slow_selective, kept=30)),
    "selective-context, rate": (
        SelectiveContext(keep=0.4, window=11),
        partial(slow_selective, kept=0.4, window=11),
    ),
    "selective-context, draft": (
        SelectiveContext(keep=0.4, window=8, draft=DRAFT),
        partial(slow_selective, kept=0.4, draft=DRAFT),
    ),
}
ONE_PROMPT = {  # methods that serve no batch
    "asl": (
        ASL(keep=30, layer=2, last_n=3, tau=0.99, window=8),
        partial(slow_asl, kept=30, first=2, last_n=3, tau=0.99),
    ),
    "asl, never": (
        ASL(keep=30, layer=2, last_n=3, tau=0.01, window=8),
        partial(slow_asl, kept=30, first=2, last_n=3, tau=0.01),
    ),
    "asl, full before": (
        ASL(keep=30, layer=2, last_n=3, tau=0.99, full_before=True, window=8),
        partial(slow_asl, kept=30, first=2, last_n=3, tau=0.99, full_before=True),
    ),
    "asl, two passes": (
        ASL(keep=30, layer=2, last_n=3, tau=0.99, passes=2, window=8),
        partial(slow_asl, kept=30, first=2, last_n=3, tau=0.99, passes=2),
    ),
    "asl, two passes, never": (
        ASL(keep=30, layer=2, last_n=3, tau=0.01, passes=2, window=8),
        partial(slow_asl, kept=30, first=2, last_n=3, tau=0.01, passes=2),
    ),
    "asl, fixed layer": (ASL(keep=30, layer=2, tau=None, window=8), partial(slow_layered, kept=30)),
    "speculative, chunks": (
        SpeculativePrefill(keep=0.3, look_ahead=4, chunk=8),
        partial(slow_speculative_chunks, rate=0.3, look_ahead=4, chunk=8),
    ),
}


def assert_same(prefilled, decoded_row, row, padding, expected):
    """A row of a batch keeps the tokens of the slow version, and decodes to the same answer."""
    logits, new = decoded_row
    kept = list(range(padding, LENGTH))
    if prefilled.positions is not None:
        kept = [j for j in prefilled.positions[row].tolist() if j >= padding]
    assert [j - padding for j in kept] == expected.positions
    slow_logits = torch.stack(expected.logits)
    error = (logits.double().cpu() - slow_logits).abs().max()
    assert error <= 1e-4 * slow_logits.abs().max()
    assert new.tolist() == expected.tokens


@pytest.mark.parametrize("case", [*CASES, *ONE_PROMPT])
def test_a_prompt_alone_is_the_slow_version(model, llama, case):
    method, slow = {**CASES, **ONE_PROMPT}[case]
    ids = prompt(LENGTH)[0].to(model.device)
    prefilled = prefill(model, ids, method)
    expected = slow(llama, ids[0].tolist())
    token_layers = expected.work - (STEPS - 1) * LAYERS  # without decoding
    assert prefilled.work_share == pytest.approx(token_layers / (LENGTH * LAYERS))
    logits, new = decoded(model, prefilled)
    assert_same(prefilled, (logits[0], new[0]), 0, 0, expected)


@pytest.mark.parametrize("case", CASES)
def test_a_padded_batch_is_the_slow_version_of_each_row(model, llama, case):
    method, slow = CASES[case]
    ids, mask = (x.to(model.device) for x in prompt(LENGTH, SHORT))
    prefilled = prefill(model, ids, method, mask)
    logits, new = decoded(model, prefilled)
    for row, padding in enumerate((0, LENGTH - SHORT)):
        expected = slow(llama, ids[row, padding:].tolist())
        assert_same(prefilled, (logits[row], new[row]), row, padding, expected)


@pytest.mark.parametrize("case", ONE_PROMPT)
def test_one_padded_prompt_is_the_slow_version(model, llama, case):
    method, slow = ONE_PROMPT[case]
    ids, mask = (x.to(model.device) for x in prompt(LENGTH, SHORT))
    prefilled = prefill(model, ids[1:], method, mask[1:])
    logits, new = decoded(model, prefilled)
    padding = LENGTH - SHORT
    expected = slow(llama, ids[1, padding:].tolist())
    assert_same(prefilled, (logits[0], new[0]), 0, padding, expected)


def test_tokens_are_revived(llama):
    """Or these cases would say nothing: in both rows of the batch, a number of its own."""
    ids, _ = prompt(LENGTH, SHORT)
    for case in ("lazyllm, revived", "lazyllm, revived, rates"):
        slow = CASES[case][1]
        revived = [
            slow(llama, row[padding:].tolist()).revived
            for row, padding in zip(ids, (0, LENGTH - SHORT), strict=True)
        ]
        assert 0 < min(revived) < max(revived)


def test_every_method_is_compared_with_a_slow_version():
    tested = {type(method) for method, _ in {**CASES, **ONE_PROMPT}.values()}
    assert tested == set(METHODS.values())


def test_the_adaptive_layer_is_found_in_some_cases_and_not_in_others(model):
    ids = prompt(LENGTH)[0].to(model.device)
    selected = {
        case: prefill(model, ids, method).state.notes.get("selected")
        for case, (method, _) in ONE_PROMPT.items()
        if case.startswith("asl")
    }
    for case in ("asl", "asl, full before", "asl, two passes"):
        assert selected[case] > 2
    for case in ("asl, never", "asl, two passes, never"):
        assert selected[case] is None
    assert selected["asl, fixed layer"] == 2
