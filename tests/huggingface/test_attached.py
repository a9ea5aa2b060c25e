"""`with claa_ops.attached(...)`, `detach`, and answers sampled by `model.generate`."""

import pickle
import threading

import pytest
import torch
from transformers import DynamicCache, pipeline
from transformers.generation.streamers import BaseStreamer

import claa_ops
from claa_ops import prefill
from claa_ops.methods import CLAA, FullKV, GemFilter, Oracle, SnapKV, SpeculativePrefill
from claa_ops.prefill import ClaaCache, attach, attached, detach
from support.tiny_checkpoint import tiny_model, tiny_tokenizer
from support.tiny_models import build, prompt

METHOD = CLAA(keep=0.5, layer=1, last_n=2)
NEW = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def model():
    return build("llama")


def parts(model):
    """Whatever attaching may change of a model."""
    modules = list(model.modules())
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules]
    noted = [
        len(m._forward_pre_hooks_with_kwargs) + len(m._forward_hooks_with_kwargs) for m in modules
    ]
    names = [sorted(vars(m)) for m in modules]
    return hooks, noted, names, model.config._attn_implementation


def through_a_cache(model, ids, method=METHOD, **options):
    cache = ClaaCache(model.config, method)
    return attach(model).generate(ids, past_key_values=cache, **{**NEW, **options})


def test_it_is_at_the_top_of_the_package():
    assert claa_ops.attached is prefill.attached
    with pytest.raises(AttributeError, match="module 'claa_ops' has no attribute 'atached'"):
        _ = claa_ops.atached


@pytest.mark.parametrize("lengths", [(60,), (60, 41)], ids=["one prompt", "padded batch"])
def test_within_each_generate_has_a_cache_of_its_own(model, lengths):
    ids, mask = prompt(*lengths)
    before, plain = parts(model), model.generate(ids, attention_mask=mask, **NEW)
    with attached(model, METHOD) as same:
        assert same is model
        answers = [
            model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **NEW)
            for _ in range(2)
        ]
    assert parts(model) == before
    assert torch.equal(model.generate(ids, attention_mask=mask, **NEW), plain)
    expected = through_a_cache(model, ids, attention_mask=mask)
    for answer in answers:
        assert torch.equal(answer.sequences, expected)
        assert isinstance(answer.past_key_values, ClaaCache)
        assert answer.past_key_values.state.positions.shape[1] == 30
    assert answers[0].past_key_values is not answers[1].past_key_values


def test_a_forward_begins_one_unless_it_has_its_own_or_wants_none(model):
    ids, _ = prompt(60)
    with torch.no_grad(), attached(model, METHOD):
        output = model(ids)
        assert output.logits.shape[1] == 30 and isinstance(output.past_key_values, ClaaCache)
        token = output.logits[:, -1:].argmax(-1)
        model(token, past_key_values=output.past_key_values)
        assert output.past_key_values.get_seq_length() == 61
        own = model(ids, past_key_values=DynamicCache(config=model.config))
        assert own.logits.shape[1] == 60 and type(own.past_key_values) is DynamicCache
        assert model(ids, use_cache=False).logits.shape[1] == 60


def test_a_pipeline_needs_nothing_else():
    tokenizer = tiny_tokenizer()
    write = pipeline("text-generation", model=tiny_model(), tokenizer=tokenizer, device="cpu")
    text = " ".join(["one two three four five six seven eight nine ten"] * 8)
    plain = write(text, **NEW)
    seen = []
    with attached(write.model, CLAA(keep=0.2)):
        hook = write.model.register_forward_hook(
            lambda module, args, output: seen.append(output.past_key_values)
        )
        pruned = write(text, **NEW)
        hook.remove()
    assert seen and all(isinstance(cache, ClaaCache) for cache in seen)
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = tokenizer.decode(through_a_cache(write.model, ids, CLAA(keep=0.2))[0])
    assert pruned[0]["generated_text"].strip() == expected.strip()
    detach(write.model)
    assert write(text, **NEW) == plain


def test_it_may_be_inside_another_and_on_a_model_that_stays_attached(model):
    ids, _ = prompt(60)
    attach(model)
    before = parts(model)
    with torch.no_grad(), attached(model, METHOD):
        with attached(model, CLAA(keep=0.25, layer=1)):
            assert model(ids).logits.shape[1] == 15
        assert model(ids).logits.shape[1] == 30
    assert parts(model) == before
    assert model(ids).logits.shape[1] == 60


