"""python -m bench.readme_picture: README's picture, from measured times and accuracies."""

import argparse
import gzip
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
MODEL = "Llama-3.1-8B"
PREFILLS = {
    "full": "full prefill",
    "claa 10 %": "CLAA after layer 15",
    "peak:layer=7 10 %": "Peak after 7",
    "hops:layer=3:in_layer=true 10 %": "Hops within 3",
}
ANSWERS = {"FullKV": "full prefill", "Hops": "Hops, 30 %", "Peak": "Peak, 30 %"}
COLOURS = ["0.45", "#0072b2", "#d55e00", "#009e73"]
LENGTH, KEEP, LEAST = 4096, 0.3, 0.3  # the least that full prefill has right of a task


def draw_first_token(axes: Axes, rows: list[dict]) -> None:
    """Time to first token as a share of full prefill's, for each length of prompt."""
    times = {(row["tokens"], row["prefill"]): row["ttft_ms"] for row in rows}
    lengths = sorted({tokens for tokens, _ in times})
    width = 0.9 / len(PREFILLS)
    for place, tokens in enumerate(lengths):
        for number, name in enumerate(PREFILLS):
            milliseconds = times[tokens, name]
            height = milliseconds / times[tokens, "full"]
            at = place + (number - (len(PREFILLS) - 1) / 2) * width
            axes.bar(at, height, width * 0.95, color=COLOURS[number])
            said = f"{milliseconds:.0f} ms" if milliseconds < 1e3 else f"{milliseconds / 1e3:.1f} s"
            axes.text(at, height + 0.02, said, ha="center", size=7)
    axes.set_xticks(range(len(lengths)), [f"{tokens // 1024}k tokens" for tokens in lengths])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set(ylim=(0, 1.35), ylabel="of full prefill's time")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS]
    axes.legend(handles, list(PREFILLS.values()), frameon=False, ncols=2, fontsize=8)


def draw_answers(axes: Axes, scores: dict[str, dict[str, float]]) -> None:
    """Right answers of each task, in the order of what Peak keeps."""
    tasks = [task for task, right in scores["FullKV"].items() if right >= LEAST]
    tasks.sort(key=lambda task: scores["Peak"][task] - scores["FullKV"][task], reverse=True)
    for (name, label), colour, marker in zip(
        ANSWERS.items(), (COLOURS[0], COLOURS[3], COLOURS[2]), "|ox", strict=True
    ):
        right = [scores[name][task] for task in tasks]
        axes.plot(right, range(len(tasks)), marker, color=colour, label=label, ms=6, mew=2)
    names = [task.removeprefix("ruler-").removeprefix("beyond-") for task in tasks]
    axes.set_yticks(range(len(tasks)), names, size=7)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlim=(-0.03, 1.03), xlabel="answers right")
    axes.grid(axis="y", lw=0.3)
    axes.legend(frameon=False, loc="lower left", fontsize=8)


def read_answers(path: Path) -> dict[str, dict[str, float]]:
    """Of each method the mean score of each task, at one length and rate, with whole caches."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with gzip.open(path, "rt") as lines:
        for record in map(json.loads, lines):
            of_length = record["place"]["length"] == LENGTH or "short" in record["task"]
            whole = record["settings"].get("keep_kv", 1.0) == 1.0
            plain = not record["settings"].get("second_look") and "seed 9101" in record["name"]
            if of_length and whole and plain and record["keep"] in (None, KEEP):
                found[record["method"]][record["task"]].append(record["score"])
    return {
        method: {task: mean(scores) for task, scores in tasks.items()}
        for method, tasks in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.readme_picture", description=__doc__)
    parser.add_argument("--ttft", type=Path, default=RESULTS / "ttft.json")
    parser.add_argument("--quality", type=Path, default=RESULTS / "quality-1.5b.jsonl.gz")
    parser.add_argument("--out", type=Path, default=DOCS / "readme.svg")
    arguments = parser.parse_args()

    rows = json.loads(arguments.ttft.read_text())["rows"]
    rows = [row for row in rows if row["model"] == MODEL and row["mode"] == "eager"]
    plt.rcParams |= {"svg.hashsalt": "claa", "font.size": 10}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    left.set_title(f"Time to first token: {MODEL} on an {rows[0]['device'].split()[1]}", size=10)
    draw_first_token(left, rows)
    right.set_title("Answers: Qwen2.5-Coder-1.5B, 4k tokens, after layer 3", size=10)
    draw_answers(right, read_answers(arguments.quality))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
