"""Each method through `run` and `decode`, against a slow version of itself; batches and misuse."""

import dataclasses

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
    Oracle,
    Peak,
    PyramidInfer,
    PyramidKV,
    Random,
    SinksRandom,
    SnapKV,
    SpeculativePrefill,
    StreamingLLM,
    make_method,
)
from claa_ops.methods.speculative import require_same_tokenizer
from claa_ops.prefill import ClaaCache, attach, begin, decode, generate, run
from claa_ops.prefill.answer import answer_attention

from . import slow_methods
from .slow_methods import Llama, by_layer_scores, tokens
from .tiny_models import build, prompt

LENGTH, LAYERS, STEPS = 90, 6, 4
SHORT = 67  # the other row of a batch


@pytest.fixture(scope="module")
def model():
    return attach(build("llama", num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def llama(model):
    return Llama(model)


@pytest.fixture(scope="module")
def draft():
    return build("llama", num_hidden_layers=2, hidden_size=16, num_attention_heads=2)


# The slow version of a method: (llama, ids, padding) -> Result.


def slow_full(llama, ids, padding):
    return llama.run(ids, STEPS)


def slow_layered(kept, cached=None, *, layer=2, window=8, **settings):
    """FastKV's relatives, budgets in tokens; `cached` may be a function of what a layer sees."""
    stages = dict(zip(layer, kept, strict=True)) if isinstance(layer, tuple) else {layer: kept}
    cached = list(stages.values())[-1] if cached is None else cached
    capacity = cached if callable(cached) else lambda seen: cached

    def slow(llama, ids, padding):
        compress, select = by_layer_scores(
            llama, len(ids) + padding, stages=stages, capacity=capacity, window=window, **settings
        )
        return llama.run(ids, STEPS, compress=compress, select=select, padding=padding)

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


def slow_random(kept, seed, sink=0, layer=2, window=8):
    def slow(llama, ids, padding):
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(len(ids) + padding - window, generator=generator).flip(0).double()

        def best(seen):
            scores = draw[padding:][torch.tensor(seen.kept)[:-window]]
            return llama.best(scores, kept, window, seen, sink)

        def compress(seen):
            index = best(seen)
            return None if index is None else [index] * seen.key.shape[0]

        def select(seen):
            return best(seen) if seen.layer == layer else None

        return llama.run(ids, STEPS, compress=compress, select=select, padding=padding)

    return slow


def slow_oracle(kept, cached, answer_tokens, kernel=13, layer=2, window=8):
    def slow(llama, ids, padding):
        ranking, answer = slow_methods.answer_attention(llama, ids, answer_tokens)
        ranking = slow_methods.pool(ranking, kernel)

        def best(seen, count):
            scores = ranking[torch.tensor(seen.kept)][:-window]
            return llama.best(scores, count, window, seen)

        def compress(seen):
            index = best(seen, cached)
            return None if index is None else [index] * seen.key.shape[0]

        def select(seen):
            return best(seen, kept) if seen.layer == layer else None

        result = llama.run(ids, STEPS, compress=compress, select=select, padding=padding)
        result.work += answer.work
        return result

    return slow


def slow_peak(kept, kernel, layer=2, window=8):
    def slow(llama, ids, padding):
        peaks = []

        def compress(seen):
            key = seen.key.repeat_interleave(seen.query.shape[0] // seen.key.shape[0], dim=0)
            logits = seen.query[:, -window:] @ key.transpose(1, 2) / key.shape[-1] ** 0.5
            peaks.append(logits.softmax(-1).amax((0, 1)))
            heads = [llama.best(row, kept, window, seen) for row in seen.scores(window, kernel)]
            return None if heads[0] is None else heads

        def select(seen):
            if seen.layer == layer:
                scores = torch.stack(peaks).amax(0)[:-window]
                return llama.best(slow_methods.pool(scores, kernel), kept, window, seen)

        return llama.run(ids, STEPS, compress=compress, select=select, padding=padding)

    return slow


def slow_streaming(kept, sink):
    def compress(seen):
        if kept >= seen.length:
            return None
        index = list(range(sink)) + list(range(seen.length - kept + sink, seen.length))
        return [index] * seen.key.shape[0]

    return lambda llama, ids, padding: llama.run(ids, STEPS, compress=compress)


def slow_pyramidkv(average, beta, window):
    def slow(llama, ids, padding):
        length = len(ids) + padding
        last = (average - window) / beta
        first = min(2 * (average - window) - last, length - window)
        last = 2 * (average - window) - first

        def capacity(seen):
            return window + round(first + (last - first) * seen.layer / (LAYERS - 1))

        compress, _ = by_layer_scores(
            llama, length, stages={}, capacity=capacity, window=window, kernel=5
        )
        return llama.run(ids, STEPS, compress=compress, padding=padding)

    return slow


def slow_pyramidinfer(**settings):
    def slow(llama, ids, padding):
        select = slow_methods.pyramidinfer(llama, len(ids) + padding, **settings)
        return llama.run(ids, STEPS, select=select, padding=padding)

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
    def slow(llama, ids, padding):
        found = []

        def select(seen):
            if seen.layer == layer:
                scores = slow_methods.gemfilter_scores(seen, kernel)
                found.extend(llama.best(scores, kept, 0, seen))

        first = llama.run(ids, 1, select=select, padding=padding, last_layer=layer)
        return second_pass(llama, ids, found, contiguous=True, work=first.work)

    return slow


def slow_asl(kept, *, first, last_n, tau, window=8, passes=1, full_before=False):
    def slow(llama, ids, padding):
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
            len(ids),
            stages=stages,
            capacity=lambda seen: kept,
            window=window,
            first_full=whole,
        )
        return llama.run(ids, STEPS, compress=compress, select=select)

    return slow


def slow_speculative(kept, *, look_ahead, chunk=None, kernel=13, rate=None):
    """The draft is the model itself."""

    def slow(llama, ids, padding):
        ranking, answer = slow_methods.answer_attention(llama, ids, look_ahead, kernel)
        if chunk is None:
            order = sorted(range(len(ids)), key=lambda j: -float(ranking[j]))
            chosen = sorted(order[:kept])
        else:
            chosen = slow_methods.chunks_of(ranking, chunk, rate)
        return second_pass(llama, ids, chosen, contiguous=False, work=answer.work)

    return slow


SMALL = {"layer": 2, "window": 8}
CASES = {
    "full": (FullKV(), slow_full),
    "snapkv": (SnapKV(keep=30, window=8), slow_layered((), 30, layer=(), kernel=5)),
    "snapkv, rate, max": (
        SnapKV(keep=0.3, window=12, kernel_size=7, pooling="max"),
        slow_layered((), tokens(0.3, LENGTH), layer=(), window=12, mode="max"),
    ),
    "fastkv": (FastKV(keep=30, **SMALL), slow_layered(30)),
    "fastkv, constant": (FastKV(keep=40, keep_kv=24, **SMALL), slow_layered(40, 24)),
    "fastkv, rates, max": (
        FastKV(keep=0.4, keep_kv=0.2, pooling="max", **SMALL),
        slow_layered(tokens(0.4, LENGTH), tokens(0.2, LENGTH), mode="max"),
    ),
    "fastkv, rates of the layer": (
        FastKV(keep=0.5, keep_kv=0.21, rates_of="layer", **SMALL),
        slow_layered(
            45, lambda seen: tokens(0.21 if seen.layer <= 2 else 0.42, seen.padded)
        ),
    ),
    "fastkv, staged": (
        FastKV(keep=(60, 40, 24), layer=(0, 1, 3)),
        slow_layered((60, 40, 24), layer=(0, 1, 3)),
    ),
    "fastkv, sinks": (FastKV(keep=30, sink=5, **SMALL), slow_layered(30, sink=5)),
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
    "random": (Random(keep=30, seed=5, **SMALL), slow_random(30, 5)),
    "sinks-random": (SinksRandom(keep=30, seed=6, **SMALL), slow_random(30, 6, sink=4)),
    "oracle": (
        Oracle(keep=40, keep_kv=24, max_new_tokens=5, **SMALL),
        slow_oracle(40, 24, 5),
    ),
    "peak": (Peak(keep=30, kernel_size=9, sink=0, **SMALL), slow_peak(30, 9)),
    "streaming": (StreamingLLM(keep=30, sink=3), slow_streaming(30, 3)),
    "pyramidkv": (PyramidKV(keep=30, window=8, beta=10), slow_pyramidkv(30, 10, 8)),
    "pyramidkv, clipped": (PyramidKV(keep=60, window=8), slow_pyramidkv(60, 20, 8)),
    "pyramidinfer": (
        PyramidInfer(rho=0.3, recent=0.2, least=10),
        slow_pyramidinfer(rho=0.3, recent=0.2, weight=1.2, sink=4, least=10),
    ),
    "gemfilter": (GemFilter(keep=30, layer=3), slow_gemfilter(30, 3)),
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


def decoded(model, prefilled):
    """Logits [B, STEPS, V] of greedy decoding, and its tokens."""
    logits, feed = [prefilled.logits], prefilled.logits.argmax(-1, keepdim=True)
    new, position, mask = [feed], prefilled.next_position[:, None], prefilled.attention_mask
    with torch.no_grad():
        for _ in range(STEPS - 1):
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            logits.append(
                model(
                    feed,
                    attention_mask=mask,
                    position_ids=position,
                    past_key_values=prefilled.cache,
                ).logits[:, -1]
            )
            feed, position = logits[-1].argmax(-1, keepdim=True), position + 1
            new.append(feed)
    return torch.stack(logits, dim=1), torch.cat(new, dim=1)


def assert_is(slow, model, prefilled, row, padding, logits, new):
    kept = list(range(padding, LENGTH))
    if prefilled.positions is not None:
        kept = [j for j in prefilled.positions[row].tolist() if j >= padding]
    assert [j - padding for j in kept] == slow.positions
    expected = torch.stack(slow.logits)
    error = (logits[row].double() - expected).abs().max()
    assert error <= 1e-4 * expected.abs().max()
    assert new[row].tolist() == slow.tokens


@pytest.mark.parametrize("case", [*CASES, *ONE_PROMPT])
def test_a_prompt_alone_is_the_slow_version(model, llama, case):
    method, slow = {**CASES, **ONE_PROMPT}[case]
    ids, _ = prompt(LENGTH)
    prefilled = run(model, ids, method)
    expected = slow(llama, ids[0].tolist(), 0)
    layer_tokens = expected.work - (STEPS - 1) * LAYERS  # without decoding
    assert prefilled.work == pytest.approx(layer_tokens / (LENGTH * LAYERS))
    assert_is(expected, model, prefilled, 0, 0, *decoded(model, prefilled))


@pytest.mark.parametrize("case", CASES)
def test_a_padded_batch_is_the_slow_version_of_each_row(model, llama, case):
    method, slow = CASES[case]
    ids, mask = prompt(LENGTH, SHORT)
    prefilled = run(model, ids, method, mask)
    logits, new = decoded(model, prefilled)
    for row, padding in enumerate((0, LENGTH - SHORT)):
        expected = slow(llama, ids[row, padding:].tolist(), padding)
        assert_is(expected, model, prefilled, row, padding, logits, new)


@pytest.mark.parametrize("case", ONE_PROMPT)
def test_one_padded_prompt_is_the_slow_version(model, llama, case):
    method, slow = ONE_PROMPT[case]
    ids, mask = prompt(LENGTH, SHORT)
    prefilled = run(model, ids[1:], method, mask[1:])
    logits, new = decoded(model, prefilled)
    padding = LENGTH - SHORT
    expected = slow(llama, ids[1, padding:].tolist(), padding)
    assert_is(expected, model, prefilled, 0, padding, logits, new)


def test_every_method_is_compared_with_a_slow_version():
    tested = {type(method) for method, _ in {**CASES, **ONE_PROMPT}.values()}
    assert tested == set(METHODS.values())


def test_the_adaptive_layer_is_found_in_some_cases_and_not_in_others(model):
    ids, _ = prompt(LENGTH)
    cases = [method for case, (method, _) in ONE_PROMPT.items() if case.startswith("asl")]
    selected = [run(model, ids, method).state.notes.get("selected") for method in cases]
    assert all(layer > 2 for layer in (selected[0], selected[2], selected[3]))
    assert selected[1] is None and selected[4] is None and selected[5] == 2


# Everything kept, and short prompts.

EVERYTHING = [
    make_method(name, num_layers=LAYERS, keep=1.0, **settings)
    for name, settings in {
        **dict.fromkeys(METHODS, {}),
        "pyramidinfer": {"rho": 1.0},
        "asl": {"window": 8},
    }.items()
]


@pytest.mark.parametrize("method", EVERYTHING, ids=lambda method: type(method).__name__)
def test_keeping_everything_is_the_plain_model(model, method):
    ids, mask = prompt(LENGTH, SHORT)
    if isinstance(method, SpeculativePrefill):
        method = dataclasses.replace(method, chunk=None)
    plain = decoded(model, run(model, ids, FullKV(), mask))[0]
    prefilled = run(model, ids, method, mask)
    assert prefilled.positions is None and prefilled.cache.lengths == [LENGTH] * LAYERS
    assert torch.equal(decoded(model, prefilled)[0], plain)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("length", [1, 5])
def test_a_prompt_no_longer_than_the_window_is_served(model, name, length):
    method = make_method(name, num_layers=LAYERS, keep=0.1)
    ids, _ = prompt(length)
    prefilled = run(model, ids, method)
    assert prefilled.logits.isfinite().all()
    if name not in ("gemfilter", "speculative", "streaming"):  # these force no window
        assert prefilled.cache.lengths == [length] * LAYERS


# generate().


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("gemfilter", "speculative")]
)
def test_generate_is_the_models_own_with_the_cache_where_one_pass_is_enough(model, name):
    method = make_method(name, num_layers=LAYERS, keep=30, **SETTINGS.get(name, {}))
    rows = (LENGTH,) if name == "asl" else (LENGTH, SHORT)
    ids, mask = prompt(*rows)
    ranking = None
    if method.needs_ranking:
        ranking = method.prepare(model, ids, mask).ranking
        with pytest.raises(
            ValueError, match="Oracle needs a ranking of the prompt, which claa_ops"
        ):
            model(ids, past_key_values=ClaaCache(model.config, method))
    cache = ClaaCache(model.config, method, ranking=ranking)
    expected = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False
    )
    new = generate(model, ids, method, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(new, expected[:, LENGTH:])


SETTINGS = {"asl": {"window": 8, "tau": 0.99}, "pyramidinfer": {"least": 10}}


def test_answers_end_row_by_row(model):
    ids, mask = prompt(LENGTH, SHORT)
    free = generate(model, ids, FullKV(), attention_mask=mask, max_new_tokens=8)
    end = int(free[1, 2])
    first = [row.tolist().index(end) if end in row else 8 for row in free]
    ended = decode(model, run(model, ids, FullKV(), mask), max_new_tokens=8, eos_token_id=[end, 97])
    assert ended.shape[1] == min(8, max(first) + 1) and first[1] == 2
    assert ended[1].tolist() == free[1, :3].tolist() + [end] * (ended.shape[1] - 3)
    assert torch.equal(ended[0], free[0, : ended.shape[1]])
    alone = generate(model, ids[1:, LENGTH - SHORT :], FullKV(), max_new_tokens=8, eos_token_id=end)
    assert alone[0].tolist() == free[1, :3].tolist()
    with pytest.raises(ValueError, match="decode: max_new_tokens must be at least 1, got 0"):
        generate(model, ids, FullKV(), max_new_tokens=0)


# Two passes and drafts.

TWO_PASS = [
    GemFilter(keep=30, layer=1),
    ASL(keep=30, passes=2, layer=1, last_n=2, tau=0.99, window=8),
    SpeculativePrefill(keep=0.3),
]


@pytest.mark.parametrize("method", TWO_PASS, ids=lambda method: type(method).__name__)
def test_a_cache_refuses_a_method_of_two_passes(model, method):
    message = rf"got {type(method).__name__}, which prefills twice: call claa_ops.prefill.generate"
    with pytest.raises(ValueError, match=message):
        ClaaCache(model.config, method)


def test_the_first_pass_runs_no_layer_behind_the_filter_and_keeps_no_cache(model):
    ids, mask = prompt(LENGTH, SHORT)
    method, calls, held, blocks = GemFilter(keep=30, layer=3), [], [], list(model.model.layers)

    def note(module, args, kwargs, output):
        cache = kwargs["past_key_values"]
        calls.append((blocks.index(module), output.shape[1]))
        held.append(cache.nbytes())

    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        prefilled = run(model, ids, method, mask)
    finally:
        for hook in hooks:
            hook.remove()
    first = [(layer, LENGTH) for layer in range(4)]
    assert calls == first + [(layer, 30) for layer in range(LAYERS)]
    assert held[:4] == [0] * 4
    assert prefilled.work == pytest.approx((4 * LENGTH + LAYERS * 30) / (LAYERS * LENGTH))
    # A pass that was ended leaves nothing behind.
    plain = build("llama", num_hidden_layers=LAYERS)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_gemfilter_is_a_prompt_of_the_chosen_ids(family):
    model = attach(build(family))
    ids, _ = prompt(LENGTH)
    prefilled = run(model, ids, GemFilter(keep=30, layer=1))
    chosen = ids.gather(1, prefilled.positions)
    expected = model.generate(chosen, max_new_tokens=6, do_sample=False)[:, 30:]
    assert torch.equal(decode(model, prefilled, max_new_tokens=6), expected)


def test_a_smaller_model_is_the_draft(model, llama, draft):
    method = SpeculativePrefill(keep=0.25, draft=draft, look_ahead=3, chunk=16)
    ids, _ = prompt(LENGTH)
    ranking, answer = slow_methods.answer_attention(Llama(draft), ids[0].tolist(), 3, 13)
    chosen = slow_methods.chunks_of(ranking, 16, 0.25)
    prefilled = run(model, ids, method)
    assert prefilled.positions[0].tolist() == chosen
    torch.testing.assert_close(prefilled.state.ranking[0].double(), ranking, atol=1e-5, rtol=1e-4)
    sizes = [
        sum(weight.numel() for weight in net.model.layers[0].parameters() if weight.dim() > 1)
        for net in (draft, model)
    ]
    work = answer.work * sizes[0] / sizes[1] + len(chosen) * LAYERS
    assert prefilled.work == pytest.approx(work / (LENGTH * LAYERS))
    assert prefilled.next_position.tolist() == [LENGTH]


def test_a_draft_of_another_vocabulary_is_refused(model):
    draft = build("llama", vocab_size=120)
    message = "draft must have the tokenizer of the model, whose vocabulary has 99 .*got one of 120"
    with pytest.raises(ValueError, match=message):
        run(model, prompt(LENGTH)[0], SpeculativePrefill(draft=draft))


def test_a_draft_with_a_vocabulary_that_is_padded_otherwise_can_be_vouched_for(model):
    ids, _ = prompt(LENGTH)
    draft = build("llama", vocab_size=120)
    method = SpeculativePrefill(keep=0.5, draft=draft, shared_tokenizer=True, chunk=10)
    assert run(model, ids, method).positions.shape[1] in (45, 50)


def test_tokenizers_are_compared_where_both_are_at_hand():
    class Tokenizer:
        def __init__(self, *tokens):
            self.get_vocab = lambda: {token: i for i, token in enumerate(tokens)}

    require_same_tokenizer(Tokenizer("a", "b"), Tokenizer("a", "b"))
    message = "draft must have the tokenizer of the model, got one in which 2 of 3 entries differ"
    with pytest.raises(ValueError, match=message):
        require_same_tokenizer(Tokenizer("a", "b", "c"), Tokenizer("a", "c", "b"))


def test_a_second_pass_in_original_positions_needs_full_attention():
    model = build("mistral", sliding_window=8)
    message = "a second pass in original positions needs a model without sliding windows"
    with pytest.raises(ValueError, match=message):
        run(model, prompt(40)[0], SpeculativePrefill(keep=20, draft=build("llama")))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ONE_PROMPT["asl"][0], "ASL: a batch must be one prompt, which has its own sel.*got 2"),
        (SpeculativePrefill(), "SpeculativePrefill: a batch must be one prompt unless chunk is No"),
        (GemFilter(layer=LAYERS), r"GemFilter: layer must be in \[0, 5\], got 6"),
        (
            CLAA(layer=5),
            r"CLAA: layer must be in \[0, 4\], before the last of the model's 6 layers",
        ),
    ],
)
def test_what_a_method_does_not_serve_is_said(model, method, message):
    ids, mask = prompt(LENGTH, SHORT)
    with pytest.raises(ValueError, match=message):
        run(model, ids, method, mask)


