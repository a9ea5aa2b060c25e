"""Agreement with the oracle by method, for people and as JSON."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from claa_ops.evaluate.intervals import Interval
from claa_ops.evaluate.oracle.measures import MEASURES
from claa_ops.evaluate.oracle.rank import Study
from claa_ops.evaluate.oracle.settings import Settings
from claa_ops.info import versions

_HEADINGS = {
    "answers": "right answers",
    "spearman_raw": "Spearman, raw",
    "spearman_pooled": "Spearman, pooled",
    "overlap_raw": "overlap, raw",
    "overlap_pooled": "overlap, pooled",
    "needle_recall": "needle recall",
    "stability_jaccard": "Jaccard, layers",
    "stability_spearman": "Spearman, layers",
}


def study_table(study: Study) -> RenderableType:
    """One row per method: each known measure, averaged over layers and prompts."""
    known = [key for key in MEASURES if study.is_known(key)]
    table = Table(
        "method",
        *(_HEADINGS[key] for key in known),
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
    )
    table.columns[0].no_wrap = True
    for name, values in study.overall.items():
        table.add_row(name, *(_cell(values[key]) for key in known))
    lines = [
        f"{len(study.prompts)} prompts, {len(study.layers)} layers from {study.layers[0]} to "
        f"{study.layers[-1]}, {study.budget} kept: means over layers and prompts, with 95 % "
        "bootstrap intervals over prompts. Raw and pooled: against the oracle, whose ranking is "
        "the attention of the answer. Layers: each against the one before."
    ]
    lines.append(_advice(study))
    scores = [prompt.score for prompt in study.prompts if prompt.score is not None]
    if scores:
        lines.append(
            f"Mean score of the model's own answers, with all tokens: {np.mean(scores):.2f}."
        )
    if study.wrong:
        names = "; ".join(study.wrong[:3]) + "; ..." * (len(study.wrong) > 3)
        lines.append(
            f"The model's own answer is wrong in {len(study.wrong)} of {len(study.prompts)} "
            f"prompts ({names}): what it attends to there says little."
        )
    if len(study.prompts) == 1:
        lines.append(f"The answer: {study.prompts[0].answer}")
    return Group(table, Text("\n" + "\n".join(lines)))


def _advice(study: Study) -> str:
    best = {name: study.best_layer(name) for name in study.by_layer if name != "oracle"}
    found = ", ".join(f"{name} {layer}" for name, layer in best.items() if layer is not None)
    none = ", ".join(name for name, layer in best.items() if layer is None)
    text = "Best layers, of those with the most right answers the nearest to the oracle: "
    return text + "; ".join([found] * bool(found) + [f"none for {none}"] * bool(none)) + "."


def study_json(study: Study, settings: Settings) -> dict[str, object]:
    """Every mean by method, measure and layer, and what it was measured with; null is no value."""
    paths = {"filler": settings.filler, "out": settings.out}
    return {
        "settings": asdict(settings) | {name: path and str(path) for name, path in paths.items()},
        "versions": versions(),
        "layers": study.layers,
        "best_layers": {
            name: study.best_layer(name) for name in study.by_layer if name != "oracle"
        },
        "prompts": [
            {
                "name": prompt.name,
                "tokens": len(prompt.ids),
                "ranked_tokens": len(prompt.raw),
                "needle_tokens": None if prompt.needle is None else len(prompt.needle),
                "answer": prompt.answer,
                "score": prompt.score,
            }
            for prompt in study.prompts
        ],
        "by_layer": {
            name: {key: [_interval_json(value) for value in row] for key, row in measured.items()}
            for name, measured in study.by_layer.items()
        },
        "over_layers": {
            name: {key: _interval_json(value) for key, value in measured.items()}
            for name, measured in study.overall.items()
        },
    }


def _cell(value: Interval | None) -> str:
    if value is None:
        return "-"
    if value.low is None or value.high is None:
        return _short(value.mean)
    return f"{_short(value.mean)}\n{_short(value.low)}–{_short(value.high)}"


def _short(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("0.", ".", 1)  # no negative zero


def _interval_json(value: Interval | None) -> dict[str, float | None] | None:
    return None if value is None else asdict(value)
