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
def test_whole_prefills_are_of_models_in_known_shapes():
    pytest.importorskip("transformers")
    from bench import shapes, ttft
    from claa_ops.prefill import attach

    ids = torch.randint(1, 1000, (1, 80))
    for name in shapes.MODELS:
        torch.manual_seed(0)
        model = attach(shapes.build(name, ["cpu"], **TINY))
        methods = ttft.contestants(["peak:layer=1", "snapkv:keep=0.5"], [25, 50], 4)
        held = {label: ttft.prefilled(model, ids, each) for label, each in methods.items()}
        entries = {label: cache.layers[3].keys.shape[2] for label, cache in held.items()}
        assert entries == {
            "full": 80,
            "peak:layer=1 25 %": 20,
            "peak:layer=1 50 %": 40,
            "snapkv:keep=0.5": 40,
        }
        # Two of four layers see a quarter: the products are .625 of full prefill's.
        work = ttft.prefill(model, ids, methods["peak:layer=1 25 %"]).work
        full = ttft.count_work(model, [80] * 4)
        assert work.linear / full.linear == 0.625
        assert ttft.work_of_layers(work) == work.linear + work.attention


def test_rows_of_one_model_length_and_mode_take_the_place_of_older_ones(tmp_path):
    pytest.importorskip("transformers")
    from bench import ttft

    def rows(mode, *prefills, tokens=8192):
        names = {"model": "Llama-3.1-8B", "tokens": tokens, "mode": mode}
        return [names | {"prefill": prefill} for prefill in prefills]

    path = tmp_path / "ttft.json"
    ttft.add_to(path, {"device": "one", "commit": "a"}, rows("eager", "full", "claa"))
    ttft.add_to(path, {"device": "one", "commit": "a"}, rows("eager", "full", tokens=100))
    new = rows("eager", "full", "peak") + rows("graph", "full")
    ttft.add_to(path, {"device": "two", "commit": "b"}, new)
    report = json.loads(path.read_text())
    assert report["machine"] == {"device": "two", "commit": "b"}
    found = [(row["commit"], row["tokens"], row["mode"], row["prefill"]) for row in report["rows"]]
    assert found == [
        ("a", 100, "eager", "full"),
        ("b", 8192, "eager", "full"),
        ("b", 8192, "eager", "peak"),
        ("b", 8192, "graph", "full"),
    ]


def test_prefills_run_there_and_back_and_the_longest_once():
    pytest.importorskip("transformers")
    from bench import ttft

    assert ttft.turns(["a", "b"], 32_768) == ["a", "b", "b", "a"] * 2
    assert ttft.turns(["a", "b"], 131_072) == ["a", "b"]