def test_other_masks_are_refused(model):
    ids, mask = prompt(LENGTH, SHORT)
    with pytest.raises(ValueError, match="prompts must be padded on the left"):
        run(model, ids, FullKV(), mask.flip(1))


# Equal caches.


@pytest.mark.parametrize("keep", [0.5, 70, (0.9, 0.5)])
@pytest.mark.parametrize("name", ["claa", "fastkv", "fastkv-deferral", "random", "oracle"])
def test_equal_caches_hold_the_same_bytes(model, name, keep):
    layer = (1, 3) if isinstance(keep, tuple) else 3
    method = make_method(name, num_layers=LAYERS, keep=keep, layer=layer, equal_cache=True)
    method = dataclasses.replace(method, first_full=1 if "claa" in name else 0)
    ids, _ = prompt(LENGTH)
    prefilled = run(model, ids, method)
    allowed = 45 * LAYERS if keep != 70 else 70 * LAYERS
    assert allowed - LAYERS < sum(prefilled.cache.lengths) <= allowed
    if name == "claa":
        assert prefilled.cache.lengths[0] == LENGTH
        whole = run(model, ids, dataclasses.replace(method, equal_cache=False))
        assert sum(whole.cache.lengths) > allowed
        assert torch.equal(whole.logits, prefilled.logits)


