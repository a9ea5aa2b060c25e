"""python -m bench: every op against eager PyTorch, torch.compile and the machine's roofs.

All numbers are measured: no line is taken from elsewhere. Caches are cold before each call.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import claa_ops
from bench.cases import OPS, Case, cases
from bench.harness import Timing, copy_gbps, matmul_gflops, measure, peak_extra_bytes, read_gbps

FOLDER = Path(__file__).parent
OPPONENTS = ("eager", "compiled", "torch")
MATMUL_SIZE = 1024
TOKENS = (4096, 32_768, 131_072)
HEADER = (
    f"{'op':<17}{'shape':<19}{'dtype':<9}{'note':<10}{'eager ms':>10}{'compiled':>10}"
    f"{'ours ms':>10}  {'[p10..p90]':<19}{'/eager':>8}{'/compiled':>10}{'of copy':>9}"
    f"{'x floor':>9}{'/torch':>8}"
)


def machine(device: str) -> dict:
    """What a number belongs to: hardware, software, commit, day."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor()
    return {
        "device": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "claa_ops": claa_ops.__version__,
        "commit": _commit(),
        "load_average": os.getloadavg()[0],  # before the first call: above 0.5, others ran too
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(command, capture_output=True, text=True)
    return described.stdout.strip() or "unknown"


def floor_calls(case: Case, device: str) -> dict[str, Callable[[], object]]:
    """What the floor of a score is measured by: a read of its keys, and a matrix product."""
    if not case.flops:
        return {}
    key = case.args[1].view(torch.float32)
    square = torch.rand(MATMUL_SIZE, MATMUL_SIZE, device=device)
    return {"read": key.sum, "matmul": lambda: square @ square}


def floor_ms(case: Case, timings: dict[str, Timing]) -> float | None:
    """The larger of one read of the keys and the same multiply-adds at torch's float32 rate.

    Both are timed in turn with the op, caches cold: a slow moment of the machine, and what a call
    costs before it begins, meet the floor as they meet the op.
    """
    if not case.flops:
        return None
    multiply = timings["matmul"].median * case.flops / (2 * MATMUL_SIZE**3)
    return max(timings["read"].median, multiply)


def line_of(case: Case, device: str, quick: bool) -> dict:
    """Measure one case."""
    calls = {"eager": case.eager, "ours": case.ours}
    if not quick:
        calls["compiled"] = case.compiled()
    if case.builtin is not None:
        calls["torch"] = case.builtin
    calls |= floor_calls(case, device)
    timings = measure(
        calls, device, budget_s=0.5 if quick else 1.5, rounds=(3, 10) if quick else (3, 30)
    )
    ours = timings["ours"].median
    floor = floor_ms(case, timings)
    return {
        "op": case.op,
        "shape": str(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "note": case.note,
        "ms": {name: timing._asdict() for name, timing in timings.items()},
        "speedup": {n: timings[n].median / ours for n in OPPONENTS if n in timings},
        "min_bytes": case.min_bytes,
        "of_copy": case.min_bytes / ours / 1e6 / copy_gbps(device),
        "floor_ms": floor,
        "times_floor": None if floor is None else ours / floor,
    }


def printed(line: dict) -> str:
    ms, speedup = line["ms"], line["speedup"]
    ours = Timing(**ms["ours"])
    spread = f"[{ours.p10:.3f}..{ours.p90:.3f}]"
    compiled = f"{ms['compiled']['median']:.3f}" if "compiled" in ms else ""
    floor = "" if line["times_floor"] is None else f"{line['times_floor']:.2f}"
    ratios = {name: f"{value:.2f}x" for name, value in speedup.items()}
    return (
        f"{line['op']:<17}{line['shape']:<19}{line['dtype']:<9}{line['note']:<10}"
        f"{ms['eager']['median']:>10.3f}{compiled:>10}{ours.median:>10.3f}  {spread:<19}"
        f"{ratios['eager']:>8}{ratios.get('compiled', ''):>10}{line['of_copy']:>9.0%}{floor:>9}"
        f"{ratios.get('torch', ''):>8}"
    )


def memory_lines(tokens: int) -> Iterator[dict]:
    for dtype in ("float32", "bfloat16"):
        used = {name: peak_extra_bytes(name, dtype, tokens) for name in ("eager", "ours")}
        yield {"op": "score_tokens", "dtype": dtype, "tokens": tokens, "bytes": used}


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--op", choices=OPS, help="only this op")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--quick", action="store_true", help="4k tokens, few calls, no compile")
    parser.add_argument(
        "--out", type=Path, help="JSON file; by default bench/results/DEVICE.json for a full run"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parsed_arguments()
    device, quick = arguments.device, arguments.quick
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    about = machine(device)
    roofs = {
        "copy_gbps": copy_gbps(device),
        "read_gbps": read_gbps(device),
        "matmul_gflops": matmul_gflops(device),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(
        f"roofs: copy {roofs['copy_gbps']:.1f} GB/s (read + written), read "
        f"{roofs['read_gbps']:.1f} GB/s, float32 matmul {roofs['matmul_gflops']:.0f} GFLOP/s\n"
        "/eager, /compiled, /torch: their time over ours. Floor of a score: the larger of one "
        "read of the keys and its multiply-adds at the matmul rate.\n" + HEADER
    )
    lines = []
    for op in [arguments.op] if arguments.op else OPS:
        for case in cases(op, device, TOKENS[:1] if quick else TOKENS):
            lines.append(line_of(case, device, quick))
            print(printed(lines[-1]), flush=True)
            del case
            gc.collect()  # the next case may need these gigabytes

    memory = []
    if device == "cpu" and not quick and arguments.op in (None, "score_tokens"):
        memory = list(memory_lines(TOKENS[-1]))
        for line in memory:
            mib = {name: size / 2**20 for name, size in line["bytes"].items()}
            print(
                f"peak extra memory of score_tokens, Llama-3.1-8B {line['tokens'] // 1024}k, "
                f"{line['dtype']}: eager {mib['eager']:.0f} MiB, ours {mib['ours']:.1f} MiB"
            )

    full = not quick and arguments.op is None
    out = arguments.out or (FOLDER / "results" / f"{device}.json" if full else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": about, "roofs": roofs, "lines": lines, "memory": memory}
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
