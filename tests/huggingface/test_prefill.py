"""`prefill`, `decode` and `generate`: two passes, drafts, equal caches, and what is refused."""

import dataclasses

import pytest
import torch

from claa_ops.huggingface.answer import ModelReader
from claa_ops.huggingface.models import require_same_tokenizer
from claa_ops.huggingface.transformers_api import cache_of
from claa_ops.methods import (
    ASL,
    CLAA,
    METHODS,
    FullKV,
    GemFilter,
    Oracle,
    SelectiveContext,
    SpeculativePrefill,
    make_method,
)
from claa_ops.prefill import ClaaCache, attach, begin, decode, generate, prefill
from support import slow_methods
from support.slow_methods import Llama
from support.tiny_models import build, decoded, prompt

LENGTH, SHORT, LAYERS = 90, 67, 6


@pytest.fixture(scope="module")
def model():
    return attach(build("llama", num_hidden_layers=LAYERS))


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
    plain = decoded(model, prefill(model, ids, FullKV(), mask))[0]
    prefilled = prefill(model, ids, method, mask)
    assert prefilled.positions is None and prefilled.cache.lengths == [LENGTH] * LAYERS
    assert torch.equal(decoded(model, prefilled)[0], plain)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("length", [1, 5])
def test_a_prompt_no_longer_than_the_window_is_served(model, name, length):
    method = make_method(name, num_layers=LAYERS, keep=0.1)
    ids, _ = prompt(length)
    prefilled = prefill(model, ids, method)
    assert prefilled.logits.isfinite().all()
    keeps_window = name not in ("gemfilter", "speculative", "streaming")
    if keeps_window and length <= method.window:
        assert prefilled.cache.lengths == [length] * LAYERS


# generate().


@pytest.mark.parametrize(
    "name",
    [name for name in METHODS if name not in ("gemfilter", "speculative", "selective-context")],
)
def test_generate_is_the_models_own_with_the_cache_where_one_pass_is_enough(model, name):
    method = make_method(name, num_layers=LAYERS, keep=30, **SETTINGS.get(name, {}))
    rows = (LENGTH,) if name == "asl" else (LENGTH, SHORT)
    ids, mask = prompt(*rows)
    ranking = None
    if method.needs_ranking:
        ranking = method.prepare(ModelReader(model), ids, mask).ranking
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
    ended = decode(
        model, prefill(model, ids, FullKV(), mask), max_new_tokens=8, eos_token_id=[end, 97]
    )
    assert ended.shape[1] == min(8, max(first) + 1) and first[1] == 2
    assert ended[1].tolist() == free[1, :3].tolist() + [end] * (ended.shape[1] - 3)
    assert torch.equal(ended[0], free[0, : ended.shape[1]])
    alone = generate(model, ids[1:, LENGTH - SHORT :], FullKV(), max_new_tokens=8, eos_token_id=end)
    assert alone[0].tolist() == free[1, :3].tolist()
    with pytest.raises(ValueError, match="generate: max_new_tokens must be at least 1, got 0"):
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


def test_the_first_pass_runs_no_layer_after_the_filter_and_keeps_no_cache(model):
    ids, mask = prompt(LENGTH, SHORT)
    method, calls, held, blocks = GemFilter(keep=30, layer=3), [], [], list(model.model.layers)

    def note(module, args, kwargs, output):
        cache = cache_of(kwargs)
        calls.append((blocks.index(module), output.shape[1]))
        held.append(cache.nbytes())

    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        prefilled = prefill(model, ids, method, mask)
    finally:
        for hook in hooks:
            hook.remove()
    first = [(layer, LENGTH) for layer in range(4)]
    assert calls == first + [(layer, 30) for layer in range(LAYERS)]
    assert held[:4] == [0] * 4
    assert prefilled.work_share == pytest.approx((4 * LENGTH + LAYERS * 30) / (LAYERS * LENGTH))
    # A pass that was ended leaves nothing behind.
    plain = build("llama", num_hidden_layers=LAYERS)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_gemfilter_is_a_prompt_of_the_chosen_ids(family):
    model = attach(build(family))
    ids, _ = prompt(LENGTH)
    prefilled = prefill(model, ids, GemFilter(keep=30, layer=1))
    chosen = ids.gather(1, prefilled.positions)
    expected = model.generate(chosen, max_new_tokens=6, do_sample=False)[:, 30:]
    assert torch.equal(decode(model, prefilled, max_new_tokens=6), expected)


