"""python -m bench.memory {eager,ours} DTYPE TOKENS: bytes that a call of score_tokens needs.

The growth of this process's resident peak over one call, inputs and output included only as far
as the call itself allocates them.
"""

import sys

import torch

import claa_ops
from bench.cases import LLAMA, keys_of, queries_of
from claa_ops import reference
from claa_ops.evaluate.compare.memory import watch_memory

CALLS = {"eager": reference.score_tokens, "ours": claa_ops.score_tokens}


def main() -> None:
    contestant, dtype, tokens = sys.argv[1:]
    call = CALLS[contestant]
    # In a small size first: thread pools and code pages are no part of the call's memory.
    for total in (1024, int(tokens)):
        query, key = (
            queries_of(LLAMA, getattr(torch, dtype)),
            keys_of(LLAMA, getattr(torch, dtype), total),
        )
        with watch_memory(torch.device("cpu")) as growth:
            call(query, key)
    print(growth.bytes)


if __name__ == "__main__":
    main()
