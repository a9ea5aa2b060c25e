"""score_tokens on a busy machine: its time beside other processes over its time alone."""

import os
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
CALLS = 50  # of a round, in each condition: several time slices
SETTLE_S = 0.2  # what a process takes to start, and the scheduler to spread it
# A busy process also ends when this one is gone, in case it is killed before it can end the other.
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
    """Run so many processes that compute without pause while the body runs."""
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


def milliseconds(call: Call) -> float:
    """Mean time of calls in a row, after a warm-up.

    The mean, not the median: most calls fit into a time slice and take no longer than alone; the
    others are what a busy machine costs.
    """
    call()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) * 1e3 / CALLS


def line_of(call: Call, processes: int, rounds: int) -> dict:
    """Time the call alone and beside so many busy processes, in turn."""
    alone, beside = [], []
    for _ in range(rounds):
        alone.append(milliseconds(call))
        with busy_processes(processes):
            beside.append(milliseconds(call))
    quiet, busy = summary(alone), summary(beside)
    return {
        "processes": processes,
        "ms": {"alone": quiet._asdict(), "beside": busy._asdict()},
        "ratio": busy.median / quiet.median,
        "fair_ratio": 1 + processes / torch.get_num_threads(),
    }


def printed(line: dict) -> str:
    alone, beside = (Timing(**line["ms"][name]) for name in ("alone", "beside"))
    return (
        f"{line['processes']:>9}{alone.median:>10.2f}  {f'[{alone.p10:.2f}..{alone.p90:.2f}]':<16}"
        f"{beside.median:>10.2f}  {f'[{beside.p10:.2f}..{beside.p90:.2f}]':<18}"
        f"{line['ratio']:>6.2f}{line['fair_ratio']:>6.1f}"
    )


def report(quick: bool) -> dict:
    """Measure and print everything. The fair ratio assumes as many threads as cores."""
    case = next(score_tokens(Shape(LLAMA, 4096, "cpu"), torch.float32))
    print(
        f"{case.op}, {case.shape}, {case.dtype}: {CALLS} calls in a row, alone and beside busy "
        "processes; medians of rounds. fair: by the share of the cores\n"
        f"{'processes':>9}{'alone ms':>10}  {'[p10..p90]':<16}{'beside ms':>10}  "
        f"{'[p10..p90]':<18}{'ratio':>6}{'fair':>6}"
    )
    lines = []
    for load in LOADS:
        processes = load * (os.cpu_count() or 1)
        lines.append(line_of(case.ours, processes, 2 if quick else ROUNDS))
        print(printed(lines[-1]), flush=True)
    return {"op": case.op, "shape": str(case.shape), "lines": lines}
