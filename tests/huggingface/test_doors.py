"""Every method at every entry point: it works, or one sentence says what to call instead."""

import dataclasses

import pytest
import torch

from claa_ops.huggingface.replay import RecordedPrefill
from claa_ops.methods import METHODS, FullKV, make_method
from claa_ops.prefill import (
    ClaaCache,
    StaticClaaCache,
    attach,
    begin,
    decode,
    generate,
    prefill,
)
from support.tiny_models import build, prompt

LENGTH, SHORT, LAYERS = 60, 41, 4
ROWS = {1: prompt(LENGTH), 2: prompt(LENGTH, SHORT)}
SETTINGS = {
    "asl": {"window": 8, "tau": 0.99, "last_n": 2},
    "pyramidinfer": {"least": 10},
    "gemfilter": {"layer": 1},
}
DRAFT = build("llama", num_hidden_layers=2)
ALL = {
    name: make_method(name, num_layers=LAYERS, keep=30, **SETTINGS.get(name, {}))
    for name in METHODS
}
ALL |= {
    "asl twice": dataclasses.replace(ALL["asl"], passes=2),
    "asl at a layer": dataclasses.replace(ALL["asl"], tau=None),
    "speculative tokens": dataclasses.replace(ALL["speculative"], chunk=None),
    "speculative draft": dataclasses.replace(ALL["speculative"], draft=DRAFT, chunk=None),
    "staged": make_method("claa", num_layers=LAYERS, layer=(0, 2), keep=(0.6, 0.3)),
}
ONE_PROMPT = {
    "asl": "ASL: a batch must be one prompt",
    "asl twice": "ASL: a batch must be one prompt",
    "speculative": "SpeculativePrefill: a batch must be one prompt unless chunk is None",
}

every_method = pytest.mark.parametrize("name", ALL)
every_batch = pytest.mark.parametrize("rows", ROWS)


@pytest.fixture(scope="module")
def model():
    return attach(build("llama", num_hidden_layers=LAYERS))


def refusal(name, rows, door):
    """The sentence with which this entry point refuses the method; None where it works."""
    if door in ("begin", "ClaaCache") and ALL[name].two_pass:
        kind = type(ALL[name]).__name__
        return (
            rf"^{door}: the method must prefill once, got {kind}, which prefills twice: "
            r"call claa_ops.prefill.generate\(model, input_ids, method\) or .prefill instead$"
        )
    if door in ("begin", "ClaaCache") and ALL[name].needs_ranking:
        return "^begin: Oracle needs a ranking of the prompt, which claa_ops.prefill.generate and "
    if door == "begin" or rows == 1:
        return None
    return ONE_PROMPT.get(name)


def enter(call, sentence):
    if sentence is None:
        return call()
    with pytest.raises(ValueError, match=sentence):
        call()
    return None


@every_method
def test_begin(name):
    method = ALL[name]

    def call(**ranking):
        return begin(method, num_layers=LAYERS, prompt_length=LENGTH, **ranking)

    state = enter(call, refusal(name, 1, "begin"))
    assert state is None or state.method is method
    if method.needs_ranking and not method.two_pass:
        assert call(ranking=torch.rand(1, LENGTH)).ranking is not None


@torch.no_grad()
@every_method
@every_batch
def test_caches(model, name, rows):
    ids, mask = ROWS[rows]
    made = []

    def call():
        made.append(ClaaCache(model.config, ALL[name]))
        logits = model(ids, attention_mask=mask, past_key_values=made[0]).logits
        assert logits.isfinite().all() and all(made[0].lengths)
        feed, longer = logits[:, -1:].argmax(-1), torch.cat([mask, mask[:, -1:]], dim=1)
        static = StaticClaaCache(made[0], 2)
        assert model(feed, attention_mask=longer, past_key_values=static).logits.isfinite().all()
        return True

    enter(call, refusal(name, rows, "ClaaCache"))
    assert not made or not ALL[name].two_pass  # refused before there is a cache


@every_method
@every_batch
def test_prefill_generate_and_decode(model, name, rows):
    ids, mask = ROWS[rows]
    sentence = refusal(name, rows, "prefill")
    prefilled = enter(lambda: prefill(model, ids, ALL[name], mask), sentence)
    tokens = enter(
        lambda: generate(model, ids, ALL[name], attention_mask=mask, max_new_tokens=3), sentence
    )
    if sentence is None:
        assert all(prefilled.cache.lengths)
        StaticClaaCache(prefilled.cache, 3)
        assert torch.equal(decode(model, prefilled, max_new_tokens=3), tokens)


@every_method
@every_batch
def test_a_recorded_prefill(model, name, rows):
    ids, mask = ROWS[rows]
    recorded, method = RecordedPrefill(model, ids, mask), ALL[name]
    sentence = refusal(name, rows, "RecordedPrefill")
    prefilled = enter(lambda: recorded.run(method), sentence)
    if sentence is None:
        assert torch.equal(prefilled.logits, prefill(model, ids, method, mask).logits)
        ranking = torch.rand(rows, LENGTH) if method.needs_ranking else None
        assert recorded.state(method, 1, ranking).layer == 1


@pytest.mark.parametrize("method", ["claa", METHODS["claa"], None])
def test_what_is_not_a_method_is_refused(model, method):
    ids = ROWS[1][0]
    for door, call in (
        ("begin", lambda: begin(method, num_layers=LAYERS, prompt_length=LENGTH)),
        ("ClaaCache", lambda: ClaaCache(model.config, method)),
        ("prefill", lambda: prefill(model, ids, method)),
        ("generate", lambda: generate(model, ids, method, max_new_tokens=2)),
    ):
        with pytest.raises(TypeError, match=f"{door}: method must be a claa_ops.methods.Method"):
            call()


@pytest.mark.parametrize("shape", [(1, LENGTH - 1), (LENGTH,), (1, 1, LENGTH)])
def test_a_ranking_of_another_prompt_is_refused(shape):
    with pytest.raises(ValueError, match=r"begin: ranking must have shape \[batch, 60\], got"):
        begin(ALL["oracle"], num_layers=LAYERS, prompt_length=LENGTH, ranking=torch.rand(shape))


def test_starts_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"begin: start must have shape \[batch\], got \[1, 2\]"):
        begin(FullKV(), num_layers=4, prompt_length=9, start=torch.zeros(1, 2, dtype=torch.int64))
