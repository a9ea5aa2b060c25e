"""One recorded prefill serves every method as prefilling anew would, to the bit."""

import contextlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from claa_ops.huggingface.answer import ModelReader
from claa_ops.huggingface.replay import RecordedPrefill
from claa_ops.huggingface.work import count_work
from claa_ops.methods import (
    ASL,
    CLAA,
    Coarse,
    FastKV,
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
    SnapKV,
    SpeculativePrefill,
    StreamingLLM,
    UniPrefill,
)
from claa_ops.prefill import ClaaCache, attach, decode, prefill
from support.own_methods import Mass, Norms
from support.tiny_models import build, prompt

LENGTHS = {"alone": (50,), "padded batch": (50, 41)}


@torch.no_grad()
def forward(model, ids, mask, method):
    cache = ClaaCache(model.config, method)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    output = model(
        ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        logits_to_keep=1,
    )
    return output.logits[:, -1], cache


def assert_same_cache(cache, expected):
    assert cache.get_seq_length() == expected.get_seq_length()
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    if expected.state.positions is None:
        assert cache.state.positions is None
    else:
        assert torch.equal(cache.state.positions, expected.state.positions)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(
    "method",
    [
        FullKV(),
        CLAA(keep=0.4, layer=1),
        CLAA(keep=0.4, layer=2),
        Coarse(keep=0.4, layer=0, ahead=2, window=8),
    ],
)
def test_a_replayed_prefill_is_the_prefill(family, lengths, method):
    model = attach(build(family))
    ids, mask = prompt(*lengths)
    recorded = RecordedPrefill(model, ids, mask)
    expected, expected_cache = forward(model, ids, mask, method)
    with recorded.replay():
        logits, cache = forward(model, ids, mask, method)
    assert torch.equal(logits, expected)
    assert_same_cache(cache, expected_cache)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_is_decoded_is_what_run_decodes(family, lengths):
    model, method = attach(build(family)), CLAA(keep=0.4, layer=1)
    ids, mask = prompt(*lengths)
    expected = prefill(model, ids, method, mask)
    prefilled = RecordedPrefill(model, ids, mask).run(method)
    assert_same_cache(prefilled.cache, expected.cache)
    assert torch.equal(prefilled.next_position, expected.next_position)
    ours, theirs = (continue_greedily(model, one) for one in (prefilled, expected))
    assert torch.equal(ours, theirs)


@torch.no_grad()
def continue_greedily(model, prefilled):
    """The logits of four more tokens."""
    logits, position, seen = [prefilled.logits], prefilled.next_position, prefilled.attention_mask
    for _ in range(4):
        seen = None if seen is None else torch.nn.functional.pad(seen, (0, 1), value=1)
        output = model(
            logits[-1].argmax(dim=-1, keepdim=True),
            attention_mask=seen,
            position_ids=position[:, None],
            past_key_values=prefilled.cache,
        )
        logits.append(output.logits[:, -1])
        position = position + 1
    return torch.stack(logits)


UNIPREFILL = UniPrefill(top_p=0.5, block=8, num_sinks=4, window=8)
BATCHED = {
    "full": FullKV(),
    "claa": CLAA(keep=0.4, layer=1),
    "claa, staged": CLAA(keep=(0.7, 0.4), layer=(0, 2), first_full=0),
    "claa, equal cache": CLAA(keep=0.4, layer=1, first_full=0, equal_cache=True),
    "snapkv": SnapKV(keep=0.4, window=8),
    "gemfilter": GemFilter(keep=0.4, layer=1),
    "asl, at a layer": ASL(keep=0.5, layer=0, last_n=1, window=8, tau=None),
    "streaming": StreamingLLM(keep=0.4),
    "pyramidkv": PyramidKV(keep=0.6, window=8),
    "pyramidinfer": PyramidInfer(least=16),
    "lazyllm": LazyLLM(keep=0.2),
    "promptdistill": PromptDistill(keep=0.4),
    "uniprefill": UNIPREFILL,
    "coarse": Coarse(keep=0.4, layer=0, ahead=2, window=8),
}
WITHOUT_WINDOWS = {  # what these park could not pass through a layer with a sliding window
    "peak, second look": Peak(keep=0.4, layer=1, window=8, second_look=True),
    "lazyllm, revived": LazyLLM(keep=(0.5, 0.45, 0.3), layer=(0, 1, 2), revive=True),
}
METHODS = BATCHED | WITHOUT_WINDOWS


