"""An attached model under torch.compile and torch.export: one graph, whatever the length."""

import pytest
import torch

from claa_ops.methods import CLAA, Coarse, FastKV, Hops, LazyLLM, Peak, PromptDistill
from claa_ops.prefill import ClaaCache, attach
from support.tiny_models import build, prompt

RATE = CLAA(keep=0.4, layer=1, last_n=2, first_full=1)
STAGED = FastKV(keep=(0.6, 0.3), layer=(0, 1), num_sinks=2)
ABSOLUTE = CLAA(keep=23, keep_kv=17, layer=1, last_n=2, first_full=0)


@torch.no_grad()
def prefill_and_decode(forward, cache, ids, mask, steps=2):
    """Logits of the last prompt token and of each step, [B, steps + 1, vocabulary]."""
    logits = []
    for step in range(steps + 1):
        output = forward(ids, attention_mask=mask, past_key_values=cache).logits[:, -1:]
        logits.append(output)
        ids = torch.full_like(ids[:, :1], 7 + step)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("family", "method", "padded"),
    [
        ("llama", RATE, False),
        ("llama", STAGED, False),
        ("llama", LazyLLM(keep=0.3), False),
        ("llama", Hops(keep=0.4, layer=1, keep_least=0), False),
        ("llama", Hops(keep=0.4, layer=1, keep_least=0), True),
        ("llama", Hops(keep=(0.7, 0.4), layer=(0, 1), keep_least=0), True),
        ("llama", PromptDistill(keep=0.4), False),
        ("llama", Coarse(keep=0.4, layer=0, ahead=1), False),
        ("llama", Peak(keep=0.4, layer=1, second_look=True), False),
        ("gemma3_text", ABSOLUTE, True),
    ],
)
def test_prefill_and_decode_are_one_graph_each(family, method, padded):
    torch.compiler.reset()
    model, graphs = attach(build(family, num_hidden_layers=3)), []

    def count(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for length in (60, 61, 130):
        ids, mask = prompt(length, length - 25 if padded else length)
        mask = mask if padded else None
        caches = [ClaaCache(model.config, method) for _ in range(2)]
        logits = prefill_and_decode(compiled, caches[0], ids, mask)
        torch.testing.assert_close(
            logits, prefill_and_decode(model, caches[1], ids, mask), atol=1e-3, rtol=1e-3
        )
        assert caches[0].lengths == caches[1].lengths
        assert torch.equal(caches[0].state.positions, caches[1].state.positions)
    assert len(graphs) == 2


def test_a_model_compiled_before_serves_the_cache_with_all_ops_in_its_graph():
    torch.compiler.reset()
    model, graphs = attach(build("llama", num_hidden_layers=3)), []

    def collect(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=collect)
    ids, _ = prompt(60)
    with torch.no_grad():
        assert compiled(ids).logits.shape[1] == 60
        assert compiled(ids, past_key_values=ClaaCache(model.config, RATE)).logits.shape[1] == 24
    plain, pruned = graphs
    assert not any("claa" in target for target in plain)
    # Layers 0 and 1 are aggregated and 1 is compressed; layer 2 holds what the selection left.
    expected = {"score_layer": 2, "select_topk": 2, "gather_kv": 1}
    for op, count in {**expected, "gather_tokens": 3}.items():
        assert sum(f"claa.{op}" in target for target in pruned) == count, op


class Prefill(torch.nn.Module):
    """Prompt in; last logits, caches and kept positions out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        cache = ClaaCache(self.model.config, ABSOLUTE)
        output = self.model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        keys = [layer.keys for layer in cache.layers]
        values = [layer.values for layer in cache.layers]
        return output.logits, keys, values, cache.state.positions


@torch.no_grad()
def test_export_with_absolute_budgets_runs_at_other_lengths():
    wrapper = Prefill(attach(build("llama", num_hidden_layers=3)))
    batch, length = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("length", min=32)
    shapes = {"ids": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    ids, mask = prompt(60, 41)
    program = torch.export.export(
        wrapper,
        (ids, mask),
        dynamic_shapes=shapes,
        strict=False,
        # torch 2.11 fails to prove min(8 n, 16 n) = 8 n, which its check of strides asks for.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    for lengths in ((60, 41), (33, 30, 32), (150, 20)):
        ids, mask = prompt(*lengths)
        torch.testing.assert_close(program.module()(ids, mask), wrapper(ids, mask))