def test_a_smaller_model_is_the_draft(model):
    draft = build("llama", num_hidden_layers=2, hidden_size=16, num_attention_heads=2)
    method = SpeculativePrefill(keep=0.25, draft=draft, look_ahead=3, chunk=16)
    ids, _ = prompt(LENGTH)
    ranking, answer = slow_methods.answer_attention(Llama(draft), ids[0].tolist(), 3, 13)
    chosen = slow_methods.chunks_of(ranking, 16, 0.25)
    prefilled = prefill(model, ids, method)
    assert prefilled.positions[0].tolist() == chosen
    torch.testing.assert_close(prefilled.state.ranking[0].double(), ranking, atol=1e-5, rtol=1e-4)
    sizes = [
        sum(weight.numel() for weight in net.model.layers[0].parameters() if weight.dim() > 1)
        for net in (draft, model)
    ]
    work = answer.work * sizes[0] / sizes[1] + len(chosen) * LAYERS
    assert prefilled.work_share == pytest.approx(work / (LENGTH * LAYERS))
    assert prefilled.next_position.tolist() == [LENGTH]


@pytest.mark.parametrize("kind", [SelectiveContext, SpeculativePrefill])
def test_a_draft_of_another_vocabulary_is_refused(model, kind):
    draft = build("llama", vocab_size=120)
    message = "draft must have the tokenizer of the model, whose vocabulary has 99 .*got one of 120"
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        prefill(model, prompt(LENGTH)[0], kind(draft=draft))


def test_a_draft_with_a_vocabulary_that_is_padded_otherwise_can_be_vouched_for(model):
    ids, _ = prompt(LENGTH)
    draft = build("llama", vocab_size=120)
    method = SpeculativePrefill(keep=0.5, draft=draft, shared_tokenizer=True, chunk=10)
    assert prefill(model, ids, method).positions.shape[1] in (45, 50)
    method = SelectiveContext(keep=50, draft=draft, shared_tokenizer=True)
    assert prefill(model, ids, method).positions.shape[1] == 50


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
        prefill(model, prompt(40)[0], SpeculativePrefill(keep=20, draft=build("llama")))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            ASL(keep=30, layer=2, last_n=3, window=8),
            "ASL: a batch must be one prompt, which has its own sel.*got 2",
        ),
        (SpeculativePrefill(), "SpeculativePrefill: a batch must be one prompt unless chunk is No"),
        (GemFilter(layer=LAYERS), r"GemFilter: layer must be in \[0, 5\], got 6"),
        (
            CLAA(layer=5),
            r"CLAA: layer must be in \[0, 4\], before the last of the model's 6 layers",
        ),
    ],
)
def test_what_a_method_does_not_serve_is_refused(model, method, message):
    ids, mask = prompt(LENGTH, SHORT)
    with pytest.raises(ValueError, match=message):
        prefill(model, ids, method, mask)


def test_other_masks_are_refused(model):
    ids, mask = prompt(LENGTH, SHORT)
    with pytest.raises(ValueError, match="prompts must be padded on the left"):
        prefill(model, ids, FullKV(), mask.flip(1))


# Equal caches.


@pytest.mark.parametrize("keep", [0.5, 70, (0.9, 0.5)])
@pytest.mark.parametrize("name", ["claa", "fastkv", "fastkv-deferral", "random", "oracle"])
def test_equal_caches_hold_the_same_bytes(model, name, keep):
    layer = (1, 3) if isinstance(keep, tuple) else 3
    method = make_method(name, num_layers=LAYERS, keep=keep, layer=layer, equal_cache=True)
    method = dataclasses.replace(method, first_full=1 if "claa" in name else 0)
    ids, _ = prompt(LENGTH)
    prefilled = prefill(model, ids, method)
    allowed = 45 * LAYERS if keep != 70 else 70 * LAYERS
    assert allowed - LAYERS < sum(prefilled.cache.lengths) <= allowed
    if name == "claa":
        assert prefilled.cache.lengths[0] == LENGTH
        whole = prefill(model, ids, dataclasses.replace(method, equal_cache=False))
        assert sum(whole.cache.lengths) > allowed
        assert torch.equal(whole.logits, prefilled.logits)


def test_equal_caches_that_are_impossible_are_refused(model):
    method = CLAA(keep=0.5, layer=2, first_full=4, equal_cache=True)
    message = (
        "CLAA: equal_cache must leave each layer its window of 8: 45 of 90 tokens in 6 layers are "
        "270 entries, and the first 4 layers alone hold 315"
    )
    with pytest.raises(ValueError, match=message):
        prefill(model, prompt(LENGTH)[0], method)


def test_states_begin_with_the_ranking_that_they_need():
    with pytest.raises(ValueError, match="begin: Oracle needs a ranking of the prompt"):
        begin(Oracle(layer=2), num_layers=LAYERS, prompt_length=LENGTH)