def on(*families):
    """Each family with each method that serves it."""
    cases = [(family, name) for family in families for name in BATCHED]
    return pytest.mark.parametrize(
        ("family", "name"), [*cases, *(("llama", name) for name in WITHOUT_WINDOWS)]
    )


@on("llama", "gemma2", "gpt_oss")
def test_a_padded_batch_decodes_as_without_a_record(family, name):
    model, method = attach(build(family)), METHODS[name]
    ids, mask = prompt(80, 61)
    expected = prefill(model, ids, method, mask)
    prefilled = RecordedPrefill(model, ids, mask).run(method)
    assert_same_cache(prefilled.cache, expected.cache)
    ours, theirs = (continue_greedily(model, one) for one in (prefilled, expected))
    assert torch.equal(ours, theirs)


@on("llama", "gemma2")
def test_a_row_of_a_batch_is_the_prompt_alone(family, name):
    """What it keeps and costs exactly, its logits but for the rounding of another batch size."""
    model, method = attach(build(family)), METHODS[name]
    ids, mask = prompt(80, 61)
    batch = RecordedPrefill(model, ids, mask)
    together = batch.run(method)
    shares, cached = together.work_shares(), together.cache_bytes()
    reached, operations = together.reached(), together.operation_shares()
    for row, tokens in enumerate((80, 61)):
        own = ids[row : row + 1, -tokens:]
        alone = prefill(model, own, method)
        assert shares[row] == pytest.approx(alone.work_share, rel=1e-12)
        full = count_work(model, [tokens] * len(alone.cache.layers))
        done = alone.work.linear + alone.work.attention
        share = done / (full.linear + full.attention)
        assert operations[row] == pytest.approx(share, rel=1e-12)
        assert cached[row] == alone.cache.nbytes()
        places = range(tokens) if alone.positions is None else alone.positions[0].tolist()
        assert reached[row].nonzero()[:, 0].tolist() == list(places)
        assert len(reached[row]) == tokens
        sliced = batch.row(row).run(method)
        assert sliced.cache_bytes() == [alone.cache.nbytes()]
        assert sliced.work_shares() == [alone.work_share]
        assert sliced.operation_shares() == [share]
        for logits in (together.logits[row], sliced.logits[0]):
            torch.testing.assert_close(logits, alone.logits[0], atol=1e-5, rtol=1e-5)
        if alone.positions is not None:
            assert torch.equal(sliced.positions, alone.positions)


def test_the_layers_of_a_row_are_replayed():
    model, method = attach(build("llama")), CLAA(keep=0.4, layer=1)
    ids, mask = prompt(80, 61)
    batch = RecordedPrefill(model, ids, mask)
    computed = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: computed.append(index))
    for row in (0, 1):
        batch.row(row).run(method)
    assert computed == [2, 3] * 2


