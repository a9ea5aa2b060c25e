"""python -m bench.quality_report: tables and pictures of what bench.quality measured."""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench.quality import KEEPS, LAYERS, TABLE
from claa_ops.evaluate.intervals import Interval, bootstrap

Rows = list[dict[str, Any]]  # one for each prompt: its task, its tokens, its cells
Group = tuple[int, str]  # length and kind of the prompts
FULL = "full|None|None"
_DRAWN = dict(
    zip(
        TABLE,
        zip(
            ("#e69f00", "#0072b2", "#56b4e9", "#999999", "#cc79a7", "#d55e00", "#009e73"),
            "sodv^*P",
            strict=True,
        ),
        strict=True,
    )
)  # Okabe and Ito's colours; the markers differ as well


def values(rows: Rows, key: str, which: int) -> list[list[float]]:
    """One measure of a cell, prompt by prompt, a list for each task."""
    rows = having(rows, key)
    tasks = sorted({row["task"] for row in rows})
    return [[row["cells"][key][which] for row in rows if row["task"] == task] for task in tasks]


def having(rows: Rows, *keys: str) -> Rows:
    """The prompts on which these cells were run."""
    return [row for row in rows if all(key in row["cells"] for key in keys)]


def accuracy(rows: Rows, key: str) -> Interval:
    """Mean accuracy over tasks, with its interval."""
    return bootstrap(values(rows, key, 0))


def lost(rows: Rows, key: str, baseline: str = FULL) -> Interval:
    """Accuracy less that of the baseline, paired prompt by prompt."""
    rows = having(rows, key)
    pairs = zip(values(rows, key, 0), values(rows, baseline, 0), strict=True)
    return bootstrap([[a - b for a, b in zip(*pair, strict=True)] for pair in pairs])


def work(rows: Rows, key: str) -> float:
    """Mean share of full prefill's work; of the oracle's, without that of its answer."""
    key = key.replace("oracle|", "fastkv|")
    return float(np.mean([row["cells"][key][3] for row in having(rows, key)]))


def keeps_share(rows: Rows, key: str, share: float) -> bool:
    """Whether a cell reaches a share of full prefill's accuracy on the same prompts."""
    rows = having(rows, key)
    right, full = (sum(map(np.mean, values(rows, each, 0))) for each in (key, FULL))
    return bool(right >= share * full)


def recall(rows: Rows, key: str) -> float:
    """Mean share of the fact's tokens that reached the last layer."""
    return float(np.mean([row["cells"][key][2] for row in having(rows, key)]))


def swing(rows: Rows, label: str, keep: float, which: int = 2) -> Interval:
    """Mean change of a measure's mean, here the needle recall, from a layer to the next.

    The interval resamples prompts; the layers stay.
    """
    keys = [f"{label}|{layer}|{keep}" for layer in LAYERS]
    table = np.array([[row["cells"][key][which] for key in keys] for row in having(rows, *keys)])
    draw = np.random.default_rng(0)
    means = np.stack(
        [table[draw.integers(len(table), size=len(table))].mean(0) for _ in range(2000)]
    )
    swings = np.abs(np.diff(means, axis=1)).mean(1)
    low, high = np.quantile(swings, [0.025, 0.975])
    return Interval(float(np.abs(np.diff(table.mean(0))).mean()), float(low), float(high))


def shown(interval: Interval, signed: bool = False) -> str:
    """An interval as the tables show it."""
    form = "{:+.3f} [{:+.3f}, {:+.3f}]" if signed else "{:.3f} [{:.3f}, {:.3f}]"
    return form.format(interval.mean, interval.low, interval.high)


def read(files: list[Path]) -> dict[tuple[int, str], Rows]:
    """The prompts of each length and kind; those of an unfinished batch lack some cells."""
    batches: dict[str, dict] = {}
    for file in files:
        for line in map(json.loads, file.open()):
            if "cell" in line:
                batches[line["batch"]]["cells"][line["cell"]] = line["rows"]
            else:
                batches[line["batch"]] = {**line, "cells": {}}
    groups: dict[tuple[int, str], list[dict]] = {}
    for batch in batches.values():
        groups.setdefault((batch["length"], batch["kind"]), []).append(batch)
    return {
        group: [
            {
                "task": task,
                "tokens": batch["tokens"][row],
                "cells": {key: rows[row] for key, rows in batch["cells"].items()},
            }
            for batch in members
            for row, task in enumerate(batch["tasks"])
        ]
        for group, members in groups.items()
    }


