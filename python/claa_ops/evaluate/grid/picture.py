"""Accuracy against work, and accuracy of needles by depth and length, as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from claa_ops.evaluate.grid.cells import Cell
from claa_ops.evaluate.grid.records import Record
from claa_ops.evaluate.grid.table import Row

# Okabe and Ito's colours, which eyes of all kinds tell apart; the markers differ as well.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "osD^vPX<>p*h"
_FULL = "#666666"
_LEGEND_COLUMNS = 3


def plot_frontier(rows: Sequence[Row], file: Path) -> None:
    """Draw accuracy with 95 % intervals against work, and beside it against measured time.

    Each cell is a point, each method a colour. A line joins those cells of a method that none of
    its cheaper cells equals. Methods that cost the same stand side by side.

    Args:
        rows: of one model.
        file: where to write the .png picture.
    """
    rows = [row for row in rows if row.is_total]
    labels = list(dict.fromkeys(row.label for row in rows if row.label != "full"))
    height = 4.9 + 0.2 * -(-(1 + len(labels)) // _LEGEND_COLUMNS)
    figure = Figure(figsize=(13, height), dpi=150, layout="constrained")
    by_work, by_time = figure.subplots(1, 2, sharey=True)
    _plot_costs(by_work, rows, labels, lambda row: row.work)
    by_work.set_xlabel("work of prefill, share of full prefill's (linear layers)")
    _plot_costs(by_time, rows, labels, lambda row: row.time)
    by_time.set_xlabel("seconds of prefill, share of full prefill's (median)")
    over = rows[0].groups
    by_work.set_ylabel("accuracy" if over == 1 else f"accuracy (mean of {over} tasks and lengths)")
    by_work.set_ylim(-0.03, 1.03)
    prompts = max(row.prompts for row in rows)
    by_work.set_title(f"{prompts:,} prompts, bars: 95 % intervals", loc="left", fontsize=10)
    handles, names = by_work.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=_LEGEND_COLUMNS, fontsize=9, frameon=False
    )
    FigureCanvasAgg(figure).print_figure(file)


def _plot_costs(
    axes: Axes, rows: Sequence[Row], labels: Sequence[str], cost: Callable[[Row], float]
) -> None:
    """Draw all cells over what they cost, as a share of full prefill's."""
    for index, label in enumerate(labels):
        points = sorted((row for row in rows if row.label == label), key=cost)
        colour = _COLOURS[index % len(_COLOURS)]
        # Side by side, so that each bar can be seen; but many methods do not reach further aside.
        aside = min(0.004, 0.024 / len(labels)) * (index - (len(labels) - 1) / 2)
        axes.errorbar(
            [cost(row) + aside for row in points],
            [row.accuracy.mean for row in points],
            yerr=np.array([_arms(row) for row in points]).T,
            linestyle="none",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=6,
            color=colour,
            elinewidth=0.8,
            capsize=2,
            alpha=0.85,
            label=label,
        )
        best = [
            row
            for place, row in enumerate(points)
            if all(row.accuracy.mean > cheaper.accuracy.mean for cheaper in points[:place])
        ]
        axes.plot(
            [cost(row) + aside for row in best],
            [row.accuracy.mean for row in best],
            color=colour,
            linewidth=1.2,
        )
    for row in rows:
        if row.label == "full":
            axes.axhline(row.accuracy.mean, color=_FULL, linestyle="--", linewidth=1)
            axes.plot(
                [cost(row)],
                [row.accuracy.mean],
                marker="*",
                markersize=13,
                color=_FULL,
                linestyle="none",
                label="full prefill",
                clip_on=False,
                zorder=3,
            )
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlim(left=0, right=max(1.02, *(1.02 * cost(row) for row in rows)))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


_PANELS = 12  # as many as can be read on one picture


def plot_needles(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw accuracy by the depth of the needle and the length of the prompt, a panel per cell.

    Args:
        records: of one model; those of tasks other than needles are left out.
        folder: where ``needles.png`` goes, and ``needles-2.png`` and so on if there are more
            than 12 cells.

    Returns:
        The pictures: none if no needle had two lengths or two depths.
    """
    cells: dict[Cell, list[Record]] = {}
    for record in records:
        if "depth" in record.place:
            cells.setdefault(record.cell, []).append(record)
    lengths = sorted({record.place["length"] for here in cells.values() for record in here})
    depths = sorted({record.place["depth"] for here in cells.values() for record in here})
    if len(lengths) * len(depths) < 2:
        return []
    files = []
    every = list(cells.items())
    for first in range(0, len(every), _PANELS):
        file = folder / (f"needles-{first // _PANELS + 1}.png" if first else "needles.png")
        _plot_panels(every[first : first + _PANELS], lengths, depths, file)
        files.append(file)
    return files


def _plot_panels(
    cells: Sequence[tuple[Cell, Sequence[Record]]],
    lengths: Sequence[float],
    depths: Sequence[float],
    file: Path,
) -> None:
    columns = min(4, len(cells))
    lines = -(-len(cells) // columns)
    size = (1.6 + 2.2 * columns, 1.1 + 2.2 * lines)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(cells) :]:
        panel.set_visible(False)
    for panel, (cell, answered) in zip(panels.flat, cells, strict=False):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for row, depth in enumerate(depths):
            for column, length in enumerate(lengths):
                here = [
                    record.score
                    for record in answered
                    if (record.place["depth"], record.place["length"]) == (depth, length)
                ]
                if here:
                    grid[row, column] = np.mean(here)
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                shade = "black" if value > 0.6 else "white"
                panel.text(
                    column, row, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=7
                )
        panel.set_title(_title(cell), fontsize=8)
        panel.set_xticks(range(len(lengths)), [f"{length:,.0f}" for length in lengths], fontsize=7)
        panel.set_yticks(
            range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=7
        )
    figure.supxlabel("tokens of the prompt", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=panels, label="accuracy", pad=0.02)
    FigureCanvasAgg(figure).print_figure(file)


def _title(cell: Cell) -> str:
    if cell.layer is None and cell.keep is None:
        return cell.label
    parts = [f"layer {cell.layer}"] * (cell.layer is not None)
    parts += [f"keep {cell.keep}"] * (cell.keep is not None)
    return f"{cell.label}\n{', '.join(parts)}"


def _arms(row: Row) -> tuple[float, float]:
    """How far the interval reaches below and above the mean."""
    accuracy = row.accuracy
    if accuracy.low is None or accuracy.high is None:
        return 0.0, 0.0
    return accuracy.mean - accuracy.low, accuracy.high - accuracy.mean
