"""The multiply-adds that are counted are those that a forward computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from claa_ops.huggingface.work import count_work
from claa_ops.methods import Coarse, LazyLLM, Peak, SpeculativePrefill
from claa_ops.prefill import attach, prefill
from claa_ops.selection.work import Work
from support.tiny_checkpoint import LAYERS, tiny_model


def counted_linear(model, tokens: int) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(ids, logits_to_keep=1)
    flops = counter.get_flop_counts()["Global"]
    return sum(flops.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def test_linear_and_head_are_the_products_of_a_forward():
    model = tiny_model()
    work = count_work(model, [100] * LAYERS)
    assert 2 * (work.linear + work.head) == counted_linear(model, 100)  # products and sums


def test_attention_is_half_the_square():
    # 6 layers, 4 heads of 8: a product with the keys, and one with the values.
    work = count_work(tiny_model(), [100] * LAYERS)
    assert work.attention == 6 * (4 * 8) * 2 * (100 * 101 // 2)


def test_each_layer_counts_what_it_sees():
    model = tiny_model()
    full = count_work(model, [1000] * LAYERS)
    pruned = count_work(model, [1000] * 3 + [100] * (LAYERS - 3))
    assert pruned.linear / full.linear == pytest.approx((3 + 3 * 0.1) / LAYERS)
    assert pruned.attention / full.attention == pytest.approx((3 + 3 * 0.01) / LAYERS, rel=1e-3)
    assert pruned.head == full.head
    assert pruned.total == pruned.linear + pruned.attention + pruned.head


def test_forwards_add_up():
    model = tiny_model()
    first, second = count_work(model, [100] * 2, logits=0), count_work(model, [30] * LAYERS)
    assert first.head == 0 and first.linear * LAYERS == count_work(model, [200] * LAYERS).linear
    both = first + second
    assert both.linear == first.linear + second.linear
    assert both.attention == first.attention + second.attention and both.head == second.head
    assert both + Work() == both


@pytest.mark.parametrize(
    "method",
    [
        Coarse(keep=30, layer=1, ahead=3),
        LazyLLM(keep=(50, 40, 30), layer=(0, 1, 3), revive=True),
        Peak(keep=30, layer=2, second_look=True),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_prefill_counts_what_runs_ahead_and_what_is_taken_up(method):
    model = attach(tiny_model())
    ids = torch.arange(100)[None]
    prefill(model, ids, method)  # what attach tests is not counted
    counter = FlopCounterMode(display=False)
    with counter:
        work = prefill(model, ids, method).work
    flops = counter.get_flop_counts()["Global"]
    linear = sum(flops.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert 2 * (work.linear + work.head) == linear


def test_decoding_is_more_of_the_same_forward():
    model = tiny_model()
    pairs = [count_work(model, [tokens] * LAYERS).attention for tokens in (100, 103)]
    assert pairs[1] - pairs[0] == 6 * (4 * 8) * 2 * (101 + 102 + 103)


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
    return AutoModelForCausalLM.from_config(config).eval()


def test_sliding_layers_see_their_window():
    alternating = ["sliding_attention", "full_attention"]
    model = build("gemma3_text", layer_types=alternating, sliding_window=10)
    pairs = (10 * 11 / 2 + 90 * 10) + 100 * 101 / 2
    assert count_work(model, [100, 100]).attention == 2 * (4 * 8) * pairs


def test_experts_count_as_far_as_they_are_used():
    few, all_of_them = (
        count_work(build("mixtral", num_local_experts=4, num_experts_per_tok=used), [10, 10])
        for used in (1, 4)
    )
    one_expert = 3 * 32 * 48
    assert all_of_them.linear - few.linear == 10 * 2 * 3 * one_expert


def test_a_prefill_counts_experts_as_far_as_they_are_used():
    """A draft costs a larger share of a model that uses few of its experts."""
    draft = build("llama")
    ids = torch.arange(40)[None]
    method = SpeculativePrefill(keep=0.5, draft=draft, look_ahead=1, chunk=None)
    model = build("mixtral", num_local_experts=4, num_experts_per_tok=1)
    prefilled = prefill(model, ids, method)
    weights = [count_work(net, [1, 1]).linear for net in (draft, model)]
    assert prefilled.work_share == pytest.approx(weights[0] / weights[1] + 0.5)
    assert prefilled.work.linear == 40 * weights[0] + 20 * weights[1]
