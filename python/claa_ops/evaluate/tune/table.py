"""The table that justifies a choice, from what was saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_SHOWN = 10  # problems below a table


def tuned_table(facts: Mapping[str, Any]) -> RenderableType:
    """A row for each setting that was tried, the cheapest first, and what was chosen."""
    tasks = {task: full for task, full in facts["tasks"].items() if full["counts"]}
    table = Table(
        "method", "layer", "keep", "work", "score", "at least", "each", "right", "prompts",
        *(task.removeprefix("beyond-").removeprefix("ruler-") for task in tasks),
        show_edge=False, pad_edge=False,
    )  # fmt: skip
    full = (f"{task['full']:.2f}" for task in tasks.values())
    most = sum(task["prompts"] for task in tasks.values())
    table.add_row("full", "-", "-", "1.00", "1.00", "1.00", "", str(most), *full)
    for row in facts["table"]:
        shares = (row["tasks"].get(task) for task in tasks)
        table.add_row(
            row["label"], _text(row["layer"]), _text(row["keep"]), f"{row['work']:.2f}",
            *(_share(row[name]) for name in ("ratio", "low", "worst_low", "right")),
            str(row["prompts"]),
            *map(_share, shares),
            style="bold" if row == facts["chosen"] else "",
        )  # fmt: skip
    lines = [
        f"Prompts of {facts['length']:,} tokens. For full prefill the share of right answers, for "
        "the others shares of full prefill's score; at least: with 90 % confidence; right: of "
        "right answers alone."
    ]
    weak = [task for task, full in facts["tasks"].items() if not full["counts"]]
    if weak:
        lines.append(f"Left out, since full prefill itself fails there: {', '.join(weak)}.")
    lines += [f"left out: {problem}" for problem in facts["problems"][:_SHOWN]]
    return Group(table, Text("\n" + "\n".join(lines)))


def _text(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _share(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"