def test_an_error_within_leaves_nothing_behind(model):
    before = parts(model)
    with pytest.raises(ZeroDivisionError), attached(model, METHOD):
        _ = 1 / 0
    assert parts(model) == before


def test_other_threads_and_other_models(model):
    ids, _ = prompt(60)
    other, lengths = build("llama"), []
    with torch.no_grad(), attached(model, METHOD):
        thread = threading.Thread(
            target=lambda: lengths.append(len(model(ids).past_key_values.state.positions[0]))
        )
        thread.start()
        thread.join()
        assert other(ids).logits.shape[1] == 60
    assert lengths == [30]


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (GemFilter(keep=20), ValueError, "attached: the method must prefill once, got GemFilter"),
        (Oracle(keep=20), ValueError, "attached: the method must rank by its prefill alone, got O"),
        (CLAA(layer=9), ValueError, r"CLAA: layer must be in \[0, 2\]"),
        ("claa", TypeError, "attached: method must be a claa_ops.methods.Method"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything(model, method, error, message):
    before = parts(model)
    with pytest.raises(error, match=message), attached(model, method):
        raise AssertionError("it began")
    assert parts(model) == before


# detach


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_detached_model_is_what_it_was(family):
    model = build(family)
    ids, before = prompt(60)[0], parts(model)
    plain = model.generate(ids, **NEW)
    assert detach(model) is model and parts(model) == before  # nothing to do
    pruned = through_a_cache(model, ids)
    assert parts(model) != before
    assert detach(model) is model and parts(model) == before
    assert torch.equal(model.generate(ids, **NEW), plain)
    assert torch.equal(through_a_cache(model, ids), pruned)  # and back again


def test_a_copy_from_a_pickle_can_be_detached(model):
    before = parts(model)
    copied = pickle.loads(pickle.dumps(attach(model)))
    assert parts(detach(copied)) == before
    assert parts(model) != before
    with pytest.raises(TypeError, match="must be a decoder of transformers, got str"):
        detach("llama")


# Sampling.


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value.reshape(-1).tolist())

    def end(self):
        self.tokens.append("end")


@pytest.mark.parametrize("lengths", [(60,), (60, 41)], ids=["one prompt", "padded batch"])
@pytest.mark.parametrize(
    "method", [METHOD, SnapKV(keep=20, window=8), GemFilter(keep=20, layer=1)], ids=str
)
def test_model_generate_writes_what_decode_does(model, method, lengths):
    ids, mask = prompt(*lengths)
    greedy = prefill.generate(model, ids, method, attention_mask=mask, max_new_tokens=6)
    handed = prefill.generate(
        model, ids, method, attention_mask=mask, max_new_tokens=6, do_sample=False
    )
    assert torch.equal(handed, greedy)


def test_it_draws_as_model_generate_does(model):
    ids, _ = prompt(60)
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 8}
    torch.manual_seed(0)
    drawn = prefill.generate(model, ids, METHOD, **options)
    torch.manual_seed(0)
    cache = ClaaCache(model.config, METHOD)
    expected = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(drawn, expected[:, 60:])
    others = [prefill.generate(model, ids, METHOD, **options) for _ in range(3)]
    assert any(not torch.equal(drawn, other) for other in others)


def test_an_oracle_ranks_before_it_draws(model):
    ids, _ = prompt(60)
    options = {"max_new_tokens": 4, "eos_token_id": []}
    greedy = prefill.generate(model, ids, Oracle(keep=20, layer=1), **options)
    assert torch.equal(
        prefill.generate(model, ids, Oracle(keep=20, layer=1), **options, do_sample=False), greedy
    )


def test_tokens_can_be_streamed(model):
    ids, _ = prompt(60)
    streamer = Collected()
    answer = prefill.generate(
        model, ids, METHOD, max_new_tokens=5, do_sample=False, streamer=streamer
    )
    assert streamer.tokens[1:-1] == [[token] for token in answer[0].tolist()]
    assert streamer.tokens[-1] == "end"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (SpeculativePrefill(keep=20), {"do_sample": True}, "do_sample are for methods that do not"),
        (FullKV(), {"return_dict_in_generate": True}, "return_dict_in_generate must be left out"),
    ],
)
def test_what_cannot_be_handed_over_is_refused(model, method, options, message):
    with pytest.raises(ValueError, match="generate: .*" + message):
        prefill.generate(model, prompt(60)[0], method, max_new_tokens=4, **options)
