"""`model.generate` with a ClaaCache, against the plain model, CLAA by hand, and itself."""

import copy

import pytest
import torch

from claa_ops import select_topk
from claa_ops.methods import (
    CLAA,
    FastKV,
    FullKV,
    LazyLLM,
    Method,
    Peak,
    PromptDistill,
    PyramidInfer,
    PyramidKV,
    StreamingLLM,
    UniPrefill,
)
from claa_ops.prefill import ClaaCache, attach
from support import hand_loop
from support.tiny_models import SLIDING_WINDOW, build, generate, prompt

LENGTH = 60
METHOD = CLAA(keep=0.5, keep_kv=0.3, layer=2, last_n=2, first_full=1)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    return attach(build(request.param))


def assert_close(logits, expected, tolerance=1e-4):
    assert logits.shape == expected.shape
    difference = (logits.double() - expected.double()).abs().max().item()
    assert difference <= tolerance * expected.abs().max().item()


# Everything kept: the plain model, bit for bit.


@pytest.mark.parametrize("method", [CLAA(keep=1.0, layer=1), CLAA(keep=99, layer=0), FullKV()])
def test_keeping_everything_is_the_plain_model(model, method):
    ids, _ = prompt(LENGTH)
    tokens, logits = generate(build(model.config.model_type), ids)
    cache = ClaaCache(model.config, method)
    kept_tokens, kept_logits = generate(model, ids, cache)
    assert torch.equal(kept_tokens, tokens)
    assert (kept_logits - logits).abs().max().item() == 0
    assert cache.lengths == [LENGTH + 5] * 4
    assert cache.state.positions is None


def test_an_attached_model_without_the_cache_is_the_plain_model(model):
    ids, mask = prompt(LENGTH, 41)
    _, plain = generate(build(model.config.model_type), ids, mask=mask)
    assert torch.equal(generate(model, ids, mask=mask)[1], plain)


def test_a_prompt_no_longer_than_the_window_is_kept_whole(model):
    for length in (1, 5, 8):
        ids, _ = prompt(length)
        cache = ClaaCache(model.config, METHOD)
        assert torch.equal(generate(model, ids, cache)[1], generate(model, ids)[1])
        assert cache.lengths == [length + 5] * 4
    cache = ClaaCache(model.config, CLAA(keep=0.1, layer=1, first_full=0))
    generate(model, prompt(9)[0], cache, steps=1)
    assert cache.lengths == [8] * 4


# Less kept: CLAA by hand.


@pytest.mark.parametrize(
    ("method", "kept", "capacity"),
    [
        (CLAA(keep=0.5, layer=2, last_n=2, first_full=1), 30, 30),
        (CLAA(keep=0.25, keep_kv=1.0, layer=1, first_full=4), 15, 60),
        (CLAA(keep=1.0, keep_kv=0.4, layer=2, first_full=0), 60, 24),
        (CLAA(keep=24, keep_kv=16, layer=0, first_full=0, window=5, kernel_size=3), 24, 16),
        (CLAA(keep=0.3, layer=2, last_n=3, first_full=3, zscore=True), 18, 18),
    ],
)
def test_it_is_claa_by_hand(model, method, kept, capacity):
    ids, _ = prompt(LENGTH)
    settings = hand_loop.Settings(
        kept=kept,
        capacity=capacity,
        layer=method.layer,
        last_n=method.last_n,
        first_full=method.first_full,
        window=method.window,
        kernel=method.kernel_size,
        zscore=method.zscore,
    )
    expected = hand_loop.generate(model, ids[0].tolist(), 4, settings)
    cache = ClaaCache(model.config, method)
    tokens, logits = generate(model, ids, cache, steps=4)
    assert cache.lengths == expected.lengths
    assert tokens[0].tolist() == expected.tokens
    assert_close(logits[0], torch.stack(expected.logits))
    if kept < LENGTH:
        assert cache.state.positions[0].tolist() == expected.positions


HALF_SLIDING = {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW}


