"""The two prefills side by side, for people and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from claa_ops.evaluate.compare.run import Comparison, Run
from claa_ops.evaluate.spec import plain_settings
from claa_ops.info import machine, versions


def as_table(report: Comparison, expected: str | None = None) -> RenderableType:
    """Lay the two runs side by side; `expected` is the right answer where it is known."""
    both = (report.full, report.pruned)
    name = type(report.method).__name__
    table = Table("", "full prefill", name, show_edge=False, pad_edge=False)
    table.add_row("answer", *(Text(run.answer) for run in both))
    if expected is not None:
        table.add_row(
            f"has {expected}", *("yes" if expected in run.answer else "NO" for run in both)
        )
    table.add_row("time to first token", *(_seconds(run.ttft_s) for run in both))
    table.add_row("each further token", *(_milliseconds(run.decode_s) for run in both))
    table.add_row("tokens kept", f"{report.prompt_tokens:,}", f"{report.kept.numel():,}")
    table.add_row("K/V cache", *(_mebibytes(run.kv_bytes) for run in both))
    table.add_row("peak memory of prefill", *(_mebibytes(run.peak_bytes) for run in both))
    measured = (
        "no result"
        if report.is_noise
        else f"{_ratio(report.ttft_ratio)} of full prefill, the median of neighbouring runs"
    )
    lines = [
        f"Time to first token: {measured}; "
        f"the operations left allow {_ratio(report.expected_ratio)}."
    ]
    if report.note:
        lines.append(f"Note: {report.note}.")
    place = _place(report)
    header = [
        str(report.method),
        "{dtype} on {device} ({name}), {threads} CPU threads".format(**place),
    ]
    return Group(Text("\n".join(header) + "\n"), table, Text("\n" + "\n".join(lines)))


def to_json(
    report: Comparison, settings: Mapping[str, Any], expected: str | None
) -> dict[str, Any]:
    """Return everything measured, with the settings and versions it was measured with.

    A ratio of times that cannot be is null; the note says why.
    """
    return {
        "settings": dict(settings),
        "method": {"name": type(report.method).__name__} | plain_settings(report.method),
        "machine": _place(report),
        "versions": versions(),
        "prompt_tokens": report.prompt_tokens,
        "kept_tokens": report.kept.numel(),
        "selection_layers": report.selections,
        "full": _run_json(report.full, expected),
        "pruned": _run_json(report.pruned, expected),
        "ttft_ratio": None if report.is_noise else report.ttft_ratio,
        "expected_ttft_ratio": report.expected_ratio,
        "note": report.note,
    }


def _place(report: Comparison) -> dict[str, Any]:
    """What it was measured on, and in which numbers."""
    return machine(report.device) | {"dtype": str(report.dtype).removeprefix("torch.")}


def _run_json(run: Run, expected: str | None) -> dict[str, Any]:
    return {
        "answer": run.answer,
        "answer_is_right": None if expected is None else expected in run.answer,
        "new_tokens": run.new_tokens,
        "ttft_s": run.median_ttft_s,
        "ttft_runs_s": run.ttft_s,
        "decode_s_per_token": run.decode_s,
        "kv_bytes": run.kv_bytes,
        "peak_bytes": run.peak_bytes,
    }


def _seconds(times: list[float]) -> str:
    middle = statistics.median(times)
    return f"{middle:.3f} s [{min(times):.3f} to {max(times):.3f}]"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"


def _mebibytes(amount: int | None) -> str:
    return "not measured here" if amount is None else f"{amount / 2**20:,.1f} MiB"


def _ratio(value: float) -> str:
    return f"{value:.3f} ({1 / value:.2f}x as fast)"
