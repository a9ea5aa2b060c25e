"""Files of benchmark results: one case per line, numbers as exact as a second run would show."""

import json
from pathlib import Path

import pytest

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
