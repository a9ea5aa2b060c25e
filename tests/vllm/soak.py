"""Requests drawn at random, for as long as you like; every answer has to be its answer alone.

    python tests/vllm/soak.py --requests 10000
    VLLM_BATCH_INVARIANT=1 python tests/vllm/soak.py --minutes 10 --dtype bfloat16 \
      --attention-backend TRITON_ATTN   # on a GPU

Lengths, chunks, common beginnings, pruned and whole and protected prompts, aborts at any step, and
preemption under a small cache. Whenever the engine is idle no block may be held, nothing parked.
Ends with 1 at the first thing that is wrong; prints a line every minute.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from support.engines import Engine, engine, save_tiny_llama

ASKS: list[dict[str, Any] | None] = [
    None,
    None,
    {"claa_keep": 0.5},
    {"claa_keep": "all"},
    {"claa_keep": 40},
    {"claa_protect": [0, 1]},
]


@dataclass(frozen=True)
class Case:
    """A prompt, what it asks of the selection, and how many tokens it wants."""

    ids: tuple[int, ...]
    asks: dict[str, Any] | None
    new: int


@dataclass
class Counts:
    """What has happened."""

    finished: int = 0
    aborted: int = 0
    wrong: list[int] = field(default_factory=list)
    idle: int = 0
    hit: int = 0


def draw_cases(draw: random.Random, count: int, longest: int) -> list[Case]:
    """Prompts of which half begin like others, short ones as often as long ones."""

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(256) for _ in range(length))

    def length(most: int) -> int:
        return int(most ** draw.random())  # as many of 10 to 100 tokens as of 100 to 1000

    starts = [tokens(length(longest // 2)) for _ in range(8)]
    cases = []
    for _ in range(count):
        start = draw.choice([(), draw.choice(starts)])
        ids = start + tokens(length(longest - len(start)))
        cases.append(Case(ids, draw.choice(ASKS), length(200)))
    return cases


def add(llm: Any, name: str, case: Case) -> None:
    """Hand a request to the engine."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=case.new, ignore_eos=True, extra_args=case.asks
    )
    llm.llm_engine.add_request(name, {"prompt_token_ids": list(case.ids)}, params)


def run(started: Engine, cases: list[Case], expected: list[list[int]], options: Any) -> Counts:
    """Have some requests under way at any time, and abort some of them."""
    draw, counts, llm = random.Random(options.seed + 1), Counts(), started.llm
    preempted = started.preemptions()
    under_way: dict[str, int] = {}

    def step() -> None:
        for output in llm.llm_engine.step():
            if output.finished and output.request_id in under_way:
                place = under_way.pop(output.request_id)
                counts.finished += 1
                counts.hit += (output.num_cached_tokens or 0) > 0
                if list(output.outputs[0].token_ids) != expected[place]:
                    counts.wrong.append(place)

    asked, told = 0, time.monotonic()
    end = told + options.minutes * 60
    burst = draw.randint(1, options.at_once)

    def more() -> bool:
        return asked < options.requests and time.monotonic() < end

    while more() or under_way:
        while more() and len(under_way) < burst:
            place = draw.randrange(len(cases))
            under_way[str(asked)] = place
            add(llm, str(asked), cases[place])
            asked += 1
        step()
        if under_way and draw.random() < options.aborts:
            name = draw.choice(list(under_way))
            llm.llm_engine.abort_request([name])
            del under_way[name]
            counts.aborted += 1
        if not under_way or draw.random() < 0.01:  # now and then wait until all is over
            burst = draw.randint(1, options.at_once)
            while llm.llm_engine.has_unfinished_requests():
                step()
            started.assert_idle()
            counts.idle += 1
        if time.monotonic() - told > 60 or not (more() or under_way):
            told, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(
                f"{asked} asked, {counts.finished} answered, {counts.aborted} aborted, "
                f"{len(preempted)} preempted, {counts.hit} hits, {counts.idle} times idle, "
                f"{len(counts.wrong)} wrong, {memory / 1024:.0f} MiB",
                flush=True,
            )
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="Ask nothing after them.")
    parser.add_argument("--cases", type=int, default=200, help="Prompts to draw from.")
    parser.add_argument("--longest", type=int, default=1200)
    parser.add_argument("--at-once", type=int, default=12)
    parser.add_argument("--aborts", type=float, default=0.02, help="Chance at each step.")
    parser.add_argument("--blocks", type=int, default=110, help="Of the cache.")
    parser.add_argument("--chunk", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention-backend", help="vLLM's choice if left out.")
    parser.add_argument("--tolerate", type=float, default=0.0, help="Share of wrong answers.")
    parser.add_argument("--model", help="A folder; the tiny model if left out.")
    parser.add_argument("--claa", type=json.loads, help="Settings; Peak after layer 3 if left out.")
    options = parser.parse_args()
    claa = options.claa or {"method": "peak", "layer": 3, "keep": 0.2, "min_prompt": 30}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or save_tiny_llama(Path(folder), options.longest + 200)
        cases = draw_cases(random.Random(options.seed), options.cases, options.longest)
        own = dict(max_model_len=options.longest + 200, dtype=options.dtype)
        if options.attention_backend:
            own |= dict(attention_backend=options.attention_backend)
        if torch.cuda.is_available():  # others may be at work there too
            own |= dict(gpu_memory_utilization=0.1, kv_cache_memory_bytes=2 * 2**30)
        with engine(model, claa, **own) as started:
            expected = [started.answers([c.ids], c.new, c.asks)[0].tokens for c in cases]
        begun = time.monotonic()
        with engine(
            model,
            claa,
            max_num_batched_tokens=options.chunk,
            max_num_seqs=options.at_once,
            num_gpu_blocks_override=options.blocks,
            block_size=32,
            enable_prefix_caching=True,
            **own,
        ) as started:
            counts = run(started, cases, expected, options)
            started.assert_idle()
    print(f"{time.monotonic() - begun:.0f} s")
    if len(counts.wrong) > options.tolerate * counts.finished:
        raise SystemExit(f"wrong answers to the cases {sorted(set(counts.wrong))}")


if __name__ == "__main__":
    main()
