"""python -m bench.memory {eager,ours} DTYPE TOKENS: bytes that a call of score_tokens needs.

The growth of this process's resident peak over one call, inputs and output included only as far
as the call itself allocates them.
"""

import sys
from pathlib import Path

import torch

import claa_ops
from bench.cases import LLAMA, keys_of, queries_of
from claa_ops import reference

CALLS = {"eager": reference.score_tokens, "ours": claa_ops.score_tokens}


def resident_peak() -> int:
    """VmHWM and not ru_maxrss: the latter may begin at the peak of the parent process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    contestant, dtype, tokens = sys.argv[1:]
    call = CALLS[contestant]
    # In a small size first: thread pools and code pages are no part of the call's memory.
    for total in (1024, int(tokens)):
        query, key = (
            queries_of(LLAMA, getattr(torch, dtype)),
            keys_of(LLAMA, getattr(torch, dtype), total),
        )
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
        before = resident_peak()
        call(query, key)
        growth = resident_peak() - before
    print(growth)


if __name__ == "__main__":
    main()
