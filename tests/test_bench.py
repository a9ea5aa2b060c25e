"""What a benchmark writes, one case per line, and what it runs where that is not an op."""

import json
from pathlib import Path

import pytest
import torch

from bench import record

RESULTS = sorted((Path(__file__).parents[1] / "bench/results").glob("*.json"))


def test_a_case_is_a_line_and_a_float_has_three_digits():
    cases = [{"ms": 1 / 3, "p": [123456.0, 0.0]}, {"ms": 2e-7 / 3, "bytes": 123_456}]
    text = record.text_of({"machine": {"threads": 2}, "lines": cases, "memory": []})
    assert text.splitlines() == [
        "{",
        ' "machine": {"threads": 2},',
        ' "lines": [',
        '  {"ms": 0.333, "p": [123000.0, 0.0]},',
        '  {"ms": 6.67e-08, "bytes": 123456}',
        " ],",
        ' "memory": []',
        "}",
    ]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_file_is_as_the_bench_writes_it(path):
    text = path.read_text()
    assert record.text_of(json.loads(text)) == text


def test_there_are_results():
    assert {"busy.json", "cpu.json", "h100.json", "ttft.json"} <= {path.name for path in RESULTS}


TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1000,
}


@torch.no_grad()
def test_a_prefill_of_known_indices_leaves_what_claa_left():
    pytest.importorskip("transformers")
    from bench import ttft
    from claa_ops.methods import CLAA

    model = ttft.build("Llama-3.1-8B", "cpu", **TINY)
    ids = torch.randint(1, 1000, (1, 80))
    settings = {"keep": 0.25, "layer": 1}
    recorded = ttft.Remembering(**settings)
    ttft.prefilled(model, ids, recorded)
    assert [x is None for x in recorded.selected.values()] == [True, False, True]
    methods = CLAA(**settings), ttft.Known(recorded.kept, recorded.selected)
    caches = [ttft.prefilled(model, ids, method) for method in methods]
    for layer, known in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(layer.keys, known.keys) and torch.equal(layer.values, known.values)
