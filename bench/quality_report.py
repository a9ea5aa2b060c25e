"""python -m bench.quality_report: tables and pictures of what bench.quality measured."""

import argparse
import gzip
import json
from collections.abc import Iterable
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
Group = tuple[int, str, int]  # length, kind and seed of the prompts
FULL = "full|None|None"
RIGHT, RECALL, WORK, BYTES = range(4)  # what a cell has of a prompt
_DRAWN = dict(
    zip(
        TABLE,
        zip(
            ("#e69f00", "#999999", "#0072b2", "#56b4e9", "#cc79a7", "#d55e00", "#009e73"),
            "svodX*P",
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
    return bootstrap(values(rows, key, RIGHT))


def lost(rows: Rows, key: str) -> Interval:
    """Accuracy less that of full prefill, paired prompt by prompt."""
    rows = having(rows, key)
    pairs = zip(values(rows, key, RIGHT), values(rows, FULL, RIGHT), strict=True)
    return bootstrap([[a - b for a, b in zip(*pair, strict=True)] for pair in pairs])


def mean(rows: Rows, key: str, which: int) -> float:
    """The mean of a measure over tasks."""
    return float(np.mean([np.mean(task) for task in values(rows, key, which)]))


def whole_facts(rows: Rows, key: str) -> float:
    """The share of prompts whose whole fact went on, the mean over tasks."""
    return float(np.mean([np.mean(np.array(task) == 1) for task in values(rows, key, RECALL)]))


def work(rows: Rows, key: str) -> float:
    """Mean share of full prefill's work; of the oracle's, without that of its answer."""
    return mean(rows, key.replace("oracle|", "fastkv|"), WORK)


def cached(rows: Rows, key: str) -> float:
    """Bytes of all caches after the prefill, as a share of full prefill's."""
    return mean(rows, key, BYTES) / mean(having(rows, key), FULL, BYTES)


def share_of_full(rows: Rows, key: str) -> float:
    """Accuracy as a share of full prefill's on the same prompts."""
    return mean(rows, key, RIGHT) / mean(having(rows, key), FULL, RIGHT)


def swing(rows: Rows, label: str, keep: float, which: int = RECALL) -> Interval:
    """Mean change of a measure's mean, here the needle recall, from a layer to the next.

    The interval resamples prompts; the layers stay.
    """
    keys = cells_of(rows, label, keep)
    table = np.array([[row["cells"][key][which] for key in keys] for row in rows])
    draw = np.random.default_rng(0)
    means = np.stack(
        [table[draw.integers(len(table), size=len(table))].mean(0) for _ in range(2000)]
    )
    swings = np.abs(np.diff(means, axis=1)).mean(1)
    low, high = np.quantile(swings, [0.025, 0.975])
    return Interval(float(np.abs(np.diff(table.mean(0))).mean()), float(low), float(high))


def cells_of(rows: Rows, label: str, keep: float) -> list[str]:
    """The cells of a column of the table at one rate, by layer, that were run on all prompts."""
    keys = (f"{label}|{layer}|{keep}" for layer in LAYERS)
    return [key for key in keys if len(having(rows, key)) == len(rows)]


def layer_of(key: str) -> str:
    """The selection layer of a cell."""
    return key.split("|")[1]


def shown(interval: Interval, signed: bool = False) -> str:
    """An interval as the tables show it."""
    form = "{:+.3f} [{:+.3f}, {:+.3f}]" if signed else "{:.3f} [{:.3f}, {:.3f}]"
    return form.format(interval.mean, interval.low, interval.high)


def read(files: list[Path]) -> dict[Group, Rows]:
    """The prompts of each group; those of an unfinished batch lack some cells."""
    batches: dict[str, dict[str, Any]] = {}
    for line in lines(files):
        if "cell" in line:
            batches[line["batch"]]["cells"][line["cell"]] = line
        else:
            batches.setdefault(line["batch"], {**line, "cells": {}})
    groups: dict[Group, Rows] = {}
    for batch in batches.values():
        group = batch["length"], batch["kind"], batch["seed"]
        groups.setdefault(group, []).extend(
            {
                "task": task,
                "tokens": tokens,
                "cells": {
                    key: (
                        cell["right"][row],
                        cell["found"][row] / fact,
                        cell["work"],
                        cell["bytes"],
                    )
                    for key, cell in batch["cells"].items()
                },
            }
            for row, (task, tokens, fact) in enumerate(
                zip(batch["tasks"], batch["tokens"], batch["facts"], strict=True)
            )
        )
    return groups


def lines(files: list[Path]) -> Iterable[dict[str, Any]]:
    """What bench.quality wrote, compressed or not."""
    for path in files:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            yield from map(json.loads, file)


def main() -> None:
    """Print the tables, draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="what bench.quality wrote")
    parser.add_argument("--pictures", type=Path, help="a folder")
    arguments = parser.parse_args()
    groups = read(arguments.files)
    whole = {group: rows for group, rows in groups.items() if columns_of(rows)}
    print("# Tables of docs/quality.md\n\nWritten by `python -m bench.quality_report`.")
    if scheduled := {group: rows for group, rows in groups.items() if schedules(rows)}:
        print_schedules(scheduled)
    for group, rows in whole.items():
        print_group(group, rows)
    for group, rows in groups.items():
        if others := [key for key in keys_of(rows) if is_other(key)]:
            print_others(group, rows, others)
    if arguments.pictures:
        plot_frontier(whole, arguments.pictures / "quality-frontier.png")
        plot_layers(whole, arguments.pictures / "quality-layers.png")


def columns_of(rows: Rows) -> list[str]:
    """The columns of the table that were run."""
    return [label for label in TABLE if any(cells_of(rows, label, keep) for keep in KEEPS)]


def print_table(header: Iterable[str], body: Iterable[Iterable[str]]) -> None:
    """A table in Markdown."""
    titles = list(header)
    print()
    for line in (titles, ["---"] * len(titles), *body):
        print("| " + " | ".join(line) + " |")


def print_schedules(groups: dict[Group, Rows]) -> None:
    """The schedules under test, in every set of prompts."""
    print("\n## Schedules")
    keys = list(dict.fromkeys(key for rows in groups.values() for key in schedules(rows)))
    titles = [_title(*item) for item in groups.items()]

    def cells(key: str, signed: bool) -> Iterable[str]:
        measure = lost if signed else accuracy
        for rows in groups.values():
            yield shown(measure(rows, key), signed) if having(rows, key) else "-"

    def share(key: str) -> str:
        everybody = [row for rows in groups.values() for row in rows]
        return f"{work(everybody, key):.2f}"

    body = ([_schedule(key), share(key), *cells(key, signed=False)] for key in (FULL, *keys))
    print_table(["accuracy", "work", *titles], body)
    body = ([_schedule(key), *cells(key, signed=True)] for key in keys)
    print_table(["less full prefill, paired", *titles], body)


def keys_of(rows: Rows) -> list[str]:
    """The cells that were run on any of the prompts."""
    return list(dict.fromkeys(key for row in rows for key in row["cells"]))


def schedules(rows: Rows) -> list[str]:
    """The cells of schedules chosen beforehand."""
    return [key for key in keys_of(rows) if ", chosen|" in key]


def is_other(key: str) -> bool:
    """Whether a cell is neither full prefill's, nor of the tables, nor a chosen schedule."""
    return key.split("|")[0] not in ("full", *TABLE) and ", chosen|" not in key


def _schedule(key: str) -> str:
    label, layers, keeps = key.split("|")
    if key == FULL:
        return "full prefill"
    stages = zip(layers.split(","), keeps.split(","), strict=True)
    parts = (f"layer {layer}: {percent(float(keep))}" for layer, keep in stages)
    return f"{label.removesuffix(', chosen')}, " + ", then ".join(parts)


def print_group(group: Group, rows: Rows) -> None:
    """All tables of a group."""
    tokens = [row["tokens"] for row in rows]
    print(f"\n## {_title(group, rows)}\n\nThey have {min(tokens)} to {max(tokens)} tokens.", end="")
    tasks = {row["task"]: [other for other in rows if other["task"] == row["task"]] for row in rows}
    each = ", ".join(f"{task} {mean(its, FULL, RIGHT):.2f}" for task, its in sorted(tasks.items()))
    print(f" Accuracy of full prefill: {shown(accuracy(rows, FULL))}; {each}.")
    columns = columns_of(rows)
    for share in (0.99, 0.95):
        print(f"\n### The least work for {percent(share)} of full prefill's accuracy")
        print_table(
            ["", *(f"{percent(keep)} go on" for keep in KEEPS)],
            (
                [label, *(_cheapest(rows, label, keep, share) for keep in KEEPS)]
                for label in columns
            ),
        )
    rates = " / ".join(f"{100 * keep:.0f}" for keep in KEEPS)
    for name, which in (("Accuracy", RIGHT), ("Needle recall", RECALL)):
        print(f"\n### {name}; {rates} % of the tokens go on")
        print_table(
            ["layer", "work", *columns],
            (
                [str(layer), _rates(rows, "fastkv", layer, WORK)]
                + [_rates(rows, label, layer, which) for label in columns]
                for layer in LAYERS
            ),
        )
    for keep in KEEPS:
        print(f"\n### Accuracy less full prefill's, paired; {percent(keep)} go on")
        print_table(
            ["layer", *columns],
            (
                [str(layer), *(_loss(rows, label, layer, keep) for label in columns)]
                for layer in LAYERS
            ),
        )
    for name, which in (("needle recall", RECALL), ("accuracy", RIGHT)):
        print(f"\n### Stability: mean change of the {name} from a layer to the next")
        print_table(
            ["", *(f"{percent(keep)} go on" for keep in KEEPS)],
            ([label, *(shown(swing(rows, label, k, which)) for k in KEEPS)] for label in columns),
        )


def print_others(group: Group, rows: Rows, keys: list[str]) -> None:
    """Cells outside the tables, one to a line."""
    print(f"\n## Other cells: {_title(group, rows)}")
    print(f"\nAccuracy of full prefill: {shown(accuracy(rows, FULL))}.")
    titles = ["layer", "keep", "work", "caches", "accuracy", "less full prefill"]
    titles += ["recall", "whole fact"]
    print_table(["", *titles], (_other(rows, key) for key in keys))


def _cheapest(rows: Rows, label: str, keep: float, share: float) -> str:
    keys = cells_of(rows, label, keep)
    good = [key for key in keys if share_of_full(rows, key) >= share]
    if not good:
        return "never"
    cheapest = min(good, key=lambda key: work(rows, key))
    return f"{work(rows, cheapest):.2f} (layer {layer_of(cheapest)})"


def _rates(rows: Rows, label: str, layer: int, which: int) -> str:
    """A measure at all rates, in the tables' short form: ".97 / 1 / 1"."""
    shorts = []
    for keep in KEEPS:
        key = f"{label}|{layer}|{keep}"
        if key not in cells_of(rows, label, keep):
            shorts.append("-")
        elif which == WORK:
            shorts.append(f"{work(rows, key):.2f}".removeprefix("0"))
        else:
            short = f"{mean(rows, key, which):.2f}".removeprefix("0")
            shorts.append(short.replace("1.00", "1"))
    return " / ".join(shorts)


def _loss(rows: Rows, label: str, layer: int, keep: float) -> str:
    key = f"{label}|{layer}|{keep}"
    return shown(lost(rows, key), signed=True) if key in cells_of(rows, label, keep) else "-"


def _other(rows: Rows, key: str) -> list[str]:
    """One cell as a row of a table."""
    label, layer, keep = key.split("|")
    return [
        label,
        layer.replace("None", ""),
        keep.replace("None", ""),
        f"{work(rows, key):.2f}",
        f"{cached(rows, key):.2f}",
        shown(accuracy(rows, key)),
        shown(lost(rows, key), signed=True),
        f"{mean(rows, key, RECALL):.2f}",
        f"{whole_facts(rows, key):.2f}",
    ]


def percent(share: float) -> str:
    """A share as the pages write it."""
    return f"{100 * share:.0f} %"


def _title(group: Group, rows: Rows) -> str:
    length, kind, seed = group
    named = {"prefixed": "", "bare": ", bare", "prefixed, folder": ", other text"}
    return f"{length} tokens{named.get(kind, f', {kind}')}, seed {seed}: {len(rows)} prompts"


def plot_frontier(groups: dict[Group, Rows], file: Path) -> None:
    """Draw accuracy against work, a panel for each length and a point for each cell."""
    figure = Figure(figsize=(10, 4.8), dpi=150, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(groups), sharey=True))
    for axes, (group, rows) in zip(panels, groups.items(), strict=True):
        _draw_full(axes, rows, 0.99)
        for label in columns_of(rows):
            cells = [
                (work(rows, key), accuracy(rows, key))
                for keep in KEEPS
                for key in cells_of(rows, label, keep)
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
                alpha=0.3,
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
        staged = [key for key in schedules(rows) if "peak" in key and "," in layer_of(key)]
        axes.plot(
            [work(rows, key) for key in staged],
            [mean(rows, key, RIGHT) for key in staged],
            "D",
            markerfacecolor="none",
            color=_DRAWN["peak"][0],
            label="peak, staged",
        )
        axes.set_title(f"{group[0]} tokens, {len(rows)} prompts", fontsize=10)
        axes.set_xlabel("work, share of full prefill's (linear layers)")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlim(0.18, 1.0)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy (mean of 3 needle tasks)")
    _legend(figure, panels[0])
    FigureCanvasAgg(figure).print_png(str(file))


def _draw_full(axes: Axes, rows: Rows, place: float) -> None:
    full = mean(rows, FULL, RIGHT)
    axes.axhline(full, color="#444444", linestyle="--", linewidth=1)
    axes.annotate(
        "full prefill",
        (place, full),
        xytext=(0, -16),
        textcoords="offset points",
        horizontalalignment="right",
        fontsize=8,
        color="#444444",
    )


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)


def plot_layers(groups: dict[Group, Rows], file: Path) -> None:
    """Draw needle recall at the lowest rate and accuracy at each, by layer, with 95 % bands."""
    figure = Figure(figsize=(10, 11), dpi=110, layout="constrained")
    measures = [(RECALL, KEEPS[0]), *((RIGHT, keep) for keep in KEEPS)]
    panels = figure.subplots(len(measures), len(groups), sharex=True, sharey=True, squeeze=False)
    for column, (group, rows) in enumerate(groups.items()):
        for axes, (which, keep) in zip(panels[:, column], measures, strict=True):
            if which == RIGHT:
                _draw_full(axes, rows, LAYERS[-1])
            for label in columns_of(rows):
                keys = cells_of(rows, label, keep)
                layers = [int(layer_of(key)) for key in keys]
                found = [bootstrap(values(rows, key, which)) for key in keys]
                axes.plot(
                    layers,
                    [f.mean for f in found],
                    marker=_DRAWN[label][1],
                    markersize=4,
                    color=_DRAWN[label][0],
                    linewidth=1.3,
                    label=label,
                )
                axes.fill_between(
                    layers,
                    [f.low for f in found],
                    [f.high for f in found],
                    color=_DRAWN[label][0],
                    alpha=0.12,
                    linewidth=0,
                )
            axes.set_ylim(-0.02, 1.02)
            axes.grid(alpha=0.25)
            if column == 0:
                name = "accuracy" if which == RIGHT else "needle recall"
                axes.set_ylabel(f"{name}, {percent(keep)} go on")
        panels[0, column].set_title(f"{group[0]} tokens, {len(rows)} prompts", fontsize=10)
        panels[-1, column].set_xlabel("selection layer")
    _legend(figure, panels[0, 0])
    FigureCanvasAgg(figure).print_png(str(file))


if __name__ == "__main__":
    main()