@pytest.mark.parametrize(
    ("family", "changes", "first_sliding", "method"),
    [
        ("mistral", {}, 0, CLAA(keep=14, layer=0)),
        ("mistral", {}, 0, CLAA(keep=14, layer=2, last_n=2, zscore=True)),
        ("qwen3", HALF_SLIDING, 2, CLAA(keep=24, layer=1, first_full=0)),
        ("qwen3", HALF_SLIDING, 2, CLAA(keep=24, layer=2, first_full=9)),
    ],
)
def test_sliding_windows_go_by_position_after_a_selection(family, changes, first_sliding, method):
    model = attach(build(family, max_window_layers=first_sliding, **changes))
    settings = hand_loop.Settings(
        kept=method.keep,
        capacity=method.keep,
        layer=method.layer,
        last_n=method.last_n,
        first_full=method.first_full,
        zscore=method.zscore,
        sliding_window=SLIDING_WINDOW,
        first_sliding=first_sliding,
    )
    ids, _ = prompt(LENGTH)
    expected = hand_loop.generate(model, ids[0].tolist(), 8, settings)
    cache = ClaaCache(model.config, method)
    tokens, logits = generate(model, ids, cache, steps=8)
    assert cache.state.positions[0].tolist() == expected.positions
    assert tokens[0].tolist() == expected.tokens
    assert_close(logits[0], torch.stack(expected.logits))
    bounds = [SLIDING_WINDOW - 1 if settings.slides(layer) else 999 for layer in range(4)]
    assert cache.lengths == [min(*pair) for pair in zip(expected.lengths, bounds, strict=True)]


def test_eager_attention_is_sdpa(model):
    ids, mask = prompt(LENGTH, 33)
    eager = attach(build(model.config.model_type, attention="eager"))
    _, logits = generate(eager, ids, ClaaCache(eager.config, METHOD), mask)
    assert_close(logits, generate(model, ids, ClaaCache(model.config, METHOD), mask)[1])


# What the caches keep.


def test_cache_lengths_and_bytes():
    model = attach(build("llama", num_hidden_layers=6))
    cache = ClaaCache(model.config, CLAA(keep=20, keep_kv=12, layer=3, first_full=2))
    assert cache.lengths == [0] * 6 and cache.nbytes() == 0
    generate(model, prompt(LENGTH)[0], cache, steps=1)
    assert cache.lengths == [60, 60, 12, 12, 12, 12]
    assert cache.get_seq_length() == LENGTH
    assert cache.nbytes() == sum(cache.lengths) * 2 * 8 * 2 * 4  # G, D, keys and values, float32
    generate(model, prompt(LENGTH)[0], cache := ClaaCache(model.config, CLAA(keep=20, layer=1)))
    assert cache.lengths == [65, 65, 25, 25, 25, 25]


def test_the_first_token_does_not_depend_on_the_cache(model):
    ids, _ = prompt(LENGTH)
    first, later = [], []
    for keep_kv in (10, 0.3, 1.0):
        method = CLAA(keep=0.5, keep_kv=keep_kv, layer=1, first_full=0)
        _, logits = generate(model, ids, ClaaCache(model.config, method), steps=3)
        first.append(logits[:, 0])
        later.append(logits[:, 1])
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    assert not torch.equal(later[0], later[2])


def test_selected_tokens_keep_their_rotary_positions(model):
    seen = {}
    layer = model.model.layers[3]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    ids, mask = prompt(LENGTH, 41)
    cache = ClaaCache(model.config, CLAA(keep=20, layer=1))
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    handle.remove()
    assert torch.equal(seen["position_ids"], cache.state.positions)  # plain forward: the index
    cos, sin = model.model.rotary_emb(ids.float(), cache.state.positions)
    assert torch.equal(seen["position_embeddings"][0], cos)
    assert torch.equal(seen["position_embeddings"][1], sin)
    assert cache.state.positions.shape == (2, 20)
    assert (cache.state.positions.diff(dim=1) > 0).all()
    assert (cache.state.positions[:, -8:] == torch.arange(52, 60)).all()
    assert (cache.state.positions[1] >= 19).all()  # padding goes first


