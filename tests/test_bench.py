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


@torch.no_grad()
def test_norms_and_mlps_of_all_layers_are_two_graphs():
    pytest.importorskip("transformers")
    from bench import shapes, ttft

    model, graphs = shapes.build("Llama-3.1-8B", ["cpu"], **TINY), []
    ids = torch.randint(1, 1000, (1, 80))
    expected = model(ids).logits

    def count(graph, example):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        compile_ = torch.nn.Module.compile
        patch.setattr(
            torch.nn.Module, "compile", lambda self, **how: compile_(self, backend=count, **how)
        )
        with ttft.compiled_parts(model):
            assert torch.equal(model(ids).logits, expected) and len(graphs) == 2
    assert torch.equal(model(ids).logits, expected) and len(graphs) == 2


def test_the_operations_of_a_selection_after_layer_3():
    """Of Llama-3.1-8B at 8k, 32k and 128k, 10 % kept: after the layer, and within it."""
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    from bench import shapes, ttft

    family, sizes = shapes.MODELS["Llama-3.1-8B"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    expected = {8192: (0.202, 0.177), 32_768: (0.182, 0.157), 131_072: (0.156, 0.129)}
    for tokens, shares in expected.items():
        kept = torch.linspace(0, tokens - 1, tokens // 10).long()[None]
        full = ttft.count_work(model, [tokens] * 32)
        seen = [tokens] * 4 + [tokens // 10] * 28
        for within, share in zip(({}, {3: kept}), shares, strict=True):
            work = ttft.count_work(model, seen, within=within)
            found = ttft.work_of_layers(work) / ttft.work_of_layers(full)
            assert found == pytest.approx(share, abs=1e-3)


def test_tasks_are_evaluated_in_parts_and_told_as_one(checkpoint, tmp_path, monkeypatch):
    from bench import frontier

    (tmp_path / "text.txt").write_text("A sentence of a text that says little. " * 40)
    options = ["--model", checkpoint, "--device", "cpu", "--filler", str(tmp_path / "text.txt")]
    options += ["--method", "peak", "--layer", "0", "--keep", "0.3", "--lengths", "400"]
    out = tmp_path / "out"
    words = ["--task", "beyond-keys", "ruler-niah-single-2", "--jobs", "2", "--out", str(out)]
    argv = ["frontier", *words, "--", *options, "--prompts", "1"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as ended:
        frontier.main()
    assert ended.value.code == 0
    parts = [json.loads((out / part / "results.json").read_text()) for part in ("part-1", "part-2")]
    whole = json.loads((out / "results.json").read_text())
    assert {record["task"] for record in whole["records"]} == {"beyond-keys", "ruler-niah-single-2"}
    assert sorted(map(str, whole["records"])) == sorted(
        str(record) for part in parts for record in part["records"]
    )