def test_equal_caches_that_are_impossible_are_refused(model):
    method = CLAA(keep=0.5, layer=2, first_full=4, equal_cache=True)
    message = (
        "CLAA: equal_cache must leave each layer its window of 8: 45 of 90 tokens in 6 layers are "
        "270 entries, and the first 4 layers alone hold 315"
    )
    with pytest.raises(ValueError, match=message):
        run(model, prompt(LENGTH)[0], method)


# The answer's attention.


def test_the_answers_attention_is_the_slow_one_with_and_without_padding(model, llama):
    ids, mask = prompt(LENGTH, SHORT)
    answer, ranking = answer_attention(model, ids, 7, attention_mask=mask)
    pooled = answer_attention(model, ids, 7, attention_mask=mask, pooled=True, kernel_size=5)[1]
    assert ranking.dtype == torch.float32 and ranking.shape == ids.shape
    for row, padding in enumerate((0, LENGTH - SHORT)):
        expected, result = slow_methods.answer_attention(llama, ids[row, padding:].tolist(), 7)
        assert answer[row].tolist() == result.tokens
        torch.testing.assert_close(ranking[row, padding:].double(), expected, atol=1e-5, rtol=1e-4)
        assert not ranking[row, :padding].any()
        expected = slow_methods.pool(expected, 5)
        torch.testing.assert_close(pooled[row, padding:].double(), expected, atol=1e-5, rtol=1e-4)