class Staged(Method):
    """Selects after two layers, without `Pruning`."""

    def observe(self, state, layer):
        if layer.index in (0, 2):
            state.update_ranking(layer.scores.amax(dim=1))

    def select(self, state, layer):
        if layer not in (0, 2):
            return None
        kept = {0: 40, 2: 20}[layer]
        return select_topk(state.importance, kept, window=self.window, start=state.start)


def test_a_method_may_select_more_than_once():
    model, seen = attach(build("llama")), {}
    model.model.layers[3].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    ids, mask = prompt(LENGTH, 30)
    cache = ClaaCache(model.config, Staged())
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    assert cache.lengths == [60, 40, 40, 20]
    assert torch.equal(seen["position_ids"], cache.state.positions)
    cos, _ = model.model.rotary_emb(ids.float(), cache.state.positions)
    assert torch.equal(seen["position_embeddings"][0], cos)
    assert seen["attention_mask"].shape == (2, 1, 20, 20)
    assert (cache.state.positions[1] >= 30).all() and not cache.state.start.any()
    assert cache.selected == {}  # nothing is held that later forwards do not need
    assert generate(model, ids, ClaaCache(model.config, Staged()), mask)[1].isfinite().all()


# Batches, turns, requests.


@pytest.mark.parametrize(
    "method",
    [
        CLAA(keep=24, keep_kv=16, layer=2, last_n=2, first_full=1),
        CLAA(keep=24, keep_kv=16, layer=2, last_n=2, first_full=1, zscore=True),
        CLAA(keep=0.4, keep_kv=0.27, layer=2, last_n=2, first_full=1),
        FastKV(keep=(0.63, 0.3), keep_kv=0.3, layer=(0, 2), num_sinks=2),
        Peak(keep=0.3, keep_kv=1.0, layer=1, window=4),
        PyramidKV(keep=0.4, window=4),
        PyramidInfer(rho=0.3, recent=0.2, least=6),
        LazyLLM(keep=0.2),
        PromptDistill(keep=0.3, layer=1),
        UniPrefill(top_p=0.5, layer=(0, 2), block=8, num_sinks=4, window=8),
        StreamingLLM(keep=0.3),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_padded_row_is_the_row_alone(model, method):
    lengths = (60, 41, 18, 9)
    ids, mask = prompt(*lengths)
    tokens, logits = generate(model, ids, ClaaCache(model.config, method), mask)
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, -length:]
        alone_tokens, alone_logits = generate(model, alone, ClaaCache(model.config, method))
        assert torch.equal(tokens[row], alone_tokens[0])
        assert_close(logits[row], alone_logits[0])


def test_later_turns_are_kept_in_full(model):
    ids, _ = prompt(LENGTH)
    turn, _ = prompt(30, seed=1)
    cache = ClaaCache(model.config, METHOD)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        lengths, one_by_one = cache.lengths, copy.deepcopy(cache)
        at_once = model(turn, past_key_values=cache).logits
        steps = [model(turn[:, i : i + 1], past_key_values=one_by_one).logits for i in range(30)]
    assert_close(at_once, torch.cat(steps, dim=1))
    assert cache.lengths == one_by_one.lengths == [length + 30 for length in lengths]
    assert cache.get_seq_length() == LENGTH + 30


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_conversation_through_generate(family):
    model = attach(build(family))
    ids, mask = prompt(LENGTH, 35)
    turn, _ = prompt(7, 7, seed=1)
    cache, control = ClaaCache(model.config, METHOD), ClaaCache(model.config, METHOD)
    tokens, _ = generate(model, ids, cache, mask)
    longer = torch.cat([ids, tokens, turn], dim=1)
    longer_mask = torch.cat([mask, torch.ones(2, 13, dtype=mask.dtype)], dim=1)
    _, logits = generate(model, longer, cache, longer_mask)
    # The control feeds the same tokens one by one.
    position = longer_mask.cumsum(1) - 1
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position[:, :60], past_key_values=control)
        for i in range(60, 73):
            step = model(
                longer[:, i : i + 1],
                attention_mask=longer_mask[:, : i + 1],
                position_ids=position[:, i : i + 1],
                past_key_values=control,
            ).logits
    assert_close(logits[:, 0], step[:, 0])


