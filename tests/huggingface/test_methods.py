"""Each method through `run` and decoding, against a slow version of itself, alone and padded."""

from math import ceil

import pytest
import torch

from claa_ops.methods import (
    ASL,
    CLAA,
    METHODS,
    FastKV,
    FastKVDeferral,
    FullKV,
    GemFilter,
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


# The slow version of a method: (llama, ids) -> Result. Budgets are numbers, or rates of the prompt.


def slow_full(llama, ids):
    return llama.run(ids, STEPS)


def stages_of(layer, kept, length) -> dict[int, int]:
    """How many tokens continue after which layers; there may be one of them, or several."""
    if not isinstance(layer, tuple):
        layer, kept = (layer,), (kept,)
    return {at: tokens(keep, length) for at, keep in zip(layer, kept, strict=True)}


def slow_layered(kept, cached=None, *, layer=2, window=8, **settings):
    """FastKV's relatives; `cached` may be a function of the prompt's length and a layer's sight."""

    def slow(llama, ids):
        stages = stages_of(layer, kept, len(ids))
        held = list(stages.values())[-1] if cached is None else cached

        def capacity(seen):
            return held(len(ids), seen) if callable(held) else tokens(held, len(ids))

        compress, select = by_layer_scores(
            llama, stages=stages, capacity=capacity, window=window, **settings
        )
        return llama.run(ids, STEPS, compress=compress, select=select)

    return slow


def joint_max(last_n):
    return lambda history: torch.cat(history[-last_n:]).amax(0)


def joint_mean(last_n):
    return lambda history: torch.stack([row.sum(0) for row in history[-last_n:]]).mean(0)


def zscored_max(last_n, summed=False):
    def rank(history):
        rows = torch.cat([x.sum(0, keepdim=True) if summed else x for x in history[-last_n:]])
        return ((rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)).amax(0)

    return rank


def slow_ranked(llama, ids, rank, *, kept, cached, layer, window, num_sinks=0):
    """One ranking of the prompt, [n], decides in every selection and for all heads of a cache."""
    stages = stages_of(layer, kept, len(ids))
    cached = tokens(cached, len(ids))

    def best(seen, count):
        scores = rank[torch.tensor(seen.kept)][:-window]
        return llama.best(scores, count, window, seen, num_sinks)

    def compress(seen):
        index = best(seen, cached)
        return None if index is None else [index] * seen.key.shape[0]

    def select(seen):
        return best(seen, stages[seen.layer]) if seen.layer in stages else None

    return llama.run(ids, STEPS, compress=compress, select=select)


def slow_random(kept, cached, seed, num_sinks=0, layer=2, window=8):
    def slow(llama, ids):
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(len(ids) - window, generator=generator).flip(0).double()
        draw = torch.cat([draw, torch.zeros(window)])  # the window has none
        settings = {"kept": kept, "cached": cached, "layer": layer, "window": window}
        return slow_ranked(llama, ids, draw, num_sinks=num_sinks, **settings)

    return slow


def slow_oracle(kept, cached, answer_tokens, kernel=13, layer=2, window=8):
    def slow(llama, ids):
        attention, answer = slow_methods.answer_attention(llama, ids, answer_tokens)
        ranking = slow_methods.pool(attention, kernel)
        settings = {"kept": kept, "cached": cached, "layer": layer, "window": window}
        result = slow_ranked(llama, ids, ranking, **settings)
        result.work += answer.work
        return result

    return slow


def slow_peak(kept, cached, kernel, layer=2, window=8, num_sinks=0):
    def slow(llama, ids):
        stages = stages_of(layer, kept, len(ids))
        peak = torch.zeros(len(ids)).double()

        def compress(seen):
            key = seen.key.repeat_interleave(seen.query.shape[0] // seen.key.shape[0], dim=0)
            logits = seen.query[:, -window:] @ key.transpose(1, 2) / key.shape[-1] ** 0.5
            peak[seen.kept] = torch.maximum(peak[seen.kept], logits.softmax(-1).amax((0, 1)))
            scores = seen.scores(window, kernel)
            heads = [
                llama.best(row, tokens(cached, len(ids)), window, seen, num_sinks) for row in scores
            ]
            return None if heads[0] is None else heads

        def select(seen):
            if seen.layer in stages:
                scores = slow_methods.pool(peak[seen.kept][:-window], kernel)
                return llama.best(scores, stages[seen.layer], window, seen, num_sinks)

        return llama.run(ids, STEPS, compress=compress, select=select)

    return slow


def slow_streaming(keep, num_sinks):
    def compress(seen):
        kept = max(num_sinks + 1, tokens(keep, seen.length))
        if kept >= seen.length:
            return None
        index = list(range(num_sinks)) + list(range(seen.length - kept + num_sinks, seen.length))
        return [index] * seen.key.shape[0]

    return lambda llama, ids: llama.run(ids, STEPS, compress=compress)


def slow_pyramidkv(keep, beta, window):
    def slow(llama, ids):
        length = len(ids)
        average = tokens(keep, length)
        last = (average - window) / beta
        first = min(2 * (average - window) - last, length - window)
        last = 2 * (average - window) - first

        def capacity(seen):
            return window + round(first + (last - first) * seen.layer / (LAYERS - 1))

        compress, _ = by_layer_scores(llama, stages={}, capacity=capacity, window=window, kernel=5)
        return llama.run(ids, STEPS, compress=compress)

    return slow


def slow_pyramidinfer(**settings):
    def slow(llama, ids):
        select = slow_methods.pyramidinfer(llama, len(ids), **settings)
        return llama.run(ids, STEPS, select=select)

    return slow


def second_pass(llama, ids, kept, *, contiguous, work):
    result = llama.run(
        [ids[j] for j in kept],
        STEPS,
        positions=list(range(len(kept))) if contiguous else kept,
        next_position=len(kept) if contiguous else len(ids),
    )
    result.positions = kept
    result.work += work
    return result


def slow_gemfilter(kept, layer, kernel=5):
    def slow(llama, ids):
        found = []

        def select(seen):
            if seen.layer == layer:
                scores = slow_methods.gemfilter_scores(seen, kernel)
                best = llama.best(scores, tokens(kept, len(ids)), 0, seen)
                found.extend(range(len(ids)) if best is None else best)

        first = llama.run(ids, 1, select=select, last_layer=layer)
        return second_pass(llama, ids, found, contiguous=True, work=first.work)

    return slow


def slow_asl(kept, *, first, last_n, tau, window=8, passes=1, full_before=False):
    def slow(llama, ids):
        layer, history = slow_methods.asl_layer(
            llama, ids, keep=kept, window=window, first=first, last_n=last_n, tau=tau
        )
        if passes == 2:
            at = LAYERS - 1 if layer is None else layer
            order = sorted(range(len(ids) - window), key=lambda j: -float(history[at][j]))
            chosen = sorted(order[: kept - window]) + list(range(len(ids) - window, len(ids)))
            work = (at + 1) * len(ids)
            return second_pass(llama, ids, chosen, contiguous=True, work=work)
        whole = 1 + (-1 if layer is None else layer) if full_before else 0
        whole = LAYERS if full_before and layer is None else whole
        stages = {} if layer is None else {layer: kept}
        compress, select = by_layer_scores(
            llama,
            stages=stages,
            capacity=lambda seen: kept,
            window=window,
            first_full=whole,
        )
        return llama.run(ids, STEPS, compress=compress, select=select)

    return slow


def slow_speculative(kept, *, look_ahead, chunk=None, kernel=13, rate=None, draft=None):
    """The draft is the model itself, if there is no other."""

    def slow(llama, ids):
        reader = llama if draft is None else Llama(draft)
        ranking, answer = slow_methods.answer_attention(reader, ids, look_ahead, kernel)
        if chunk is None:
            order = sorted(range(len(ids)), key=lambda j: -float(ranking[j]))
            chosen = sorted(order[: kept if isinstance(kept, int) else ceil(kept * len(ids))])
        else:
            chosen = slow_methods.chunks_of(ranking, chunk, rate)
        return second_pass(llama, ids, chosen, contiguous=False, work=answer.work)

    return slow


def slow_promptdistill(kept, layer, kernel=5):
    def slow(llama, ids):
        stages = stages_of(layer, kept, len(ids))

        def select(seen):
            if seen.layer in stages:
                scores = slow_methods.promptdistill_scores(seen, kernel)
                return llama.best(scores, stages[seen.layer], 1, seen)

        return llama.run(ids, STEPS, select=select)

    return slow


def slow_uniprefill(layers, **settings):
    def slow(llama, ids):
        def select(seen):
            return (
                slow_methods.uniprefill_tokens(seen, **settings) if seen.layer in layers else None
            )

        return llama.run(ids, STEPS, select=select)

    return slow


def slow_selective(kept, window, draft=None):
    def slow(llama, ids):
        reader = llama if draft is None else Llama(draft)
        information = slow_methods.self_information(reader, ids)
        rest = sorted(range(1, len(ids) - window), key=lambda j: -float(information[j]))
        certain = [0, *range(len(ids) - window, len(ids))]
        chosen = sorted(certain + rest[: tokens(kept, len(ids)) - len(certain)])
        work = reader.layers * len(ids)
        return second_pass(llama, ids, chosen, contiguous=True, work=work)

    return slow


SMALL = {"layer": 2, "window": 8}
DRAFT = build("llama", num_hidden_layers=2)
CASES = {
    "full": (FullKV(), slow_full),
    "snapkv": (SnapKV(keep=30, window=8), slow_layered((), 30, layer=(), kernel=5)),
    "snapkv, rate, max": (
        SnapKV(keep=0.3, window=12, kernel_size=7, pool_mode="max"),
        slow_layered((), 0.3, layer=(), window=12, pool_mode="max"),
    ),
    "fastkv": (FastKV(keep=30, **SMALL), slow_layered(30)),
    "fastkv, constant": (FastKV(keep=40, keep_kv=24, **SMALL), slow_layered(40, 24)),
    "fastkv, rates, max": (
        FastKV(keep=0.4, keep_kv=0.2, pool_mode="max", **SMALL),
        slow_layered(0.4, 0.2, pool_mode="max"),
    ),
    "fastkv, rates of the layer": (
        FastKV(keep=0.5, keep_kv=0.21, rates_of="layer", **SMALL),
        slow_layered(
            0.5, lambda length, seen: tokens(0.21 if seen.layer <= 2 else 0.42, seen.length)
        ),
    ),
    "fastkv, staged": (
        FastKV(keep=(60, 40, 24), layer=(0, 1, 3)),
        slow_layered((60, 40, 24), layer=(0, 1, 3)),
    ),
    "fastkv, sinks": (FastKV(keep=30, num_sinks=5, **SMALL), slow_layered(30, num_sinks=5)),
    "fastkv-deferral": (
        FastKVDeferral(keep=30, first_full=2, **SMALL),
        slow_layered(30, first_full=2),
    ),
    "claa": (
        CLAA(keep=40, keep_kv=24, last_n=2, first_full=1, **SMALL),
        slow_layered(40, 24, first_full=1, rank=joint_max(2)),
    ),
    "claa, z-scored": (
        CLAA(keep=30, zscore=True, last_n=3, first_full=1, **SMALL),
        slow_layered(30, first_full=1, rank=zscored_max(3)),
    ),
    "claa, ranking script": (
        CLAA(keep=30, zscore=True, over_heads="sum", last_n=3, first_full=1, **SMALL),
        slow_layered(30, first_full=1, rank=zscored_max(3, summed=True)),
    ),
    "claa, mean": (
        CLAA(keep=30, over_heads="sum", over_layers="mean", last_n=2, first_full=0, **SMALL),
        slow_layered(30, rank=joint_mean(2)),
    ),
    "claa, staged": (
        CLAA(keep=(60, 30), layer=(2, 4), last_n=3, first_full=2),
        slow_layered((60, 30), layer=(2, 4), first_full=2, rank=joint_max(3)),
    ),
    "claa, equal bytes": (  # 6 layers of 30: the first holds all, five share the rest
        CLAA(keep=30, last_n=2, first_full=1, equal_cache=True, **SMALL),
        slow_layered(30, lambda n, seen: (6 * 30 - n) // 5, first_full=1, rank=joint_max(2)),
    ),
    "random": (Random(keep=30, seed=5, **SMALL), slow_random(30, 30, 5)),
    "random, staged": (
        Random(keep=(60, 30), keep_kv=24, layer=(1, 3), seed=5),
        slow_random((60, 30), 24, 5, layer=(1, 3)),
    ),
    "sinks-random": (SinksRandom(keep=30, seed=6, **SMALL), slow_random(30, 30, 6, num_sinks=4)),
    "oracle": (
        Oracle(keep=40, keep_kv=24, max_new_tokens=5, **SMALL),
        slow_oracle(40, 24, 5),
    ),
    "oracle, staged": (
        Oracle(keep=(60, 30), layer=(1, 3), max_new_tokens=5),
        slow_oracle((60, 30), 30, 5, layer=(1, 3)),
    ),
    "peak": (Peak(keep=30, kernel_size=9, num_sinks=0, **SMALL), slow_peak(30, 30, 9)),
    "peak, staged, sinks": (
        Peak(keep=(60, 30), keep_kv=24, layer=(1, 3), kernel_size=9, window=8),
        slow_peak((60, 30), 24, 9, layer=(1, 3), num_sinks=4),
    ),
    "streaming": (StreamingLLM(keep=30, num_sinks=3), slow_streaming(30, 3)),
    "pyramidkv": (PyramidKV(keep=30, window=8, beta=10), slow_pyramidkv(30, 10, 8)),
    "pyramidkv, clipped": (PyramidKV(keep=60, window=8), slow_pyramidkv(60, 20, 8)),
    "pyramidinfer": (
        PyramidInfer(rho=0.3, recent=0.2, least=10),
        slow_pyramidinfer(rho=0.3, recent=0.2, weight=1.2, num_sinks=4, least=10),
    ),
    "lazyllm": (
        LazyLLM(keep=20),
        slow_layered((60, 40, 20), 1.0, layer=(0, 2, 3), window=1, kernel=1),
    ),
    "lazyllm, rate": (
        LazyLLM(keep=0.37),
        slow_layered((1.0, 0.74, 0.37), 1.0, layer=(0, 2, 3), window=1, kernel=1),
    ),
    "lazyllm, given layers": (
        LazyLLM(keep=0.3, layer=(1, 3)),
        slow_layered((0.6, 0.3), 1.0, layer=(1, 3), window=1, kernel=1),
    ),
    "lazyllm, given stages, caches cut": (
        LazyLLM(keep=(0.7, 0.4), layer=(1, 4), keep_kv=0.3),
        slow_layered((0.7, 0.4), 0.3, layer=(1, 4), window=1, kernel=1),
    ),
    "promptdistill": (PromptDistill(keep=30), slow_promptdistill(30, 2)),
    "promptdistill, staged rates": (
        PromptDistill(keep=(0.63, 0.31), layer=(1, 3), kernel_size=3),
        slow_promptdistill((0.63, 0.31), (1, 3), kernel=3),
    ),
    "uniprefill": (
        UniPrefill(top_p=0.7, block=8, num_sinks=8, window=12),
        slow_uniprefill(range(5), top_p=0.7, block=8, num_sinks=8, window=12),
    ),
    "uniprefill, odd blocks": (
        UniPrefill(top_p=0.5, layer=(1, 3), block=7, num_sinks=3, window=16),
        slow_uniprefill((1, 3), top_p=0.5, block=7, num_sinks=3, window=16),
    ),
    "uniprefill, the short row whole": (
        UniPrefill(top_p=0.2, layer=2, block=4, num_sinks=40, window=40),
        slow_uniprefill((2,), top_p=0.2, block=4, num_sinks=40, window=40),
    ),
    "selective-context": (SelectiveContext(keep=30, window=8), slow_selective(30, 8)),
    "selective-context, rate": (SelectiveContext(keep=0.4, window=11), slow_selective(0.4, 11)),
    "selective-context, draft": (
        SelectiveContext(keep=0.4, window=8, draft=DRAFT),
        slow_selective(0.4, 8, draft=DRAFT),
    ),
    "gemfilter": (GemFilter(keep=30, layer=3), slow_gemfilter(30, 3)),
    "fastkv, staged rates": (
        FastKV(keep=(0.63, 0.47, 0.2), layer=(0, 1, 3), window=8),
        slow_layered((0.63, 0.47, 0.2), layer=(0, 1, 3)),
    ),
    "claa, rates": (
        CLAA(keep=0.37, keep_kv=0.23, last_n=2, first_full=1, **SMALL),
        slow_layered(0.37, 0.23, first_full=1, rank=joint_max(2)),
    ),
    "claa, rates, equal bytes": (
        CLAA(keep=0.4, last_n=2, first_full=1, equal_cache=True, **SMALL),
        slow_layered(
            0.4,
            lambda n, seen: (6 * tokens(0.4, n) - n) // 5,
            first_full=1,
            rank=joint_max(2),
        ),
    ),
    "claa, z-scored, rates": (
        CLAA(keep=0.37, zscore=True, last_n=3, first_full=1, **SMALL),
        slow_layered(0.37, first_full=1, rank=zscored_max(3)),
    ),
    "random, staged rates": (
        Random(keep=(0.6, 0.3), keep_kv=0.2, layer=(1, 3), seed=5),
        slow_random((0.6, 0.3), 0.2, 5, layer=(1, 3)),
    ),
    "oracle, staged rates": (
        Oracle(keep=(0.6, 0.3), layer=(1, 3), max_new_tokens=5),
        slow_oracle((0.6, 0.3), 0.3, 5, layer=(1, 3)),
    ),
    "peak, staged rates, sinks": (
        Peak(keep=(0.6, 0.3), keep_kv=0.25, layer=(1, 3), kernel_size=9, window=8),
        slow_peak((0.6, 0.3), 0.25, 9, layer=(1, 3), num_sinks=4),
    ),
    "streaming, rate": (StreamingLLM(keep=0.31, num_sinks=3), slow_streaming(0.31, 3)),
    "pyramidkv, rate": (PyramidKV(keep=0.35, window=8), slow_pyramidkv(0.35, 20, 8)),
    "pyramidkv, high rate": (PyramidKV(keep=0.7, window=8), slow_pyramidkv(0.7, 20, 8)),
    "gemfilter, rate": (GemFilter(keep=0.31, layer=3), slow_gemfilter(0.31, 3)),
    "speculative, rate": (
        SpeculativePrefill(keep=0.31, look_ahead=4, chunk=None),
        slow_speculative(0.31, look_ahead=4),
    ),
    "fastkv, padding stays": (FastKV(keep=80, **SMALL), slow_layered(80)),
    "gemfilter, padding stays": (GemFilter(keep=80, layer=3), slow_gemfilter(80, 3)),
    "speculative, padding stays": (
        SpeculativePrefill(keep=80, look_ahead=4, chunk=None),
        slow_speculative(80, look_ahead=4),
    ),
    "speculative": (
        SpeculativePrefill(keep=30, look_ahead=4, chunk=None),
        slow_speculative(30, look_ahead=4),
    ),
    "speculative, draft": (
        SpeculativePrefill(keep=30, look_ahead=4, chunk=None, draft=DRAFT),
        slow_speculative(30, look_ahead=4, draft=DRAFT),
    ),
    "speculative, forked": (
        SpeculativePrefill(keep=25, look_ahead=2, chunk=None, kernel_size=7),
        slow_speculative(25, look_ahead=2, kernel=7),
    ),
}  # fmt: skip
ONE_PROMPT = {
    "asl": (
        ASL(keep=30, layer=2, last_n=3, tau=0.99, window=8),
        slow_asl(30, first=2, last_n=3, tau=0.99),
    ),
    "asl, never": (
        ASL(keep=30, layer=2, last_n=3, tau=0.01, window=8),
        slow_asl(30, first=2, last_n=3, tau=0.01),
    ),
    "asl, full before": (
        ASL(keep=30, layer=2, last_n=3, tau=0.99, full_before=True, window=8),
        slow_asl(30, first=2, last_n=3, tau=0.99, full_before=True),
    ),
    "asl, two passes": (
        ASL(keep=30, layer=2, last_n=3, tau=0.99, passes=2, window=8),
        slow_asl(30, first=2, last_n=3, tau=0.99, passes=2),
    ),
    "asl, two passes, never": (
        ASL(keep=30, layer=2, last_n=3, tau=0.01, passes=2, window=8),
        slow_asl(30, first=2, last_n=3, tau=0.01, passes=2),
    ),
    "asl, fixed layer": (ASL(keep=30, layer=2, tau=None, window=8), slow_layered(30)),
    "speculative, chunks": (
        SpeculativePrefill(keep=0.3, look_ahead=4, chunk=8),
        slow_speculative(0, look_ahead=4, chunk=8, rate=0.3),
    ),
}


def assert_is(slow, model, prefilled, row, padding, logits, new):
    kept = list(range(padding, LENGTH))
    if prefilled.positions is not None:
        kept = [j for j in prefilled.positions[row].tolist() if j >= padding]
    assert [j - padding for j in kept] == slow.positions
    expected = torch.stack(slow.logits)
    error = (logits[row].double().cpu() - expected).abs().max()
    assert error <= 1e-4 * expected.abs().max()
    assert new[row].tolist() == slow.tokens


@pytest.mark.parametrize("case", [*CASES, *ONE_PROMPT])
def test_a_prompt_alone_is_the_slow_version(model, llama, case):
    method, slow = {**CASES, **ONE_PROMPT}[case]
    ids = prompt(LENGTH)[0].to(model.device)
    prefilled = prefill(model, ids, method)
    expected = slow(llama, ids[0].tolist())
    layer_tokens = expected.work - (STEPS - 1) * LAYERS  # without decoding
    assert prefilled.work_share == pytest.approx(layer_tokens / (LENGTH * LAYERS))
    assert_is(expected, model, prefilled, 0, 0, *decoded(model, prefilled))


@pytest.mark.parametrize("case", CASES)
def test_a_padded_batch_is_the_slow_version_of_each_row(model, llama, case):
    method, slow = CASES[case]
    ids, mask = (x.to(model.device) for x in prompt(LENGTH, SHORT))
    prefilled = prefill(model, ids, method, mask)
    logits, new = decoded(model, prefilled)
    for row, padding in enumerate((0, LENGTH - SHORT)):
        expected = slow(llama, ids[row, padding:].tolist())
        assert_is(expected, model, prefilled, row, padding, logits, new)


@pytest.mark.parametrize("case", ONE_PROMPT)
def test_one_padded_prompt_is_the_slow_version(model, llama, case):
    method, slow = ONE_PROMPT[case]
    ids, mask = (x.to(model.device) for x in prompt(LENGTH, SHORT))
    prefilled = prefill(model, ids[1:], method, mask[1:])
    logits, new = decoded(model, prefilled)
    padding = LENGTH - SHORT
    expected = slow(llama, ids[1, padding:].tolist())
    assert_is(expected, model, prefilled, 0, padding, logits, new)


def test_every_method_is_compared_with_a_slow_version():
    tested = {type(method) for method, _ in {**CASES, **ONE_PROMPT}.values()}
    assert tested == set(METHODS.values())


def test_the_adaptive_layer_is_found_in_some_cases_and_not_in_others(model):
    ids = prompt(LENGTH)[0].to(model.device)
    cases = [method for case, (method, _) in ONE_PROMPT.items() if case.startswith("asl")]
    selected = [prefill(model, ids, method).state.notes.get("selected") for method in cases]
    assert all(layer > 2 for layer in (selected[0], selected[2], selected[3]))
    assert selected[1] is None and selected[4] is None and selected[5] == 2