ALONE = {
    "claa": CLAA(keep=0.4, layer=1),
    "claa, staged": CLAA(keep=(0.7, 0.4), layer=(0, 2)),
    "fastkv": FastKV(keep=0.4, layer=1),
    "snapkv": SnapKV(keep=0.4, window=8),
    "gemfilter": GemFilter(keep=0.4, layer=1),
    "asl": ASL(keep=0.5, layer=0, last_n=1, window=8),
    "speculative": SpeculativePrefill(keep=0.4, look_ahead=3, chunk=None),
    "oracle": Oracle(keep=0.4, layer=1, max_new_tokens=4),
    "streaming": StreamingLLM(keep=0.4),
    "pyramidkv": PyramidKV(keep=0.6, window=8),
    "pyramidinfer": PyramidInfer(least=16),
    "lazyllm": LazyLLM(keep=0.2),
    "promptdistill": PromptDistill(keep=0.4),
    "uniprefill": UNIPREFILL,
    "selective-context": SelectiveContext(keep=0.4, window=8),
    "random": Random(keep=0.4, layer=1),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_run_is_a_prefill(name):
    model, method = attach(build("llama")), ALONE[name]
    ids, _ = prompt(80)
    expected = prefill(model, ids, method)
    recorded = RecordedPrefill(model, ids)
    for _ in range(2):  # nothing that a run does changes the record
        prefilled = recorded.run(method)
        assert torch.equal(prefilled.logits, expected.logits)
        assert torch.equal(prefilled.next_position, expected.next_position)
        assert prefilled.work_share == expected.work_share
        assert_same_cache(prefilled.cache, expected.cache)
        decode(model, prefilled, max_new_tokens=3)
        expected = prefill(model, ids, method)


def test_what_goes_before_a_prefill_is_done_once(monkeypatch):
    answers, prepare = [], Oracle.prepare
    monkeypatch.setattr(Oracle, "prepare", lambda *given: answers.append(1) or prepare(*given))
    model = attach(build("llama"))
    ids, _ = prompt(80)
    recorded = RecordedPrefill(model, ids)
    method = Oracle(keep=0.4, layer=1, max_new_tokens=3)
    for settings, number in [
        ({}, 1),
        ({"layer": 2, "keep": 0.3, "keep_kv": 1.0}, 1),
        ({"kernel_size": 5}, 2),
        ({"max_new_tokens": 4}, 3),
    ]:
        changed = replace(method, **settings)
        prefilled = recorded.run(changed)
        assert len(answers) == number
        expected = prefill(
            model, ids, changed, prepared=prepare(changed, ModelReader(model), ids, None)
        )
        assert torch.equal(prefilled.logits, expected.logits)
        assert prefilled.work_share == expected.work_share


def test_only_layers_that_were_recorded_can_select():
    model = attach(build("llama"))
    ids, mask = prompt(50)
    recorded = RecordedPrefill(model, ids, mask, layers=[1])
    expected, _ = forward(model, ids, mask, CLAA(keep=0.4, layer=1))
    with recorded.replay():
        assert torch.equal(forward(model, ids, mask, CLAA(keep=0.4, layer=1))[0], expected)
        with pytest.raises(
            ValueError, match="one of the recorded layers 1, 3, got one after layer 2"
        ):
            forward(model, ids, mask, CLAA(keep=0.4, layer=2))
    assert torch.equal(forward(model, ids, mask, CLAA(keep=0.4, layer=1))[0], expected)


def test_other_positions_are_another_prompt():
    model = attach(build("llama"))
    ids, mask = prompt(50, 41)
    recorded = RecordedPrefill(model, ids, mask)
    computed = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: computed.append(1))
    caches = []
    for context in (recorded.replay(), contextlib.nullcontext()):
        with context, torch.no_grad():
            cache = ClaaCache(model.config, FullKV())
            model(ids, attention_mask=mask, past_key_values=cache)  # counts the padding
            caches.append(cache)
    assert len(computed) == 2
    assert_same_cache(*caches)


def test_what_was_not_recorded_is_computed():
    model = attach(build("llama"))
    method, (ids, mask), (others, _) = CLAA(keep=0.4, layer=1), prompt(50), prompt(50, seed=1)
    expected, _ = forward(model, others, mask, method)
    plain = model(others).logits
    with RecordedPrefill(model, ids).replay():
        assert torch.equal(forward(model, others, mask, method)[0], expected)
        assert torch.equal(model(others).logits, plain)


