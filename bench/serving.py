"""python -m bench.serving: vLLM with a selection beside plain vLLM of the same version and flags.

    python -m bench.serving MODEL --method peak --layer 7 --keep 0.1 --devices 0 1

MODEL is a folder; with ``--dummy`` it needs a config.json alone. Two engines with the same memory
for caches are measured at the same time, each on a GPU of its own, or one after the other where
``--devices`` names one. Compiled, with CUDA graphs and prefix caching, as vLLM's server runs them.

What is measured: the time to the first token of one prompt of each length, the median of several;
many prompts at once, until the last of them has its first token, and each token after that; a
question about a text that the engine has just read; and, in the engine with a selection, the same
for requests of which nothing is dropped. How many prompts fit the caches is vLLM's own arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import record
from bench.machine import machine

RESULT = Path(__file__).parent / "results" / "serving.json"
NEW_TOKENS = 64  # after the first, with many prompts at once
QUESTION, ANSWER = 500, 256  # tokens of a question about a text, and of an answer that is to fit
CACHE_GIB = 90


def prompt(draw: random.Random, length: int) -> list[int]:
    """Tokens at random: no prompt begins like another."""
    return [draw.randrange(1000, 30_000) for _ in range(length)]


class Client:
    """Requests to an engine in this process, timed from here.

    Args:
        llm: the engine.
        asks: what each request says of the selection, if anything.
    """

    def __init__(self, llm: Any, asks: dict[str, Any] | None = None) -> None:
        self.llm, self.asks = llm, asks
        self.draw = random.Random(json.dumps(asks))
        self.asked = 0

    def run(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        """Seconds until the last prompt has its first token, and from then to the last token."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, waiting = self.llm.llm_engine, set()
        begin = time.perf_counter()
        for ids in prompts:
            self.asked += 1
            name = f"{id(self)}-{self.asked}"
            waiting.add(name)
            params = SamplingParams(
                temperature=0,
                max_tokens=new,
                ignore_eos=True,
                detokenize=False,
                extra_args=self.asks,
                output_kind=RequestOutputKind.DELTA,
            )
            engine.add_request(name, {"prompt_token_ids": ids}, params)
        first = begin
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.request_id in waiting and output.outputs[0].token_ids:
                    waiting.discard(output.request_id)
                    first = time.perf_counter()
        return first - begin, time.perf_counter() - first

    def first_token(self, length: int, times: int) -> list[float]:
        """Seconds to the first token of a prompt, several times after one more."""
        return [self.run([prompt(self.draw, length)], 1)[0] for _ in range(times + 1)][1:]

    def hit(self, length: int, times: int) -> list[float]:
        """Seconds to the first token of a question about a text that was read before."""
        text = prompt(self.draw, length)
        return [self.run([text + prompt(self.draw, QUESTION)], 1)[0] for _ in range(times + 2)][2:]


