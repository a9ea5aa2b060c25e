"""Times calls on the CPU with cold caches, and measures the roofs they are judged against."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch

Call = Callable[[], object]
BUFFER_BYTES = 256 << 20  # larger than every cache


class Timing(NamedTuple):
    """Milliseconds over repeated calls: the median, the 10th and 90th percentiles, how many."""

    median: float
    p10: float
    p90: float
    calls: int


def measure(
    calls: Mapping[str, Call],
    *,
    budget_s: float = 2.0,
    rounds: tuple[int, int] = (5, 30),
) -> dict[str, Timing]:
    """Time the calls in turn, so that a slow moment of the machine affects all of them.

    Before each call a 256 MiB write evicts its data from every cache. There are as many
    rounds as the budget allows, at least ``rounds[0]`` and at most ``rounds[1]``.
    """
    evict = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
    for call in calls.values():
        call()  # warm up: allocators, thread pools, compilers
    samples: dict[str, list[float]] = {name: [] for name in calls}
    least, most = rounds
    begin = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - begin > budget_s:
            break
        for name, call in calls.items():
            evict.fill_(done)
            start = time.perf_counter()
            call()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: summary(times) for name, times in samples.items()}


def summary(times: list[float]) -> Timing:
    """Median and deciles of repeated calls."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), deciles[0], deciles[-1], len(times))


def _best_ms(call: Call) -> float:
    return measure({"roof": call})["roof"].median


@cache
def copy_gbps() -> float:
    """GB/s of a 256 MiB copy, counting bytes read and bytes written."""
    source = torch.ones(BUFFER_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_ms(lambda: target.copy_(source)) / 1e6


@cache
def read_gbps() -> float:
    """GB/s of adding up 256 MiB."""
    source = torch.ones(BUFFER_BYTES // 4)
    return source.nbytes / _best_ms(source.sum) / 1e6


@cache
def matmul_gflops() -> float:
    """GFLOP/s of torch.matmul on float32 squares of 2048; a multiply-add counts two."""
    a, b = (torch.ones(2048, 2048) for _ in range(2))
    return 2 * 2048**3 / _best_ms(lambda: a @ b) / 1e6


def peak_extra_bytes(contestant: str, dtype: str, tokens: int) -> int:
    """What one CPU call of ``score_tokens`` allocates at its peak, in a process of its own."""
    command = [sys.executable, "-m", "bench.memory", contestant, dtype, str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
