"""Peak memory of one piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class PeakMemory:
    """Result of `watch_memory`: the bytes that the work needed above what was in use before."""

    bytes: int | None = None  # None where the platform does not tell


@contextlib.contextmanager
def watch_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure by how much the body's peak exceeds the memory in use when it starts.

    On CUDA these are the allocator's bytes (``max_memory_allocated``). On the CPU it is the
    resident set, whose peak the kernel keeps (``VmHWM``, Linux only); the body should find the
    files that it reads, such as weights, in memory already. Meanwhile glibc returns what is freed,
    so that memory in use counts, as on CUDA, and not the holes of a heap, which differ by hundreds
    of MiB from run to run. That slows the body: do not time it.
    """
    peak = PeakMemory()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with _no_free_lists():
        try:
            (_PROCESS / "clear_refs").write_text("5")  # the peak is now what is resident now
            before = _resident_peak()
        except OSError:
            yield peak
            return
        yield peak
        peak.bytes = _resident_peak() - before


def _resident_peak() -> int:
    """In bytes; not ``ru_maxrss``, which may begin at the peak of the parent process."""
    lines = (_PROCESS / "status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024


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