def main() -> None:
    """Print the tables, draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="what bench.quality wrote")
    parser.add_argument("--pictures", type=Path, help="a folder")
    arguments = parser.parse_args()
    groups = read(arguments.files)
    for group, rows in groups.items():
        print_tables(group, rows)
    if arguments.pictures:
        whole = {group: rows for group, rows in groups.items() if columns_of(rows, 0.1)}
        plot_frontier(whole, arguments.pictures / "quality-frontier.png")
        plot_layers(whole, arguments.pictures / "quality-layers.png")


def columns_of(rows: Rows, keep: float) -> list[str]:
    """The columns of the table that were run at this rate, at all layers."""
    return [
        label for label in TABLE if having(rows, *(f"{label}|{layer}|{keep}" for layer in LAYERS))
    ]


def print_tables(group: Group, rows: Rows) -> None:
    """All tables of a group, in Markdown."""
    keys = list(max((row["cells"] for row in rows), key=len))
    tokens = [row["tokens"] for row in rows]
    print(f"\n## {_title(group, rows)} ({min(tokens)} to {max(tokens)})\n")
    tasks = {row["task"]: [other for other in rows if other["task"] == row["task"]] for row in rows}
    each = ", ".join(
        f"{task} {accuracy(its, FULL).mean:.2f}" for task, its in sorted(tasks.items())
    )
    print(f"Full prefill: {shown(accuracy(rows, FULL))}; {each}")
    for keep in KEEPS:
        if columns := columns_of(rows, keep):
            print_layers(rows, columns, keep)
    print("\n### The cheapest cells that reach a share of full prefill's accuracy\n")
    print("| share | method | layer | keep | work | accuracy | less full |")
    print("|---|---|---|---|---|---|---|")
    for share, label in product((0.99, 0.95), dict.fromkeys(key.split("|")[0] for key in keys)):
        good = [
            key for key in keys if key.startswith(f"{label}|") and keeps_share(rows, key, share)
        ]
        if good:
            cell = _cell(rows, min(good, key=lambda key: work(rows, key)))
            print(f"| {share:.0%} {cell}")
    print("\n### Other cells\n")
    print("| method | layer | keep | work | accuracy | less full | recall |")
    print("|---|---|---|---|---|---|---|")
    for key in keys:
        if key.split("|")[0] not in TABLE:
            print(f"{_cell(rows, key)} {recall(rows, key):.2f} |")


def print_layers(rows: Rows, columns: list[str], keep: float) -> None:
    """Every layer of the table's methods at one rate, and how much they swing."""
    rows = having(rows, *(f"{column}|{layer}|{keep}" for column in columns for layer in LAYERS))
    print(f"\n### Accuracy (needle recall), {keep:.0%} of the tokens go on, {len(rows)} prompts\n")
    print(f"Full prefill on these: {accuracy(rows, FULL).mean:.2f}\n")
    print("| layer | work | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for layer in LAYERS:
        keys = [f"{column}|{layer}|{keep}" for column in columns]
        means = [np.mean([np.mean(task) for task in values(rows, key, 0)]) for key in keys]
        cells = [
            f"{mean:.2f} ({recall(rows, key):.2f})" for mean, key in zip(means, keys, strict=True)
        ]
        print(f"| {layer} | {work(rows, keys[0]):.2f} | " + " | ".join(cells) + " |")
    print(
        f"\n| {keep:.0%}: mean change from a layer to the next | recall | accuracy |\n|---|---|---|"
    )
    for column in columns:
        changes = [shown(swing(rows, column, keep, which)) for which in (2, 0)]
        print(f"| {column} | " + " | ".join(changes) + " |")


def _cell(rows: Rows, key: str) -> str:
    """One cell as a row of a table."""
    label, layer, keep = key.split("|")
    right, less = accuracy(rows, key), lost(rows, key)
    return (
        f"| {label} | {layer} | {keep} | {work(rows, key):.3f} | {shown(right)} "
        f"| {shown(less, signed=True)} |"
    )


def _title(group: Group, rows: Rows) -> str:
    length, kind = group
    return f"{length} tokens, {kind}: {len(rows)} prompts"


def plot_frontier(groups: dict[Group, Rows], file: Path) -> None:
    """Draw accuracy against work, a panel for each length and a point for each cell."""
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(groups), sharey=True))
    for axes, (group, rows) in zip(panels, groups.items(), strict=True):
        full = accuracy(rows, FULL).mean
        axes.axhline(full, color="#666666", linestyle="--", linewidth=1)
        axes.annotate(
            "full prefill",
            (0.2, full),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=8,
            color="#444444",
        )
        for label in columns_of(rows, 0.1):
            cells = [
                (work(rows, key), accuracy(rows, key))
                for key in dict.fromkeys(key for row in rows for key in row["cells"])
                if key.split("|")[0] == label
            ]
            cells.sort(key=lambda cell: cell[0])
            best = [
                cell
                for place, cell in enumerate(cells)
                if all(cell[1].mean > cheaper[1].mean for cheaper in cells[:place])
            ]
            axes.plot(
                [x for x, _ in cells],
                [y.mean for _, y in cells],
                _DRAWN[label][1],
                color=_DRAWN[label][0],
                markersize=2.5,
                alpha=0.35,
            )
            axes.errorbar(
                [x for x, _ in best],
                [y.mean for _, y in best],
                yerr=np.array([[y.mean - y.low, y.high - y.mean] for _, y in best]).T,
                marker=_DRAWN[label][1],
                markersize=5,
                color=_DRAWN[label][0],
                linewidth=1.4,
                elinewidth=0.7,
                capsize=1.5,
                label=label,
            )
        staged = [
            key for key in rows[0]["cells"] if "peak, chosen" in key and "," in key.split("|")[1]
        ]
        axes.plot(
            [work(rows, key) for key in staged],
            [accuracy(rows, key).mean for key in staged],
            "D",
            markerfacecolor="none",
            color=_DRAWN["peak"][0],
            label="peak, staged",
        )
        axes.set_title(_title(group, rows), fontsize=10)
        axes.set_xlabel("work, share of full prefill's (linear layers)")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlim(0.18, 1.0)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy (mean of 3 needle tasks)")
    _legend(figure, panels[0])
    FigureCanvasAgg(figure).print_png(str(file))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)