def measure(client: Client, options: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one kind of requests, in seconds."""
    many = [prompt(client.draw, options.many_tokens) for _ in range(options.many)]
    first = {n: client.first_token(n, 4 if n <= 16_384 else 2) for n in options.tokens}
    prefill, decode = client.run(many, NEW_TOKENS + 1)
    return {
        "first_token": {n: statistics.median(each) for n, each in first.items()},
        "first_token_all": first,
        "hit": statistics.median(client.hit(options.shared, 3)),
        "many_prefill": prefill,
        "per_token": decode / NEW_TOKENS,
    }


def fitting(llm: Any, options: argparse.Namespace) -> float:
    """How many prompts of ``many_tokens`` with their answers fit the caches at once."""
    from claa_ops.vllm.capacity import Capacity

    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    return Capacity.of(manager.kv_cache_config, options.many_tokens, ANSWER).at_once


def child(options: argparse.Namespace) -> None:
    """One engine: says that it is ready, waits for a line, measures, prints what it found."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    settings: dict[str, Any] = {"model": options.model}
    if options.child == "claa":
        from claa_ops.vllm import engine_args

        settings = engine_args(
            options.model, method=options.method, layer=options.layer, keep=options.keep
        )
    if options.dummy:
        settings |= {"load_format": "dummy", "skip_tokenizer_init": True}
    llm = LLM(
        **settings,
        dtype="bfloat16",
        max_model_len=max(*options.tokens, options.many_tokens, options.shared + QUESTION) + 512,
        max_num_batched_tokens=options.batched_tokens,
        max_num_seqs=max(32, options.many),
        kv_cache_memory_bytes=int(options.cache_gib * 2**30),
        tensor_parallel_size=options.tensor_parallel,
        disable_log_stats=True,
    )
    Client(llm).run([prompt(random.Random(0), options.many_tokens)], 2)
    print("ready", flush=True)
    sys.stdin.readline()
    found: dict[str, Any] = {options.child: measure(Client(llm), options)}
    if options.child == "claa":
        found["nothing pruned"] = measure(Client(llm, {"claa_keep": "all"}), options)
    if options.tensor_parallel == 1:
        found[options.child]["fit"] = fitting(llm, options)
    print("found " + json.dumps(found), flush=True)


def start(kind: str, device: str) -> subprocess.Popen[str]:
    """A child for one kind of engine on one device."""
    command = [sys.executable, "-m", "bench.serving", *sys.argv[1:], "--child", kind]
    return subprocess.Popen(
        command,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": device},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def until(process: subprocess.Popen[str], word: str) -> str:
    """What follows this word at the beginning of a line that a child prints."""
    assert process.stdout is not None  # asked for
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise SystemExit(f"bench.serving: an engine ended before it said {word!r}")


def go(process: subprocess.Popen[str]) -> None:
    """Let a child that is ready begin."""
    assert process.stdin is not None  # asked for
    process.stdin.write("go\n")
    process.stdin.flush()


def measured(devices: list[str]) -> dict[str, Any]:
    """Both kinds of engines, at once if each has a device."""
    found: dict[str, Any] = {}
    together = len(devices) > 1 and "," not in devices[0]
    kinds = list(zip(("plain", "claa"), devices if together else devices[:1] * 2, strict=True))
    for several in [kinds] if together else [[kind] for kind in kinds]:
        children = [start(kind, device) for kind, device in several]
        for each in children:
            until(each, "ready")
        for each in children:
            go(each)
        for each in children:
            found |= json.loads(until(each, "found"))
            each.wait()
    return found


def table(found: dict[str, Any]) -> list[str]:
    """A line for each measure: plain, with the selection, and nothing pruned, as ratios."""
    plain, pruned, whole = (found[kind] for kind in ("plain", "claa", "nothing pruned"))

    def line(name: str, value: Any) -> str:
        base = value(plain)
        return (
            f"{name:<34}{base:>12.4g}{value(pruned):>12.4g}{value(pruned) / base:>9.3f}"
            f"{value(whole) / base:>16.3f}"
        )

    lines = [f"{'':<34}{'plain':>12}{'selection':>12}{'ratio':>9}{'nothing pruned':>16}"]
    for n in plain["first_token"]:
        lines.append(line(f"first token, {int(n):,} tokens, s", lambda k, n=n: k["first_token"][n]))
    lines.append(line("first token after a hit, s", lambda k: k["hit"]))
    lines.append(line("many prompts, first tokens, s", lambda k: k["many_prefill"]))
    lines.append(line("a token of all of them, s", lambda k: k["per_token"]))
    if "fit" in plain:
        lines.append(
            f"{'prompts that fit':<34}{plain['fit']:>12.4g}{pruned['fit']:>12.4g}"
            f"{pruned['fit'] / plain['fit']:>9.3f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--method", default="peak")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32_768, 131_072])
    parser.add_argument("--many", type=int, default=16, help="prompts at once")
    parser.add_argument("--many-tokens", type=int, default=32_768)
    parser.add_argument("--shared", type=int, default=16_384, help="tokens of a text read before")
    parser.add_argument("--batched-tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--cache-gib", type=float, default=CACHE_GIB, help="for caches")
    parser.add_argument("--devices", nargs="+", default=["0"], help="0 1, or 0,1 for both in one")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--dummy", action="store_true", help="random weights")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", choices=["plain", "claa"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    found = measured(options.devices)
    rows = [{"requests": kind, **each} for kind, each in found.items()]
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "child", "devices")}
    described = machine("cuda") | {"vllm": version("vllm")}
    record.write(options.out, {"machine": described, "settings": settings, "rows": rows})
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
