"""A later turn takes up dropped tokens of the prompt: against a slow version, and its laws."""

from dataclasses import replace

import pytest
import torch

from claa_ops.methods import (
    ASL,
    CLAA,
    Coarse,
    FastKV,
    FullKV,
    Hops,
    LazyLLM,
    Oracle,
    Peak,
    PromptDistill,
    Random,
)
from claa_ops.prefill import ClaaCache, StaticClaaCache, attach
from support.families import build_family
from support.slow_methods import Conversation, Llama
from support.tiny_models import build, generate, prompt

LENGTH, SHORT, LAYERS = 90, 67, 6
PEAK = Peak(keep=20, layer=2, window=8, kernel_size=5, num_sinks=0, second_look=True)
# Tokens of each forward after the prompt: single ones are decoded, turns have several. The last
# turns are shorter than the window.
TURNS = (1, 1, 12, 1, 9, 4, 1, 1, 3, 2)


@pytest.fixture(scope="module")
def model():
    return attach(build("llama", num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def llama(model):
    return Llama(model)


@torch.no_grad()
def talk(model, cache, turns, mask=None):
    """The logits of each forward, a prompt and turns ``[B, n]``."""
    logits = []
    for ids in turns:
        if mask is not None and logits:
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = None
        if mask is not None:
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(output.logits)
    return logits


def turns_of(batch, turns=TURNS):
    return [prompt(*[tokens] * batch, seed=5 + turn)[0] for turn, tokens in enumerate(turns)]


def assert_close(actual, expected):
    error = (actual.double() - expected).abs().max()
    assert error <= 1e-4 * expected.abs().max()


def test_a_conversation_is_the_slow_version(model, llama):
    ids, _ = prompt(LENGTH)
    turns, cache = [ids, *turns_of(1)], ClaaCache(model.config, PEAK)
    slow = Conversation(llama, layer=2, kept=20, window=8, kernel=5)
    for logits, turn in zip(talk(model, cache, turns), turns, strict=True):
        expected = slow.turn(turn[0].tolist())
        assert_close(logits[0], expected[-logits.shape[1] :])
    assert [len(taken) for taken in slow.taken] == [20, 20, 20, 20, 10, 0]
    assert cache.lengths == [len(places) for places in slow.places]
    assert cache.state.positions.tolist() == [sorted(j for taken in slow.taken for j in taken)]


@pytest.mark.parametrize("kept", [20, 0.25])
def test_a_padded_batch_is_the_slow_version_of_each_row(model, llama, kept):
    ids, mask = prompt(LENGTH, SHORT)
    turns = turns_of(2)
    cache = ClaaCache(model.config, replace(PEAK, keep=kept))
    together = talk(model, cache, [ids, *turns], mask)
    for row, length in enumerate((LENGTH, SHORT)):
        own = kept if isinstance(kept, int) else int(kept * length)
        slow = Conversation(llama, layer=2, kept=own, window=8, kernel=5)
        expected = slow.turn(ids[row, -length:].tolist())
        assert_close(together[0][row, -own:], expected[-own:])
        for logits, turn in zip(together[1:], turns, strict=True):
            assert_close(logits[row], slow.turn(turn[row].tolist()))


# Laws that need no second version.

METHODS = {
    "peak": PEAK,
    "peak, sinks": replace(PEAK, num_sinks=4),
    "hops": Hops(keep=20, layer=2, window=8, kernel_size=5, num_seeds=6, least=5, second_look=True),
    "claa": CLAA(keep=20, layer=2, last_n=2, second_look=True),
    "claa, z-scored": CLAA(keep=0.3, layer=2, zscore=True, second_look=True),
    "fastkv": FastKV(keep=20, layer=2, second_look=True),
    "promptdistill": PromptDistill(keep=20, layer=2, second_look=True),
    "lazyllm, one layer": LazyLLM(keep=20, layer=2, second_look=True),
}


@pytest.mark.parametrize("name", METHODS)
def test_whoever_keeps_everything_is_full_prefill(model, name):
    method = replace(METHODS[name], keep=1.0)
    turns = [prompt(LENGTH)[0], *turns_of(1)]
    cache = ClaaCache(model.config, method)
    for actual, expected in zip(
        talk(model, cache, turns),
        talk(model, ClaaCache(model.config, FullKV()), turns),
        strict=True,
    ):
        assert torch.equal(actual, expected)
    assert cache.parked is None


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("lengths", [(LENGTH,), (LENGTH, SHORT)], ids=["alone", "padded"])
def test_before_the_last_layer_whoever_takes_up_everything_is_full_prefill(model, name, lengths):
    """The last layer's keys of the prompt follow from parked states, which are those of full."""
    method = replace(METHODS[name], keep=0.4, keep_least=0, layer=LAYERS - 2)
    ids, mask = prompt(*lengths)
    mask = mask if len(lengths) > 1 else None
    turns = [ids, *turns_of(len(lengths), (9, 12, 1, 6))]
    plain, cache = ClaaCache(model.config, FullKV()), ClaaCache(model.config, method)
    expected, actual = (talk(model, each, turns, mask) for each in (plain, cache))
    assert not torch.allclose(actual[1], expected[1], atol=1e-2)  # it holds .8 of the prompt
    for turn in (2, 3, 4):
        torch.testing.assert_close(actual[turn], expected[turn], atol=1e-3, rtol=1e-3)
    assert cache.lengths == plain.lengths


def test_what_is_taken_up_has_the_keys_of_full_prefill_in_the_next_layer(model):
    turns = [prompt(LENGTH)[0], *turns_of(1, (12, 9))]
    caches = [ClaaCache(model.config, method) for method in (PEAK, FullKV())]
    for cache in caches:
        talk(model, cache, turns)
    positions = caches[0].state.positions[0]
    assert len(positions) == 60
    for held, whole in ((x.layers[3].keys, y.layers[3].keys) for x, y in [caches]):
        torch.testing.assert_close(held[:, :, :60], whole[:, :, positions], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_of_a_batch_is_the_conversation_alone(model, name):
    ids, mask = prompt(LENGTH, SHORT)
    turns = [ids, *turns_of(2)]
    together = talk(model, ClaaCache(model.config, METHODS[name]), turns, mask)
    for row, length in enumerate((LENGTH, SHORT)):
        own = [turn[row : row + 1, -length:] for turn in turns]
        alone = talk(model, ClaaCache(model.config, METHODS[name]), own)
        for actual, expected in zip(together, alone, strict=True):
            tokens = expected.shape[1]
            torch.testing.assert_close(actual[row, -tokens:], expected[0], atol=1e-3, rtol=1e-3)


def test_conversations_may_be_interleaved(model):
    methods = [PEAK, METHODS["claa"], FullKV()]
    turns = [[prompt(LENGTH - 9 * i, seed=i)[0], *turns_of(1)] for i in range(3)]
    caches = [ClaaCache(model.config, method) for method in methods]
    interleaved = [[] for _ in methods]
    for forwards in zip(*turns, strict=True):
        for i, ids in enumerate(forwards):
            with torch.no_grad():
                interleaved[i].append(model(ids, past_key_values=caches[i]).logits)
    for i, method in enumerate(methods):
        alone = talk(model, ClaaCache(model.config, method), turns[i])
        assert all(map(torch.equal, interleaved[i], alone))


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma", "granite", "olmo2", "mixtral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_families_take_a_second_look(family, attention):
    settings = {"sliding_window": None} if family in ("phi3", "mixtral") else {}
    model = attach(build(family, attention, **settings))
    method = replace(PEAK, keep=0.5, layer=2, num_sinks=2)
    turns = [prompt(60)[0], *turns_of(1, (9, 5, 4))]
    plain, cache = ClaaCache(model.config, FullKV()), ClaaCache(model.config, method)
    expected, actual = talk(model, plain, turns), talk(model, cache, turns)
    assert cache.lengths == plain.lengths
    for turn in (2, 3):
        torch.testing.assert_close(actual[turn], expected[turn], atol=2e-3, rtol=2e-3)


def test_generate_takes_a_second_look(model):
    ids, _ = prompt(LENGTH)
    method = replace(PEAK, keep=0.5, layer=LAYERS - 2)
    cache, plain = ClaaCache(model.config, method), ClaaCache(model.config, FullKV())
    first, _ = generate(model, ids, cache)
    said = torch.cat([ids, first, turns_of(1, (9,))[0]], dim=1)
    assert cache.lengths[-1] == 45 + 5  # the last token of an answer is not fed
    talk(model, plain, [said[:, :LENGTH]])
    tokens, logits = generate(model, said, cache)
    expected, expected_logits = generate(model, said, plain)
    torch.testing.assert_close(logits, expected_logits, atol=1e-3, rtol=1e-3)
    assert torch.equal(tokens, expected) and cache.lengths == plain.lengths


def test_rows_that_change_places_keep_what_was_parked(model):
    ids, mask = prompt(LENGTH, SHORT)
    first, turn = turns_of(2, (1, 12))
    swapped, cache = torch.tensor([1, 0]), ClaaCache(model.config, replace(PEAK, keep=0.25))
    expected = talk(model, ClaaCache(model.config, cache.method), [ids, first, turn], mask)[-1]
    talk(model, cache, [ids, first], mask)
    cache.reorder_cache(swapped)
    mask = torch.cat([mask, torch.ones(2, 13, dtype=torch.int64)], dim=1)[swapped]
    positions = (mask.cumsum(dim=1) - 1)[:, -12:]
    with torch.no_grad():
        actual = model(
            turn[swapped], attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits
    torch.testing.assert_close(actual, expected[swapped], atol=1e-4, rtol=1e-4)


def test_parked_states_are_counted_and_dropped_with_the_request(model):
    ids, _ = prompt(LENGTH)
    methods = [replace(PEAK, second_look=look, keep_kv=1.0) for look in (True, False)]
    caches = [ClaaCache(model.config, method) for method in methods]
    for cache in caches:
        talk(model, cache, [ids])
    assert caches[0].lengths == caches[1].lengths == [LENGTH] * 3 + [20] * 3
    parked = LENGTH * (32 + 2 * 8) * 4  # hidden states, cosines and sines in float32
    assert caches[0].nbytes() - caches[1].nbytes() == parked
    static = StaticClaaCache(caches[0], max_new_tokens=3)  # decodes, and looks no second time
    token = torch.full((1, 1), 7)
    with torch.no_grad():
        assert torch.allclose(
            model(token, past_key_values=static).logits,
            model(token, past_key_values=caches[1]).logits,
            atol=1e-5,
        )
    caches[0].reset()
    assert caches[0].parked is None and caches[0].nbytes() == 0
    assert not hasattr(model, "parked")


def test_what_cannot_look_again_says_so(model):
    for method, settings, message in [
        (Peak, {"second_look": 1}, "Peak: second_look must be True or False, got 1"),
        (Peak, {"keep_kv": 0.5}, "Peak: keep_kv must be 1.0 with second_look, got 0.5"),
        (CLAA, {"equal_cache": True}, "CLAA: equal_cache must be False with second_look, got True"),
        *(
            (each, {}, f"{each.__name__}: second_look must be False, got True")
            for each in (ASL, Coarse, Oracle, Random)
        ),
        (Hops, {"states": "hidden"}, "Hops: second_look must be False, got True"),
    ]:
        with pytest.raises(ValueError) as error:
            method(**{"second_look": True, **settings})
        assert str(error.value) == message
    with pytest.raises(ValueError, match="LazyLLM: layer must be one with second_look"):
        LazyLLM(second_look=True).check(12)
    with pytest.raises(
        ValueError, match="a second look needs layers with full attention, got sliding"
    ):
        ClaaCache(build("gemma2").config, replace(PEAK, layer=1))
    with pytest.raises(
        ValueError, match="Coarse runs tokens through layers a second time, which ne"
    ):
        ClaaCache(build_family("lfm2").config, Coarse())


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("lengths", [(LENGTH, SHORT, 52), (LENGTH,) * 3], ids=["padded", "even"])
def test_turns_may_be_padded(model, name, lengths):
    """Tokens after a shorter answer are hidden, and a shorter turn begins later."""
    ids, mask = prompt(*lengths)
    cache, seen = ClaaCache(model.config, METHODS[name]), mask
    alone = [ClaaCache(model.config, METHODS[name]) for _ in lengths]
    turns = [(ids, mask)]
    for tokens, own in ((1, [1, 1, 0]), (1, [1, 0, 0]), (12, [12, 5, 9]), (1, [1, 1, 1])):
        turn, _ = prompt(*[tokens] * 3, seed=tokens)
        place = torch.arange(tokens)
        later = tokens > 1  # a turn is padded on the left
        valid = [place >= tokens - n if later else place < n for n in own]
        turns.append((turn, torch.stack(valid).long()))
    turns.append((prompt(4, 4, 4, seed=9)[0], torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [1] * 4])))
    for step, (turn, valid) in enumerate(turns):
        seen = valid if step == 0 else torch.cat([seen, valid], dim=1)
        positions = (seen.cumsum(dim=1) - 1).clamp_min(0)[:, -turn.shape[1] :]
        together = model(
            turn, attention_mask=seen, position_ids=positions, past_key_values=cache
        ).logits
        for row, held in enumerate(alone):
            own = turn[row : row + 1, valid[row].bool()]
            if own.shape[1] == 0:
                continue
            expected = model(own, past_key_values=held).logits[0]
            actual = together[row, -len(expected) :]
            torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
    assert len({held.lengths[-1] for held in alone}) > 1