def plot_layers(groups: dict[Group, Rows], file: Path, keep: float = 0.1) -> None:
    """Draw needle recall and accuracy by selection layer, with bands of 95 %."""
    figure = Figure(figsize=(10, 6.5), dpi=150, layout="constrained")
    panels = figure.subplots(2, len(groups), sharex=True, sharey=True, squeeze=False)
    for column, (group, rows) in enumerate(groups.items()):
        for axes, which, name in zip(
            panels[:, column], (2, 0), ("needle recall", "accuracy"), strict=True
        ):
            if which == 0:
                full = accuracy(rows, FULL).mean
                axes.axhline(full, color="#666666", linestyle="--", linewidth=1)
            for label in columns_of(rows, keep):
                found = [
                    bootstrap(values(rows, f"{label}|{layer}|{keep}", which)) for layer in LAYERS
                ]
                axes.plot(
                    LAYERS,
                    [f.mean for f in found],
                    marker=_DRAWN[label][1],
                    markersize=4,
                    color=_DRAWN[label][0],
                    linewidth=1.3,
                    label=label,
                )
                axes.fill_between(
                    LAYERS,
                    [f.low for f in found],
                    [f.high for f in found],
                    color=_DRAWN[label][0],
                    alpha=0.12,
                    linewidth=0,
                )
            axes.set_ylim(-0.02, 1.02)
            axes.grid(alpha=0.25)
            if column == 0:
                axes.set_ylabel(f"{name}, {keep:.0%} kept")
        panels[0, column].set_title(_title(group, rows), fontsize=10)
        panels[1, column].set_xlabel("selection layer")
    _legend(figure, panels[0, 0])
    FigureCanvasAgg(figure).print_png(str(file))


if __name__ == "__main__":
    main()
