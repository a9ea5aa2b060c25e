"""Hybrid decoders: attention ranks, and recurrent layers read the tokens that are kept."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from claa_ops.huggingface.replay import RecordedPrefill
from claa_ops.huggingface.static import StaticClaaCache
from claa_ops.huggingface.work import count_work
from claa_ops.methods import (
    ASL,
    CLAA,
    FastKV,
    FullKV,
    GemFilter,
    Hops,
    LazyLLM,
    Oracle,
    Peak,
    PyramidInfer,
    PyramidKV,
    UniPrefill,
)
from claa_ops.prefill import ClaaCache, attach, prefill
from support.families import HYBRID, SERVED, build_family
from support.hand_loop import Settings
from support.layer_loop import LayerLoop
from support.tiny_models import build, decoded, generate, prompt

METHOD = CLAA(keep=24, keep_kv=16, layer=1, last_n=2, first_full=0)
SIX = ["conv", "full_attention", "conv", "full_attention", "conv", "full_attention"]
# In the plain model these forget the states of the prompt where several tokens follow at once.
FORGETS = ("jamba",)


def size(logits):
    return logits.abs().max().item()


@pytest.fixture(scope="module")
def deep():
    """Convolutions and attention in turn, six layers."""
    return attach(build("lfm2", num_hidden_layers=6, layer_types=SIX))


@pytest.mark.parametrize("layer", [1, 2])  # 2 has no attention, but where all layers do
@pytest.mark.parametrize("family", [*HYBRID, "gemma4_text"])
def test_it_is_claa_by_hand_in_several_turns(family, layer):
    settings = Settings(kept=24, capacity=16, layer=layer, last_n=2, first_full=1)
    loop = LayerLoop(build_family(family, "eager"), settings)
    method = CLAA(keep=24, keep_kv=16, layer=layer, last_n=2, first_full=1)
    model = attach(build_family(family))
    cache = ClaaCache(model.config, method)
    history = torch.empty(1, 0, dtype=torch.int64)
    for length in (60,) if family in FORGETS else (60, 7, 1):
        turn, _ = prompt(length, seed=length)
        expected = loop.answer([*history[0, loop.seen :].tolist(), *turn[0].tolist()], steps=4)
        history = torch.cat([history, turn], dim=1)
        everything = torch.ones_like(history)  # or it takes a token 0 of an answer for padding
        tokens, logits = generate(model, history, cache, everything, steps=4)
        assert size(logits[0] - expected) <= 1e-4 * size(expected)
        assert tokens[0].tolist() == expected.argmax(-1).tolist()
        history = torch.cat([history, tokens], dim=1)
    assert cache.state.positions[0].tolist() == loop.kept


@torch.no_grad()
@pytest.mark.parametrize("family", [*HYBRID])
def test_a_turn_of_several_tokens_is_that_of_the_plain_model(family):
    model, plain = build_family(family), DynamicCache(config=build_family(family).config)
    ids, turn = prompt(60)[0], prompt(7, seed=1)[0]
    model(ids, past_key_values=plain)
    expected = model(turn, past_key_values=plain).logits
    cache = ClaaCache(model.config, FullKV())
    attach(model)(ids, past_key_values=cache)
    assert torch.equal(model(turn, past_key_values=cache).logits, expected)


# What a method's layers are.


def test_tokens_are_dropped_after_the_named_layer(deep):
    ids, _ = prompt(60)
    for layer, seen in ((1, 2), (2, 3), (3, 4), (None, 3)):
        cache = ClaaCache(deep.config, CLAA(keep=0.5, layer=layer, first_full=0))
        deep(ids, past_key_values=cache)
        assert cache.seen == [60] * seen + [30] * (6 - seen)
        assert cache.lengths == [0, 30] * 3


def test_the_ranking_is_that_of_the_attention_up_to_it(deep):
    ids, _ = prompt(60)
    kept = {}
    for layer, last_n in ((1, 1), (2, 1), (2, 9), (3, 1), (3, 2)):
        cache = ClaaCache(deep.config, CLAA(keep=20, layer=layer, last_n=last_n))
        deep(ids, past_key_values=cache)
        kept[layer, last_n] = cache.state.positions[0].tolist()
    assert kept[1, 1] == kept[2, 1] == kept[2, 9] != kept[3, 1]
    assert kept[3, 2] not in (kept[3, 1], kept[1, 1])  # both of the layers 1 and 3


def test_only_layers_with_attention_are_counted(deep):
    ids, _ = prompt(100)
    cache = ClaaCache(
        deep.config, CLAA(keep=0.2, keep_kv=0.5, layer=3, first_full=1, equal_cache=True)
    )
    deep(ids, past_key_values=cache)
    assert sum(cache.lengths) == 150  # half of what three caches hold, not six
    cache = ClaaCache(deep.config, CLAA(keep=0.2, layer=3, first_full=2))
    deep(ids, past_key_values=cache)
    assert cache.lengths == [0, 100, 0, 100, 0, 20]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (CLAA(layer=0), "layer must be an integer of at least 0, got -1"),
        (CLAA(layer=5), r"layer must be in \[0, 4\], before the last of the model's 6 layers"),
        (FastKV(keep=(0.5, 0.2), layer=(1, 2)), r"in ascending order, got \(0, 0\)"),
        (ASL(layer=3, last_n=3), r"last_n must be at most layer \+ 1 = 2"),
    ],
)
def test_layers_that_cannot_be_are_refused(deep, method, reason):
    with pytest.raises(ValueError, match=reason):
        ClaaCache(deep.config, method)


def test_one_layer_with_attention_is_refused():
    model = build("lfm2", layer_types=["conv", "conv", "full_attention", "conv"])
    with pytest.raises(TypeError, match="a selection goes between two layers that attend, got 1"):
        attach(model)


def test_gemma_4_with_shared_keys_is_refused():
    model = build("gemma4_text", **{**SERVED["gemma4_text"], "num_kv_shared_layers": 2})
    with pytest.raises(ValueError, match="it has layers that use the keys of others"):
        attach(model)


# Every method.

METHODS = [
    CLAA(keep=0.4, layer=3, zscore=True),
    FastKV(keep=0.4, rates_of="layer"),
    Peak(keep=0.4, keep_kv=20),
    Hops(keep=0.4, keep_least=0),
    GemFilter(keep=0.4),
    GemFilter(keep=0.4, layer=4),
    GemFilter(keep=0.4, layer=5),
    LazyLLM(keep=0.3),
    UniPrefill(top_p=0.7, block=4, num_sinks=4, window=8),
    PyramidInfer(rho=0.3, recent=0.2, least=10),
    PyramidKV(keep=0.4),
    Oracle(keep=0.4, max_new_tokens=3),
]


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_with_any_method_a_padded_row_is_the_row_alone(method, family, deep):
    model = deep if family == "lfm2" else attach(build_family(family))
    if family != "lfm2" and getattr(method, "layer", None) is not None:
        method = dataclasses.replace(method, layer=2)
    lengths = (60, 41, 25)
    ids, mask = prompt(*lengths)
    batch = decoded(model, prefill(model, ids, method, mask))[0]
    for row, length in enumerate(lengths):
        alone = prefill(model, ids[row : row + 1, -length:], method)
        assert size(decoded(model, alone)[0][0] - batch[row]) <= 1e-4 * size(batch)


@pytest.mark.parametrize("passes", [1, 2])
def test_adaptive_layers(deep, passes):
    ids, _ = prompt(60)
    prefilled = prefill(deep, ids, ASL(keep=20, layer=3, tau=2.0, window=8, passes=passes))
    assert prefilled.positions.shape == (1, 20)
    # The ranking of layer 3 is the first that is compared with another, that of layer 1.
    first, second = count_work(deep, [60] * 4, logits=0), count_work(deep, [20] * 6)
    assert prefilled.work == (
        count_work(deep, [60] * 4 + [20] * 2) if passes == 1 else first + second
    )


# A record.


@torch.no_grad()
@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "falcon_h1", "olmo_hybrid"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_replayed_prefill_is_the_prefill(family, layer):
    if layer == 0 and family != "falcon_h1":
        layer = None
    model, method = attach(build_family(family)), CLAA(keep=0.4, layer=layer, first_full=1)
    ids, mask = prompt(50, 41)
    recorded = RecordedPrefill(model, ids, mask)
    for _ in range(2):  # decoding left the record as it was
        expected = prefill(model, ids, method, mask)
        replayed = recorded.run(method)
        assert torch.equal(replayed.logits, expected.logits)
        assert torch.equal(replayed.positions, expected.positions)
        assert replayed.work == expected.work
        assert replayed.cache.nbytes() == expected.cache.nbytes()
        of_rows = replayed.cache_bytes()
        later = decoded(model, replayed)[0], decoded(model, expected)[0]
        assert torch.equal(*later)
    alone = prefill(model, ids[1:, -41:], method)
    row = recorded.row(1).run(method)
    assert of_rows[1:] == row.cache_bytes() == [alone.cache.nbytes()]
    assert size(row.logits - alone.logits) <= 1e-4 * size(alone.logits)
    assert size(decoded(model, row)[0] - decoded(model, alone)[0]) <= 1e-4 * size(later[0])


def test_a_record_ranks_by_the_layers_with_attention(deep):
    recorded = RecordedPrefill(deep, prompt(60)[0])
    one, two, four = (recorded.state(CLAA(last_n=2), layer).importance for layer in (1, 3, 4))
    assert torch.equal(two, four) and not torch.equal(one, two)


# The cache.


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "falcon_h1"])
def test_beams_reorder_states(family):
    model = attach(build_family(family))
    ids, mask = prompt(40, 31)
    settings = {"num_beams": 3, "max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    plain = model.generate(ids, attention_mask=mask, **settings)
    for _ in range(2):
        cache = ClaaCache(model.config, FullKV())
        beams = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
        assert torch.equal(beams, plain)


@torch.no_grad()
@pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])
def test_a_cache_that_is_reset_serves_another_prompt(family):
    model = attach(build_family(family))
    cache = ClaaCache(model.config, METHOD)
    generate(model, prompt(60)[0], cache)
    cache.reset()
    assert cache.nbytes() == 0 and cache.lengths == [0] * 4 and cache.seen == []
    ids, _ = prompt(50, seed=1)
    expected = generate(model, ids, ClaaCache(model.config, METHOD))[1]
    assert torch.equal(generate(model, ids, cache)[1], expected)


@torch.no_grad()
def test_rows_can_be_repeated_and_chosen():
    for family in ("lfm2", "falcon_h1"):
        model = attach(build_family(family))
        ids, mask = prompt(60, 41)
        cache, single = (ClaaCache(model.config, METHOD) for _ in range(2))
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        model(ids[1:, -41:], past_key_values=single)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3]))
        mask = torch.cat([mask[1:], torch.ones_like(mask[1:, :1])], dim=1)
        token = torch.tensor([[5]])
        place = torch.tensor([[41]])
        found = model(token, attention_mask=mask, position_ids=place, past_key_values=cache).logits
        expected = model(token, position_ids=place, past_key_values=single).logits
        assert size(found - expected) <= 1e-5 * size(expected)


@torch.no_grad()
def test_bytes_are_those_of_entries_and_states(deep):
    cache = ClaaCache(deep.config, FullKV())
    deep(prompt(60)[0], past_key_values=cache)
    kernel, width = deep.config.conv_L_cache, deep.config.hidden_size
    entries, states = 3 * 2 * 2 * 60 * 8, 3 * width * kernel
    assert cache.nbytes() == 4 * (entries + states)


@torch.no_grad()
@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text"])
def test_a_static_cache_decodes_the_same(family):
    model = attach(build_family(family))
    ids, mask = prompt(60, 41)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = ClaaCache(model.config, METHOD)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    static = StaticClaaCache(cache, max_new_tokens=3)
    for step in range(3):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        token = torch.full((2, 1), 7 + step)
        given = {"attention_mask": mask, "position_ids": positions[:, -1:] + 1 + step}
        expected = model(token, past_key_values=cache, **given).logits
        found = model(token, past_key_values=static, **given).logits
        assert size(found - expected) <= 1e-5 * size(expected)


@torch.no_grad()
def test_a_static_cache_of_layers_that_do_both_is_refused():
    model = attach(build_family("falcon_h1"))
    cache = ClaaCache(model.config, METHOD)
    model(prompt(60)[0], past_key_values=cache)
    with pytest.raises(ValueError, match="must attend or hand on a state, got layers that do both"):
        StaticClaaCache(cache, 3)


@torch.no_grad()
def test_prefill_and_decode_are_one_graph_each():
    torch.compiler.reset()
    model, graphs = attach(build_family("lfm2")), []

    def count(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for length in (60, 130):
        ids, mask = prompt(length, length - 25)
        logits = []
        for forward in (compiled, model):
            cache = ClaaCache(model.config, CLAA(keep=0.4, layer=1, first_full=1))
            logits.append([forward(ids, attention_mask=mask, past_key_values=cache).logits])
            later = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            token = torch.full_like(ids[:, :1], 7)
            logits[-1].append(forward(token, attention_mask=later, past_key_values=cache).logits)
        torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)
    assert len(graphs) == 2


# Work.


def test_work_is_the_products_with_weights_and_the_pairs_of_attention(deep):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        deep(prompt(100)[0], logits_to_keep=1)
    flops = counter.get_flop_counts()["Global"]
    products = sum(flops.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    convolutions = 3 * 100 * deep.config.hidden_size * deep.config.conv_L_cache
    work = count_work(deep, [100] * 6)
    assert 2 * (work.linear + work.head - convolutions) == products
    assert work.attention == 3 * (4 * 8) * 2 * (100 * 101 // 2)
    pruned = count_work(deep, [100, 100, 10, 10, 10, 10])
    assert pruned.attention == (4 * 8) * 2 * (100 * 101 // 2 + 2 * (10 * 11 // 2))


def test_a_prefill_counts_the_layers_as_they_ran(deep):
    prefilled = prefill(deep, prompt(100)[0], CLAA(keep=10, layer=2))
    assert prefilled.work == count_work(deep, [100] * 3 + [10] * 3)
    first = prefill(deep, prompt(100)[0], GemFilter(keep=10, layer=2))
    passes = count_work(deep, [100] * 3, logits=0) + count_work(deep, [10] * 6)
    assert first.work == passes


def test_convolutions_beside_experts_count_in_full():
    model = build_family("qwen3_next")
    block = model.model.layers[0]
    experts = sum(weight.numel() for weight in block.parameters() if weight.dim() == 3)
    experts -= block.linear_attn.conv1d.weight.numel()
    every = sum(weight.numel() for weight in block.parameters() if weight.dim() > 1)
    assert count_work(model, [1]).linear == every - experts // 2  # 2 of 4 are used


def test_heads_of_other_sizes_count_as_they_are():
    """The full attention of Gemma 4 has wider heads than its windows."""
    work = count_work(build_family("gemma4_text"), [10] * 4)
    assert work.attention == 2 * (10 * 11 // 2) * 4 * (2 * 8 + 2 * 16)
