"""score_tokens on a busy machine: its time beside other processes over its time alone."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.cases import LLAMA, Shape, score_tokens
from bench.harness import Call, Timing, summary

LOADS = (1, 2, 4)  # busy processes for each core
ROUNDS = 10
CALLS = 20  # of a round, in each condition
SETTLE_S = 0.2  # what a process takes to start, and the scheduler to spread it
# It also ends by itself, should this process be killed before it can end it.
BUSY = """
import os
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that compute without pause, while the body runs."""
    processes: list[subprocess.Popen] = []
    try:
        for _ in range(count):
            command = [sys.executable, "-S", "-c", BUSY]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for process in processes:
            process.stdout.readline()
        time.sleep(SETTLE_S)
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def timed(call: Call, calls: int) -> list[float]:
    """Milliseconds of each of so many calls in a row, after one that does not count."""
    call()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def line_of(call: Call, processes: int, rounds: int) -> dict:
    """Time the call alone and beside so many processes, in turn."""
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    for _ in range(rounds):
        alone.append(timed(call, CALLS))
        with busy_processes(processes):
            beside.append(timed(call, CALLS))
    medians = [[statistics.median(times) for times in times_of] for times_of in (alone, beside)]
    ratios = summary([busy / quiet for quiet, busy in zip(*medians, strict=True)])
    quiet, busy = (summary([t for times in runs for t in times]) for runs in (alone, beside))
    return {
        "processes": processes,
        "ms": {"alone": quiet._asdict(), "beside": busy._asdict()},
        "ratio": busy.median / quiet.median,
        "ratios_of_rounds": ratios._asdict(),
        "share": 1 + processes / (os.cpu_count() or 1),
    }


def printed(line: dict) -> str:
    alone, beside = (Timing(**line["ms"][name]) for name in ("alone", "beside"))
    rounds = Timing(**line["ratios_of_rounds"])
    return (
        f"{line['processes']:>9}{alone.median:>10.2f}  {f'[{alone.p10:.2f}..{alone.p90:.2f}]':<16}"
        f"{beside.median:>10.2f}  {f'[{beside.p10:.2f}..{beside.p90:.2f}]':<18}"
        f"{line['ratio']:>7.2f}  {f'[{rounds.p10:.2f}..{rounds.p90:.2f}]':<16}{line['share']:>6.1f}"
    )


def report(quick: bool) -> dict:
    """Measure and print everything."""
    case = next(score_tokens(Shape(LLAMA, 4096, "cpu"), torch.float32))
    print(
        f"{case.op}, {case.shape}, {case.dtype}: median of calls in a row, alone and beside busy "
        "processes\n"
        f"{'processes':>9}{'alone ms':>10}  {'[p10..p90]':<16}{'beside ms':>10}  "
        f"{'[p10..p90]':<18}{'ratio':>7}  {'[of rounds]':<16}{'share':>6}"
    )
    lines = []
    for load in LOADS:
        lines.append(line_of(case.ours, load * (os.cpu_count() or 1), 2 if quick else ROUNDS))
        print(printed(lines[-1]), flush=True)
    return {"op": case.op, "shape": str(case.shape), "lines": lines}
