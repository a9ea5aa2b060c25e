"""python -m bench.plot: the roofs of a GPU and the ops under them, from bench/results/h100.json."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

RESULT = Path(__file__).parent / "results" / "h100.json"
PICTURE = Path(__file__).parents[1] / "docs" / "roofline.png"


def drawn(report: dict) -> plt.Figure:
    """Left, bytes per second of every op; right, operations per second of those that multiply."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    place = report["machine"]
    figure.suptitle(
        f"{place['device']}, torch {place['torch']}, Llama-3.1-8B shapes, bfloat16, "
        f"cold caches ({place['date']})"
    )
    ops = list(dict.fromkeys(line["op"] for line in report["lines"]))
    colours = dict(zip(ops, plt.get_cmap("tab10").colors, strict=False))
    bytes_per_second(left, report, colours)
    flops_per_second(right, report, colours)
    handles = [plt.Line2D([], [], marker="o", ls="", color=colours[op], label=op) for op in ops]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def bytes_per_second(axes: Axes, report: dict, colours: dict) -> None:
    """A node has a fixed cost, so few bytes cannot be moved at the full rate."""
    roof = report["roofs"]
    size = np.logspace(4, 10, 200)
    axes.plot(size, size / (roof["node_us"] * 1e3 + size / roof["copy_gbps"]), color="0.3")
    axes.text(2e9, roof["copy_gbps"] * 1.1, f"copy {roof['copy_gbps']:.0f} GB/s", ha="center")
    for line in report["lines"]:
        axes.plot(line["min_bytes"], line["gbps"], "o", ms=4, color=colours[line["op"]])
    axes.set(xscale="log", yscale="log", ylim=(1, 6000))
    axes.set(xlabel="bytes that must be moved", ylabel="GB/s")


def flops_per_second(axes: Axes, report: dict, colours: dict) -> None:
    """The classical roofline: bound by memory on the slope, by arithmetic on the plateau."""
    roof = report["roofs"]
    intensity = np.logspace(0.5, 4, 200)
    slope = roof["read_gbps"] * intensity / 1e3
    axes.plot(intensity, np.minimum(slope, roof["matmul_tflops"]), color="0.3")
    axes.text(2e3, roof["matmul_tflops"] * 1.1, f"{roof['matmul_tflops']:.0f} TFLOP/s")
    for line in report["lines"]:
        if line["flops"]:
            rate = line["flops"] / line["node_ms"]["ours"]["median"] / 1e9
            point = (line["flops"] / line["min_bytes"], rate)
            axes.plot(*point, "o", ms=4, color=colours[line["op"]])
    axes.set(xscale="log", yscale="log", ylim=(None, 2 * roof["matmul_tflops"]))
    axes.set(xlabel="operations per byte", ylabel="TFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    report = json.loads(arguments.result.read_text())
    drawn(report).savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
