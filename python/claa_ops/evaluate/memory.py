"""Peak memory of one piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")
_INTERVAL_S = 0.002


class PeakMemory:
    """Result of `watch_memory`: the bytes that the work needed above what was in use before."""

    bytes: int | None = None  # None where the platform does not tell


@contextlib.contextmanager
def watch_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure by how much the body's peak exceeds the memory in use when it starts.

    On CUDA these are the allocator's bytes (``max_memory_allocated``), exactly. On the CPU it is
    the anonymous part of the resident set (Linux only), which a thread reads every 2 ms. The
    whole set, whose peak the kernel keeps, would count pages of weights and libraries that come
    and go as files do. Unused heap is given back first, or the body would reuse it unseen.
    """
    peak = PeakMemory()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
    elif _STATM.exists():
        with contextlib.suppress(AttributeError, OSError):
            trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim  # glibc only
            trim(0)
        sampler = _Sampler()
        sampler.start()
        try:
            yield peak
        finally:
            peak.bytes = sampler.stop()
    else:
        yield peak


class _Sampler(threading.Thread):
    """Reads the process's anonymous memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._before = self._most = _anonymous_bytes()

    def run(self) -> None:
        """Keep the largest value."""
        while not self._done.wait(_INTERVAL_S):
            self._most = max(self._most, _anonymous_bytes())

    def stop(self) -> int:
        """End the thread; return by how much the largest value exceeds the first."""
        self._done.set()
        self.join()
        return max(self._most, _anonymous_bytes()) - self._before


def _anonymous_bytes() -> int:
    _, resident, file_backed, *_ = _STATM.read_text().split()
    return (int(resident) - int(file_backed)) * os.sysconf("SC_PAGE_SIZE")