@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        LazyLLM(keep=0.2),
        PromptDistill(keep=0.3, layer=1),
        UniPrefill(top_p=0.5, layer=(0, 2), block=8, num_sinks=4, window=8),
    ],
    ids=lambda method: type(method).__name__,
)
def test_requests_on_one_model_do_not_mix(model, method):
    prompts = [prompt(LENGTH)[0], prompt(33, seed=1)[0]]
    methods = [method, CLAA(keep=20, keep_kv=16, layer=0, first_full=0)]
    caches, alone = [], []
    for ids, method in zip(prompts, methods, strict=True):
        alone.append(generate(model, ids, ClaaCache(model.config, method))[0])
        caches.append(ClaaCache(model.config, method))
    tokens = [[], []]
    feed = list(prompts)
    with torch.no_grad():
        for _ in range(6):
            for i, cache in enumerate(caches):
                logits = model(feed[i], past_key_values=cache).logits
                feed[i] = logits[:, -1:].argmax(-1)
                tokens[i].append(feed[i].item())
    assert tokens == [alone[0][0].tolist(), alone[1][0].tolist()]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_beam_search(family):
    model = attach(build(family))
    ids, _ = prompt(LENGTH)
    settings = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **settings)
    cache = ClaaCache(model.config, CLAA(keep=1.0, layer=1))
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), plain)
    # The score of a beam is that of its tokens fed to a fresh cache: rows stay with their beams.
    method = CLAA(keep=24, layer=1, first_full=0)
    output = model.generate(
        ids,
        past_key_values=ClaaCache(model.config, method),
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    cache, total, feed = ClaaCache(model.config, method), 0.0, ids
    with torch.no_grad():
        for token in output.sequences[0, LENGTH:]:
            step = model(feed, past_key_values=cache).logits[0, -1].log_softmax(-1)
            total, feed = total + step[token].item(), token.view(1, 1)
    assert output.sequences_scores.item() == pytest.approx(total / 6, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_of_a_cache_can_be_repeated_chosen_and_reordered(family):
    model = attach(build(family))
    ids, mask = prompt(LENGTH, 41)
    turn, _ = prompt(5, 5, seed=1)
    cache = ClaaCache(model.config, CLAA(keep=0.3, layer=0, first_full=1))
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        chosen, reordered = copy.deepcopy(cache), copy.deepcopy(cache)
        mask = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], dim=1)
        expected = model(turn, attention_mask=mask, past_key_values=cache).logits.flip(0)
        chosen.batch_repeat_interleave(2)
        chosen.batch_select_indices(torch.tensor([3, 0]))
        reordered.reorder_cache(torch.tensor([1, 0]))
        for cache in (chosen, reordered):
            flipped = {"attention_mask": mask.flip(0), "past_key_values": cache}
            assert_close(model(turn.flip(0), **flipped).logits, expected)


def test_reset_makes_room_for_another_request(model):
    cache = ClaaCache(model.config, METHOD)
    generate(model, prompt(LENGTH)[0], cache)
    cache.reset()
    assert cache.state is None and cache.nbytes() == 0 and cache.get_seq_length() == 0
    ids, _ = prompt(44, seed=1)
    _, logits = generate(model, ids, cache)
    assert torch.equal(logits, generate(model, ids, ClaaCache(model.config, METHOD))[1])


def test_kept_scores_are_those_of_every_ranked_layer(model):
    ids, _ = prompt(LENGTH)
    cache = ClaaCache(model.config, CLAA(keep=0.5, layer=1, last_n=1), keep_scores=True)
    _, logits = generate(model, ids, cache)
    assert sorted(cache.state.scores) == [0, 1]
    assert torch.equal(cache.state.scores[1], cache.state.importance)
    silent = ClaaCache(model.config, CLAA(keep=0.5, layer=1, last_n=1))
    assert torch.equal(generate(model, ids, silent)[1], logits)
    assert silent.state.scores == {}
    full = ClaaCache(model.config, FullKV(), keep_scores=True)
    generate(model, ids, full, steps=1)
    assert sorted(full.state.scores) == [0, 1, 2, 3]
    assert torch.equal(full.state.scores[0], cache.state.scores[0])
    assert full.state.scores[3].shape == (1, LENGTH - 8)