def test_layers_are_not_computed_again(monkeypatch):
    model = attach(build("llama"))
    ids, mask = prompt(50)
    recorded = RecordedPrefill(model, ids)
    computed = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: computed.append(index))
    with recorded.replay():
        forward(model, ids, mask, CLAA(keep=0.4, layer=1))
        assert computed == [2, 3]
        forward(model, ids, mask, FullKV())
        assert computed == [2, 3]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_the_state_has_the_ranking_of_a_layer(lengths):
    model = attach(build("llama"))
    ids, mask = prompt(*(length + 30 for length in lengths))
    recorded = RecordedPrefill(model, ids, mask)
    method = CLAA(keep=0.4, layer=0, window=5)
    for layer in (0, 1, 2):
        _, cache = forward(model, ids, mask, replace(method, layer=layer))
        assert torch.equal(recorded.state(method, layer).importance, cache.state.importance)
    with pytest.raises(ValueError, match="must have the last 65 rows, .* got 64"):
        recorded.state(CLAA(window=65, layer=2), 1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_method_that_reads_hidden_states_is_replayed(family):
    model, method = attach(build(family)), Norms(keep=0.4, layer=1)
    (ids, mask), computed = prompt(60, 41), []
    expected = prefill(model, ids, method, mask)
    recorded = RecordedPrefill(model, ids, mask)
    state = recorded.state(method, 1)
    assert torch.equal(state.importance, expected.state.importance)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: computed.append(index))
    prefilled = recorded.run(method)
    assert computed == [2, 3]
    assert torch.equal(prefilled.logits, expected.logits)
    assert_same_cache(prefilled.cache, expected.cache)
    for row, tokens in enumerate((60, 41)):
        alone = prefill(model, ids[row : row + 1, -tokens:], method)
        torch.testing.assert_close(
            recorded.row(row).run(method).logits, alone.logits, atol=1e-5, rtol=1e-5
        )
    # Of one layer alone is no record that it could read.
    few = RecordedPrefill(model, ids, mask, layers=[1])
    computed.clear()
    assert torch.equal(few.run(method).logits, expected.logits) and computed == [0, 1, 2, 3]


@pytest.mark.parametrize("length", [40, 80])  # fewer tokens than rows that are recorded, and more
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_prompts_of_one_length_may_keep_different_numbers(family, length):
    model, method = attach(build(family)), Mass(layer=1, keep_kv=1.0, share=0.6)
    ids, _ = prompt(length, length, length)
    recorded, computed = RecordedPrefill(model, ids), []
    with pytest.raises(ValueError, match="a batch must be padded or one prompt"):
        recorded.run(method)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: computed.append(index))
    together = recorded.padded().run(method)
    assert computed == [2, 3]
    reached, shares, cached = together.reached(), together.work_shares(), together.cache_bytes()
    logits = continue_greedily(model, together)
    for row in range(3):
        alone = prefill(model, ids[row : row + 1], method)
        assert reached[row].nonzero()[:, 0].tolist() == alone.positions[0].tolist()
        assert shares[row] == pytest.approx(alone.work_share, rel=1e-12)
        assert cached[row] == alone.cache.nbytes()
        own = continue_greedily(model, alone)[:, 0]
        torch.testing.assert_close(logits[:, row], own, atol=1e-4, rtol=1e-4)
    assert len({int(row.sum()) for row in reached}) > 1


def test_seconds_are_those_of_what_is_computed_and_of_the_layers_that_were(monkeypatch):
    seconds = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(seconds)))
    monkeypatch.setattr("claa_ops.huggingface.replay.time", clock)
    model = attach(build("llama"))
    recorded = RecordedPrefill(model, prompt(60, 60)[0])
    assert recorded.seconds == 6  # a look before, at the beginning of 4 layers, and two at the end
    for method, layers in (
        (CLAA(keep=0.4, layer=1), 2),
        (GemFilter(keep=0.4, layer=2), 3),
        (StreamingLLM(keep=0.4), 4),
    ):
        prefilled = recorded.run(method)
        assert (prefilled.seconds, prefilled.full_seconds) == (1 + layers, 6)
        alone = recorded.row(1).run(method)
        assert (alone.seconds, alone.full_seconds) == (1 + layers / 2, 3)
    assert recorded.run(FullKV()).seconds == 6 and recorded.row(1).run(FullKV()).seconds == 3
    oracle = Oracle(keep=0.4, layer=1, max_new_tokens=3)
    for _ in range(2):  # its answer is asked for once, and counts each time
        assert recorded.run(oracle).seconds == 1 + 2 + 1
