"""A picture of how each layer ranks the prompt, and of what is kept."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from claa_ops.evaluate.compare.run import Comparison
from claa_ops.huggingface.models import InputError

_COLUMNS = 200
_DECADES = 3  # the best 0.1 % of the tokens look alike
_MARK = "#d55e00"  # vermilion: apart from every shade of cividis, for colour-blind eyes too


def plot_scores(report: Comparison, file: Path, fact: range | None = None) -> None:
    """Draw how high each layer ranks each part of the prompt, and below it which tokens stay.

    Args:
        report: the comparison, with scores; they are those of the full prefill.
        file: where to write the picture.
        fact: the tokens that hold the answer, where they are known.

    Raises:
        InputError: the file cannot be written.
    """
    scores, kept, tokens = report.scores, report.kept, report.prompt_tokens
    layers = max(scores) + 1
    grid = torch.full((layers, min(_COLUMNS, tokens)), torch.nan)
    for index, row in scores.items():
        grid[index] = _column_best(_standing(row), grid.shape[1], tokens)

    figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(10, 1))
    image = upper.imshow(
        grid.numpy(),
        extent=(0, tokens, -0.5, layers - 0.5),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        vmin=0,
        vmax=_DECADES,
    )
    title = f"{kept.numel():,} of {tokens:,} tokens kept"
    upper.set_title(title, loc="left", fontsize=10)
    upper.set_ylabel("layer")
    upper.yaxis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(image, ax=upper, pad=0.01)
    bar.set_ticks([0, 1, 2, 3], labels=["last", "best 10 %", "best 1 %", "best 0.1 %"])
    bar.set_label("rank of the best token in the column")

    lower.vlines(kept + 0.5, 0, 1, color="black", linewidth=0.4)
    lower.set_ylim(0, 1)
    lower.set_yticks([])
    lower.set_ylabel("kept", rotation=0, ha="right", va="center")
    lower.set_xlabel("token position in the prompt")

    for layer in report.selections:
        upper.axhline(layer + 0.5, color=_MARK, linewidth=1.5)
    if report.selections:
        upper.annotate(
            _where(report.selections),
            (0.01, report.selections[0] + 0.5),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )
    if fact is not None:
        centre = (fact.start + fact.stop) / 2
        upper.annotate(
            "planted fact",
            (centre, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 12),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-|>", "color": _MARK},
        )
        inside = kept[(kept >= fact.start) & (kept < fact.stop)]
        lower.vlines(inside + 0.5, 0, 1, color=_MARK, linewidth=1)
    try:
        FigureCanvasAgg(figure).print_figure(file)
    except OSError as error:
        raise InputError(f"cannot write the plot {file}: {error.strerror}") from error


def _where(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"selection after layer {layers[0]}"
    if len(layers) > 4:
        return f"selections after {len(layers)} layers, {layers[0]} to {layers[-1]}"
    return f"selections after layers {', '.join(map(str, layers))}"


def _standing(scores: Tensor) -> Tensor:
    """0 for the last token, 1 for one at the border of the best tenth, 2 of the best 1 %, ..."""
    rank = scores.argsort(descending=True, stable=True).argsort() + 1
    return -(rank / rank.numel()).log10().clamp(-_DECADES, 0)


def _column_best(row: Tensor, columns: int, tokens: int) -> Tensor:
    """The best of the tokens that share a column; a column of window tokens only stays blank."""
    column = torch.arange(row.numel()) * columns // tokens
    best = torch.full((columns,), -torch.inf)
    best.scatter_reduce_(0, column, row.float(), "amax")
    return best.masked_fill(best.isinf(), torch.nan)
