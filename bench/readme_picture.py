"""python -m bench.readme_picture: README's picture, from measured times and accuracies."""

import argparse
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
MODEL = "Llama-3.1-8B"
METHODS = {"peak": "Peak", "claa": "CLAA", "fastkv": "FastKV"}
COLOURS = {"peak": "#d55e00", "claa": "#0072b2", "fastkv": "#e69f00", "full": "0.45"}


def draw_first_token(axes: Axes, rows: list[dict]) -> None:
    """Time to first token as a share of full prefill's, for each length of prompt."""
    times = {(row["tokens"], row["prefill"]): row["ttft_ms"] for row in rows}
    lengths = sorted({tokens for tokens, _ in times})
    for place, tokens in enumerate(lengths):
        full, claa = times[tokens, "full"], times[tokens, "CLAA 10 %"]
        axes.bar(place - 0.2, 1, 0.38, color=COLOURS["full"])
        axes.bar(place + 0.2, claa / full, 0.38, color=COLOURS["claa"])
        for at, height, milliseconds in ((-0.2, 1, full), (0.2, claa / full, claa)):
            said = (
                f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1e3:.1f} s"
            )
            axes.text(place + at, height + 0.02, said, ha="center")
    axes.set_xticks(range(len(lengths)), [f"{tokens // 1024}k tokens" for tokens in lengths])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set(ylim=(0, 1.3), ylabel="of full prefill's time")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in ("full", "claa")]
    axes.legend(handles, ["full prefill", "CLAA, 10 % kept"], frameon=False, ncols=2)


def draw_accuracy(axes: Axes, full: float, points: dict[str, list[tuple[float, float]]]) -> None:
    """Accuracy against work, one point for each selection layer."""
    axes.axhline(full, color=COLOURS["full"], ls="--", lw=1)
    axes.text(0.02, full + 0.015, "full prefill", color=COLOURS["full"])
    for name, label in METHODS.items():
        axes.plot(*zip(*points[name], strict=True), "o-", ms=3, color=COLOURS[name], label=label)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.05), ylabel="answers right")
    axes.set_xlabel("share of full prefill's work, by the selection layer")
    axes.legend(frameon=False, loc="center right")


def read_accuracy(path: Path) -> tuple[float, dict[str, list[tuple[float, float]]]]:
    """Accuracy of full prefill, and work and accuracy of each method by layer, 10 % kept.

    From the first tables of the record: 1,024 tokens, 120 prompts on which no setting was chosen.
    """
    text = path.read_text()
    full = re.search(r"^\| full prefill \| 1.00 \| ([\d.]+)", text, re.M)
    table = re.search(r"^### Accuracy; 10 / 20 / 40 %.*?\n\n(.*?)\n\n", text, re.M | re.S)
    assert full and table, f"{path} has no tables of accuracy"
    header, _, *rows = ([cell.strip() for cell in line.split("|")] for line in table[1].split("\n"))
    points = {
        name: [tuple(float(row[column].split()[0]) for column in (work, at)) for row in rows]
        for name in METHODS
        for work, at in [(header.index("work"), header.index(name))]
    }
    return float(full[1]), points


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.readme_picture", description=__doc__)
    parser.add_argument("--ttft", type=Path, default=RESULTS / "ttft.json")
    parser.add_argument("--quality", type=Path, default=DOCS / "quality-tables.md")
    parser.add_argument("--out", type=Path, default=DOCS / "readme.svg")
    arguments = parser.parse_args()

    report = json.loads(arguments.ttft.read_text())
    rows = [row for row in report["rows"] if row["model"] == MODEL]
    plt.rcParams |= {"svg.hashsalt": "claa", "font.size": 10}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.set_title(f"Time to first token: {MODEL} on an {report['machine']['device'].split()[1]}")
    draw_first_token(left, rows)
    right.set_title("Facts found: SmolLM2-135M, 1k tokens, 10 % kept")
    draw_accuracy(right, *read_accuracy(arguments.quality))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
