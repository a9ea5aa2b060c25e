"""A heat map of methods by layers, and each measure over the layers."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from claa_ops.evaluate.intervals import Interval
from claa_ops.evaluate.oracle.measures import MEASURES
from claa_ops.evaluate.oracle.rank import Study

# Okabe and Ito's colours without yellow, which is too pale on white; black is for the oracle.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
_STYLES = [("black", "dashdot")]
_STYLES += [(colour, dash) for dash in ("solid", "dashed", "dotted") for colour in _COLOURS]
_MAPPED = ("answers", "overlap_pooled", "needle_recall")


def draw_heat_map(study: Study, file: Path) -> None:
    """Draw right answers, agreement with the pooled oracle and needle recall, by method and layer.

    A ring marks each method's best layer (`Study.best_layer`), if it has one. Recall is left out
    where no needle is known.
    """
    panels = [key for key in _MAPPED if study.is_known(key)]
    names = list(study.by_layer)
    best = [study.best_layer(name) for name in names]
    height = 0.9 + len(panels) * (0.6 + 0.26 * len(names))
    figure = Figure(figsize=(9, height), dpi=150, layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, key in zip(rows, panels, strict=True):
        grid = np.stack([_curves(study.by_layer[name][key])[0] for name in names])
        image = axes.imshow(
            grid, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0, vmax=1
        )
        axes.set_title(_title(study, key), loc="left", fontsize=10)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_ylabel("method")
        for row, layer in enumerate(best):
            if layer is not None:
                ring = {"facecolors": "none", "edgecolors": "#d55e00", "linewidths": 1.5}
                axes.scatter(study.layers.index(layer), row, s=60, **ring)
        figure.colorbar(image, ax=axes, pad=0.01)
    rows[-1].set_xticks(*_layer_ticks(study))
    rows[-1].set_xlabel(
        "layer whose ranking it is (ring: of those with the most right answers, the one that "
        "agrees best)"
    )
    FigureCanvasAgg(figure).print_figure(file)


def draw_measure(study: Study, key: str, file: Path) -> None:
    """Draw one measure over the layers, a line for each method, with 95 % bands over prompts.

    A method whose value must be 1 is left out: the oracle's agreement with itself, and the
    stability of a ranking that is the same at all layers.
    """
    figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, (name, values) in enumerate(study.by_layer.items()):
        mean, low, high = _curves(values[key])
        must_be_1 = key not in ("answers", "needle_recall")
        if np.isnan(mean).all() or (must_be_1 and np.allclose(mean[~np.isnan(mean)], 1)):
            continue
        colour, dash = _STYLES[index % len(_STYLES)]
        axes.plot(study.layers, mean, color=colour, linestyle=dash, label=name, marker=".")
        axes.fill_between(study.layers, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_title(_title(study, key), loc="left", fontsize=10)
    axes.set_xlabel("layer whose ranking it is")
    axes.set_ylabel(MEASURES[key])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(top=1.02)
    axes.grid(color="0.9")
    _legend(axes)
    FigureCanvasAgg(figure).print_figure(file)


def _curves(values: list[Interval | None]) -> np.ndarray:
    """Means, lower and upper ends, ``[3, L]``; NaN where there are none."""
    rows = [(None,) * 3 if value is None else astuple(value) for value in values]
    return np.array(rows, dtype=np.float64).T


def _legend(axes: Axes) -> None:
    """Name the lines beside the picture, the highest first."""
    lines = sorted(axes.get_lines(), key=lambda line: np.nansum(line.get_ydata()), reverse=True)
    axes.legend(
        handles=lines,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
        fontsize=9,
    )


def _title(study: Study, key: str) -> str:
    prompts = f"{len(study.prompts)} prompts" if len(study.prompts) > 1 else "1 prompt"
    kept = "" if "spearman" in key else f"{study.budget} kept, "
    wrong = f", the model's own answer is wrong in {len(study.wrong)}" if study.wrong else ""
    return f"{MEASURES[key]} ({kept}{prompts}{wrong})"


def _layer_ticks(study: Study) -> tuple[list[int], list[int]]:
    """Columns and names of at most 15 layers."""
    step = -(-len(study.layers) // 15)
    columns = list(range(0, len(study.layers), step))
    return columns, [study.layers[column] for column in columns]