def test_only_queries_of_the_answer_vote(model, llama):
    ids, mask = prompt(LENGTH, SHORT)
    free, _ = answer_attention(model, ids, 7, attention_mask=mask)
    end = int(free[1, 2])
    _, ranking = answer_attention(model, ids, 7, end, attention_mask=mask)
    # Three tokens, the last of them the end: the prompt's last query, and those of two tokens.
    expected, _ = slow_methods.answer_attention(llama, ids[1, LENGTH - SHORT :].tolist(), 3)
    torch.testing.assert_close(
        ranking[1, LENGTH - SHORT :].double(), expected, atol=1e-5, rtol=1e-4
    )


def test_long_answers_are_reduced_in_parts(model, monkeypatch):
    ids, _ = prompt(LENGTH)
    whole = answer_attention(model, ids, 9)[1]
    monkeypatch.setattr("claa_ops.prefill.answer._ROWS", 4)
    torch.testing.assert_close(answer_attention(model, ids, 9)[1], whole)


def test_layers_with_windows_have_no_say_in_the_answers_attention():
    ids, _ = prompt(LENGTH)
    _, ranking = answer_attention(build("gemma3_text"), ids, 3)
    assert ranking.isfinite().all() and (ranking > 0).all()
    with pytest.raises(ValueError, match="a layer must attend to the whole prompt, got none"):
        answer_attention(build("mistral"), ids, 3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        answer_attention(build("llama"), ids, 0)


def test_states_begin_with_the_ranking_that_they_need():
    with pytest.raises(ValueError, match="begin: Oracle needs a ranking of the prompt"):
        begin(Oracle(layer=2), num_layers=LAYERS, prompt_length=LENGTH)
