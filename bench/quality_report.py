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
Group = tuple[int, str]  # length and kind of the prompts
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
    keys = cells_of(label, keep)
    table = np.array([[row["cells"][key][which] for key in keys] for row in having(rows, *keys)])
    draw = np.random.default_rng(0)
    means = np.stack(
        [table[draw.integers(len(table), size=len(table))].mean(0) for _ in range(2000)]
    )
    swings = np.abs(np.diff(means, axis=1)).mean(1)
    low, high = np.quantile(swings, [0.025, 0.975])
    return Interval(float(np.abs(np.diff(table.mean(0))).mean()), float(low), float(high))


def cells_of(label: str, keep: float) -> list[str]:
    """The cells of a column of the table at one rate, by layer."""
    return [f"{label}|{layer}|{keep}" for layer in LAYERS]


def shown(interval: Interval, signed: bool = False) -> str:
    """An interval as the tables show it."""
    form = "{:+.3f} [{:+.3f}, {:+.3f}]" if signed else "{:.3f} [{:.3f}, {:.3f}]"
    return form.format(interval.mean, interval.low, interval.high)


def read(files: list[Path]) -> dict[Group, Rows]:
    """The prompts of each length and kind; those of an unfinished batch lack some cells."""
    batches: dict[str, dict[str, Any]] = {}
    for line in lines(files):
        if "cell" in line:
            batches[line["batch"]]["cells"][line["cell"]] = line
        else:
            batches[line["batch"]] = {**line, "cells": {}}
    groups: dict[Group, Rows] = {}
    for batch in batches.values():
        groups.setdefault((batch["length"], batch["kind"]), []).extend(
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
    print_schedules(groups)
    for group, rows in whole.items():
        print_group(group, rows)
    if arguments.pictures:
        plot_frontier(whole, arguments.pictures / "quality-frontier.png")
        plot_layers(whole, arguments.pictures / "quality-layers.png")


def columns_of(rows: Rows) -> list[str]:
    """The columns of the table that were run at all layers and rates."""
    return [
        label
        for label in TABLE
        if having(rows, *(key for keep in KEEPS for key in cells_of(label, keep)))
    ]


def print_table(header: Iterable[str], body: Iterable[Iterable[str]]) -> None:
    """A table in Markdown."""
    titles = list(header)
    print()
    for line in (titles, ["---"] * len(titles), *body):
        print("| " + " | ".join(line) + " |")


def print_schedules(groups: dict[Group, Rows]) -> None:
    """The schedules under test, in every set of prompts."""
    print("\n## Schedules fixed beforehand")
    keys = [FULL]
    for rows in groups.values():
        keys += [key for key in rows[0]["cells"] if "chosen|" in key and key not in keys]
    for title, show in (
        ("accuracy", lambda rows, key: shown(accuracy(rows, key))),
        ("less full prefill, paired", lambda rows, key: shown(lost(rows, key), signed=True)),
    ):
        print_table(
            [title, "work", *(_title(*item) for item in groups.items())],
            (
                [_schedule(key), f"{work(next(iter(groups.values())), key):.2f}"]
                + [show(rows, key) for rows in groups.values()]
                for key in keys
                if title == "accuracy" or key != FULL
            ),
        )


def _schedule(key: str) -> str:
    label, layers, keeps = key.split("|")
    if key == FULL:
        return "full prefill"
    stages = zip(layers.split(","), keeps.split(","), strict=True)
    name = label.removesuffix(", chosen")
    return f"{name}, " + ", then ".join(f"layer {layer}: {float(k):.0%}" for layer, k in stages)


def print_group(group: Group, rows: Rows) -> None:
    """All tables of a group."""
    tokens = [row["tokens"] for row in rows]
    print(f"\n## {_title(group, rows)}\n\nThey have {min(tokens)} to {max(tokens)} tokens.", end="")
    tasks = {row["task"]: [other for other in rows if other["task"] == row["task"]] for row in rows}
    each = ", ".join(f"{task} {mean(its, FULL, RIGHT):.2f}" for task, its in sorted(tasks.items()))
    print(f" Accuracy of full prefill: {shown(accuracy(rows, FULL))}; {each}.")
    columns = columns_of(rows)
    for share in (0.99, 0.95):
        print(f"\n### The least work for {share:.0%} of full prefill's accuracy")
        print_table(
            ["", *(f"{keep:.0%} go on" for keep in KEEPS)],
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
        print(f"\n### Accuracy less full prefill's, paired; {keep:.0%} go on")
        print_table(
            ["layer", *columns],
            (
                [str(layer)]
                + [shown(lost(rows, f"{label}|{layer}|{keep}"), signed=True) for label in columns]
                for layer in LAYERS
            ),
        )
    for name, which in (("needle recall", RECALL), ("accuracy", RIGHT)):
        print(f"\n### Stability: mean change of the {name} from a layer to the next")
        print_table(
            ["", *(f"{keep:.0%} go on" for keep in KEEPS)],
            ([label, *(shown(swing(rows, label, k, which)) for k in KEEPS)] for label in columns),
        )
    print("\n### Other cells")
    titles = ["layer", "keep", "work", "caches", "accuracy", "less full prefill", "recall"]
    print_table(["", *titles], (_other(rows, key) for key in _others(rows)))


def _cheapest(rows: Rows, label: str, keep: float, share: float) -> str:
    good = [key for key in cells_of(label, keep) if share_of_full(rows, key) >= share]
    if not good:
        return "never"
    cheapest = min(good, key=lambda key: work(rows, key))
    return f"{work(rows, cheapest):.2f} (layer {cheapest.split('|')[1]})"


def _rates(rows: Rows, label: str, layer: int, which: int) -> str:
    """A measure at all rates, in the tables' short form: ".97 / 1 / 1"."""
    means = (mean(rows, f"{label}|{layer}|{keep}", which) for keep in KEEPS)
    return " / ".join(f"{m:.2f}".removeprefix("0").replace("1.00", "1") for m in means)


def _others(rows: Rows) -> Iterable[str]:
    keys = dict.fromkeys(key for row in rows for key in row["cells"])
    return (key for key in keys if key.split("|")[0] not in TABLE and "chosen|" not in key)


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
    ]


def _title(group: Group, rows: Rows) -> str:
    length, kind = group
    return f"{length} tokens, {kind}: {len(rows)} prompts"


def plot_frontier(groups: dict[Group, Rows], file: Path) -> None:
    """Draw accuracy against work, a panel for each length and a point for each cell."""
    figure = Figure(figsize=(10, 4.8), dpi=150, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(groups), sharey=True))
    for axes, (group, rows) in zip(panels, groups.items(), strict=True):
        _draw_full(axes, rows, 0.2)
        for label in columns_of(rows):
            cells = [
                (work(rows, key), accuracy(rows, key))
                for keep in KEEPS
                for key in cells_of(label, keep)
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
        staged = [
            key for key in rows[0]["cells"] if "peak, chosen" in key and "," in key.split("|")[1]
        ]
        axes.plot(
            [work(rows, key) for key in staged],
            [mean(rows, key, RIGHT) for key in staged],
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


def _draw_full(axes: Axes, rows: Rows, place: float) -> None:
    full = mean(rows, FULL, RIGHT)
    axes.axhline(full, color="#444444", linestyle="--", linewidth=1)
    axes.annotate(
        "full prefill",
        (place, full),
        xytext=(0, -11),
        textcoords="offset points",
        fontsize=8,
        color="#444444",
    )


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)


def plot_layers(groups: dict[Group, Rows], file: Path) -> None:
    """Draw needle recall at the lowest rate and accuracy at each, by layer, with 95 % bands."""
    figure = Figure(figsize=(10, 11), dpi=130, layout="constrained")
    measures = [(RECALL, KEEPS[0]), *((RIGHT, keep) for keep in KEEPS)]
    panels = figure.subplots(len(measures), len(groups), sharex=True, sharey=True, squeeze=False)
    for column, (group, rows) in enumerate(groups.items()):
        for axes, (which, keep) in zip(panels[:, column], measures, strict=True):
            if which == RIGHT:
                _draw_full(axes, rows, LAYERS[0])
            for label in columns_of(rows):
                found = [bootstrap(values(rows, key, which)) for key in cells_of(label, keep)]
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
                name = "accuracy" if which == RIGHT else "needle recall"
                axes.set_ylabel(f"{name}, {keep:.0%} go on")
        panels[0, column].set_title(_title(group, rows), fontsize=10)
        panels[-1, column].set_xlabel("selection layer")
    _legend(figure, panels[0, 0])
    FigureCanvasAgg(figure).print_png(str(file))


if __name__ == "__main__":
    main()
