"""Peak memory of one piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")
_INTERVAL_S = 0.002
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class PeakMemory:
    """Result of `watch_memory`: the bytes that the work needed above what was in use before."""

    bytes: int | None = None  # None where the platform does not tell


@contextlib.contextmanager
def watch_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure by how much the body's peak exceeds the memory in use when it starts.

    On CUDA these are the allocator's bytes (``max_memory_allocated``), exactly. On the CPU it is
    the anonymous part of the resident set (Linux only), which a thread reads every 2 ms: the
    whole set, whose peak the kernel keeps, would count pages of weights and libraries that come
    and go as files do. Meanwhile glibc returns what is freed, so that memory in use counts, as on
    CUDA, and not the holes of a heap, which differ by hundreds of MiB from run to run. That
    slows the body: do not time it.
    """
    peak = PeakMemory()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
    elif _STATM.exists():
        with _no_free_lists():
            sampler = _Sampler()
            sampler.start()
            try:
                yield peak
            finally:
                peak.bytes = sampler.stop()
    else:
        yield peak


@contextlib.contextmanager
def _no_free_lists() -> Iterator[None]:
    """Have glibc map each block from 64 KiB on its own, and unmap it when it is freed."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.malloc_trim(0)
    libc.mallopt(_M_MMAP_THRESHOLD, 64 * 2**10)
    try:
        yield
    finally:
        # Where glibc's own adaptation ends for a program that uses blocks of any size.
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


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
