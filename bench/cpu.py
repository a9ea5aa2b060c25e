"""The ops on the CPU: against eager PyTorch, torch.compile and the machine's roofs."""

import gc
from collections.abc import Callable, Iterator

import torch

from bench.cases import Case, cases
from bench.harness import Timing, copy_gbps, matmul_gflops, measure, peak_extra_bytes, read_gbps

OPPONENTS = ("eager", "compiled", "torch")
MATMUL_SIZE = 1024
TOKENS = (4096, 32_768, 131_072)
HEADER = (
    f"{'op':<21}{'shape':<19}{'dtype':<9}{'note':<21}{'eager ms':>10}{'compiled':>10}"
    f"{'ours ms':>10}  {'[p10..p90]':<19}{'/eager':>8}{'/compiled':>10}{'of copy':>9}"
    f"{'x floor':>9}{'/torch':>8}"
)


def floor_calls(case: Case) -> dict[str, Callable[[], object]]:
    """The calls that measure the floor of a score: a read of its keys, and a matrix product."""
    if not case.flops:
        return {}
    key = case.args[1].view(torch.float32)
    square = torch.rand(MATMUL_SIZE, MATMUL_SIZE)
    return {"read": key.sum, "matmul": lambda: square @ square}


def floor_ms(case: Case, timings: dict[str, Timing]) -> float | None:
    """The larger of one read of the keys and the same multiply-adds at torch's float32 rate.

    Both are timed in turn with the op, caches cold: a slow moment of the machine, and the cost of a
    call before its kernel starts, affect the floor as they affect the op.
    """
    if not case.flops:
        return None
    multiply = timings["matmul"].median * case.flops / (2 * MATMUL_SIZE**3)
    return max(timings["read"].median, multiply)


def line_of(case: Case, quick: bool) -> dict:
    """Measure one case."""
    calls = {"eager": case.eager, "ours": case.ours}
    if not quick:
        calls["compiled"] = case.compiled()
    if case.builtin is not None:
        calls["torch"] = case.builtin
    calls |= floor_calls(case)
    timings = measure(calls, budget_s=0.5 if quick else 1.5, rounds=(3, 10) if quick else (3, 30))
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
        "of_copy": case.min_bytes / ours / 1e6 / copy_gbps(),
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
        f"{line['op']:<21}{line['shape']:<19}{line['dtype']:<9}{line['note']:<21}"
        f"{ms['eager']['median']:>10.3f}{compiled:>10}{ours.median:>10.3f}  {spread:<19}"
        f"{ratios['eager']:>8}{ratios.get('compiled', ''):>10}{line['of_copy']:>9.0%}{floor:>9}"
        f"{ratios.get('torch', ''):>8}"
    )


def memory_lines(tokens: int) -> Iterator[dict]:
    for dtype in ("float32", "bfloat16"):
        used = {name: peak_extra_bytes(name, dtype, tokens) for name in ("eager", "ours")}
        yield {"op": "score_tokens", "dtype": dtype, "tokens": tokens, "bytes": used}


def report(ops: list[str], quick: bool) -> dict:
    """Measure and print everything."""
    roofs = {
        "copy_gbps": copy_gbps(),
        "read_gbps": read_gbps(),
        "matmul_gflops": matmul_gflops(),
    }
    print(
        f"roofs: copy {roofs['copy_gbps']:.1f} GB/s (read + written), read "
        f"{roofs['read_gbps']:.1f} GB/s, float32 matmul {roofs['matmul_gflops']:.0f} GFLOP/s\n"
        "/eager, /compiled, /torch: their time over ours. Floor of a score: the larger of one "
        "read of the keys and its multiply-adds at the matmul rate.\n" + HEADER
    )
    lines = []
    for op in ops:
        for case in cases(op, "cpu", TOKENS[:1] if quick else TOKENS):
            lines.append(line_of(case, quick))
            print(printed(lines[-1]), flush=True)
            del case
            gc.collect()  # the next case may need these gigabytes

    memory = []
    if not quick and "score_tokens" in ops:
        memory = list(memory_lines(TOKENS[-1]))
        for line in memory:
            mib = {name: size / 2**20 for name, size in line["bytes"].items()}
            print(
                f"peak extra memory of score_tokens, Llama-3.1-8B {line['tokens'] // 1024}k, "
                f"{line['dtype']}: eager {mib['eager']:.0f} MiB, ours {mib['ours']:.1f} MiB"
            )
    return {"roofs": roofs, "lines": lines, "memory": memory}
