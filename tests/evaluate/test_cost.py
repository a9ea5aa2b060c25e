"""The cost model counts what a forward computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from claa_ops.evaluate.cost import prefill_cost
from evaluate.tiny_checkpoint import LAYERS, tiny_model


def counted_linear(model, tokens: int) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(ids, logits_to_keep=1)
    flops = counter.get_flop_counts()["Global"]
    return sum(flops.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def test_linear_and_head_are_the_products_of_a_forward():
    model = tiny_model()
    cost = prefill_cost(model, 100)
    assert cost.linear + cost.head == counted_linear(model, 100)


def test_attention_is_half_the_square():
    # 6 layers, 4 heads of 8: two products, a multiplication and an addition each.
    cost = prefill_cost(tiny_model(), 100)
    assert cost.attention == 6 * (4 * 8) * 2 * 2 * (100 * 101 / 2)


def test_selection_leaves_the_layers_up_to_it_whole():
    model = tiny_model()
    full = prefill_cost(model, 1000)
    pruned = prefill_cost(model, 1000, kept=100, layer=2)
    assert pruned.linear / full.linear == pytest.approx((3 + 3 * 0.1) / LAYERS)
    assert pruned.attention / full.attention == pytest.approx((3 + 3 * 0.01) / LAYERS, rel=1e-3)
    assert pruned.head == full.head
    assert pruned.total == pruned.linear + pruned.attention + pruned.head


def test_keeping_everything_costs_everything():
    model = tiny_model()
    assert prefill_cost(model, 100, kept=100, layer=1) == prefill_cost(model, 100)


def build(family: str, **settings):
    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config)


def test_sliding_layers_see_their_window():
    alternating = ["sliding_attention", "full_attention"]
    model = build("gemma3_text", layer_types=alternating, sliding_window=10)
    pairs = (10 * 11 / 2 + 90 * 10) + 100 * 101 / 2
    assert prefill_cost(model, 100).attention == 4 * (4 * 8) * pairs


def test_experts_count_as_far_as_they_are_used():
    few, all_of_them = (
        prefill_cost(build("mixtral", num_local_experts=4, num_experts_per_tok=used), 10).linear
        for used in (1, 4)
    )
    one_expert = 3 * 32 * 48
    assert all_of_them - few == 2 * 10 * 2 * 3 * one_expert
