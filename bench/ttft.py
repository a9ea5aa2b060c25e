"""python -m bench.ttft: time to the first token of whole models, with and without selection.

Random weights in the shapes of known models, bfloat16, one prompt. Every row of the table is
measured in this run, on the same model: full prefill with the fastest SDPA back end, and each
method at each keep rate. They run in turn, there and back, after a warm-up that brings the GPU to
its power limit: its clock falls as it warms, and differs from kernel to kernel. So the ratio is
that of sums, and the clock is printed too. Beyond 64k tokens each runs once: its clock no longer
falls, and two runs differ by 0.2 %.

A ratio is to full prefill in the same mode: ``eager``; with norms and MLPs compiled (``parts``),
which takes seconds; with the whole model compiled (``compile``), which takes a minute for each
method and length; and each of them replayed as one CUDA graph.

Beside the time stand the multiply-adds of the layers as a share of full prefill's, and what the
kernels of this library take, a sum over a profiled run in eager mode. A step of decoding is
replayed as a CUDA graph, but on several GPUs, where Python's own time counts.
"""

import argparse
import gc
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel

from bench import record
from bench.machine import machine
from bench.shapes import MODELS, build
from claa_ops.evaluate.spec import MethodSpec
from claa_ops.huggingface.work import count_work
from claa_ops.methods import Method
from claa_ops.prefill import ClaaCache, attach, prefill
from claa_ops.selection import Work

RESULT = Path(__file__).parent / "results" / "ttft.json"
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
MODES = ("eager", "graph", "parts", "parts-graph", "compile", "compile-graph")
FULL = "full"
WARM_UP_SECONDS = 2.0
CLOCK_SECONDS = 0.01  # between two readings
DECODE_REPLAYS = 5
HEADER = (
    f"{'model':<18}{'tokens':>7}  {'mode':<14}{'prefill':<32}{'TTFT ms':>9}{'ratio':>8}"
    f"{'of ops':>8}{'peak GiB':>10}{'cache GiB':>11}{'decode ms':>11}{'MHz':>6}{'ops ms':>8}"
    f"{'of full':>9}"
)


def contestants(
    specifications: Sequence[str], keeps: Sequence[int], num_layers: int
) -> dict[str, Method | None]:
    """Full prefill, and each method at each rate, by their labels.

    Args:
        specifications: methods as :class:`MethodSpec` reads them; one that states ``keep`` is
            measured at that rate alone.
        keeps: rates in percent.
        num_layers: of the model.
    """
    found: dict[str, Method | None] = {FULL: None}
    for text in specifications:
        spec = MethodSpec.parse(text)
        if spec.name == FULL:
            continue
        if spec.has("keep"):
            each = {f"{text} {keep} %": spec.make(num_layers, keep=keep / 100) for keep in keeps}
        else:
            each = {text: spec.make(num_layers)}
        found |= each
    return found


def prefilled(model: PreTrainedModel, ids: Tensor, method: Method | None) -> Any:
    """The cache after the prompt."""
    if method is not None and (method.two_pass or method.needs_ranking):
        return prefill(model, ids, method).cache
    cache = DynamicCache() if method is None else ClaaCache(model.config, method)
    model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def work_of_layers(work: Work) -> int:
    """Multiply-adds without those of the head."""
    return work.linear + work.attention


def fastest_backend(model: PreTrainedModel, tokens: int) -> SDPBackend:
    """Causal attention of one layer by each back end of SDPA, after a warm-up."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    query, key, value = (
        torch.randn(1, tokens, h, config.head_dim, device="cuda", dtype=torch.bfloat16)
        for h in (heads, kv_heads, kv_heads)
    )
    layout = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    spent = {}
    for backend in BACKENDS:
        with sdpa_kernel(backend):
            for _ in range(2):
                spent[backend], *_ = timed(
                    lambda: F.scaled_dot_product_attention(*layout, is_causal=True, enable_gqa=True)
                )
    return min(spent, key=lambda backend: spent[backend])


def synchronize() -> None:
    """Wait for every GPU."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The peak of memory in the block, in bytes, over all GPUs; the list is filled at its end."""
    devices, peak = range(torch.cuda.device_count()), []
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    peak.append(sum(map(torch.cuda.max_memory_allocated, devices)))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds until the last kernel's end, and the result."""
    synchronize()
    begin = time.perf_counter()
    result = call()
    synchronize()
    return (time.perf_counter() - begin) * 1e3, result


def cache_bytes(cache: Any) -> int:
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def decode_ms(model: PreTrainedModel, cache: Any, as_graph: bool) -> float:
    """One more token; as a CUDA graph Python's own time does not count."""
    token = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    held = [(layer.keys, layer.values) for layer in cache.layers]

    def step() -> None:
        for layer, (keys, values) in zip(cache.layers, held, strict=True):
            layer.keys, layer.values = keys, values  # what the prefill left
        model(token, past_key_values=cache)

    step()  # libraries choose their kernels for these sizes now, not while capturing
    replay: Callable[[], None] = captured(step)[0] if as_graph else step
    return statistics.median(timed(replay)[0] for _ in range(DECODE_REPLAYS))


def captured(call: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], int]:
    """The call as one CUDA graph, whose outputs nobody reads; and the peak of its memory."""
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with peak_memory() as peak, torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay, peak[0]


def alone(model: PreTrainedModel, ids: Tensor, method: Method | None) -> dict[str, Any]:
    """What a prefill leaves and takes whatever the mode, with all kernels chosen for its sizes."""
    full = count_work(model, [ids.shape[1]] * model.config.num_hidden_layers)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        if method is None:
            cache, work = prefilled(model, ids, None), full
        else:
            result = prefill(model, ids, method)
            cache, work = result.cache, result.work
            del result
        synchronize()
    kernels = {
        event.key: event.self_device_time_total / 1e3
        for event in profiled.key_averages()
        if "claa" in event.key
    }
    return {
        "operations": work_of_layers(work) / work_of_layers(full),
        "cache_bytes": cache_bytes(cache),
        "decode_ms": decode_ms(model, cache, as_graph=not hasattr(model, "hf_device_map")),
        "kernels_ms": kernels,
        "ops_ms": sum(kernels.values()),
    }


def runner(
    mode: str, model: PreTrainedModel, ids: Tensor, method: Method | None, pool: Any
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A prefill in one of ``MODES``, ready to be timed, and what making it ready took."""
    facts: dict[str, Any] = {}
    call: Callable[[], Any] = partial(prefilled, model, ids, method)
    if mode.startswith("parts"):
        facts["compile_s"] = timed(call)[0] / 1e3
    if mode.startswith("compile"):
        if method is not None and (method.two_pass or method.needs_ranking):
            raise RuntimeError("a method with two forwards is not one graph")
        compiled: Any = torch.compile(model, fullgraph=True, dynamic=False)
        call = partial(prefilled, compiled, ids, method)
        facts["compile_s"] = timed(call)[0] / 1e3
    if mode.endswith("graph"):
        call, facts["peak_bytes"] = captured(call, pool)
    return call, facts


@contextmanager
def compiled_parts(model: PreTrainedModel) -> Iterator[None]:
    """Norms and MLPs compiled, each by itself: those of all layers are one graph."""
    decoder: Any = model.get_decoder()
    parts = [decoder.norm]
    for layer in decoder.layers:
        parts += [layer.input_layernorm, layer.post_attention_layernorm, layer.mlp]
    for part in parts:
        part.compile(fullgraph=True, dynamic=False)
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None


@contextmanager
def clock_readings() -> Iterator[list[int]]:
    """The clock of the multiprocessors in MHz, read repeatedly while the block runs."""
    readings: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not readings or not done.wait(CLOCK_SECONDS):
            readings.append(torch.cuda.clock_rate())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield readings
    finally:
        done.set()
        reader.join()


def turns(labels: list[str], tokens: int) -> list[str]:
    """The order A B C C B A, more rounds for short prompts; the longest run once, A B C."""
    there_and_back = min(10, 65_536 // tokens)
    return (labels + labels[::-1]) * there_and_back if there_and_back else labels


def measured(
    model: PreTrainedModel,
    ids: Tensor,
    mode: str,
    methods: dict[str, Method | None],
) -> dict[str, dict[str, Any]]:
    """The times of the methods in one mode, by label; those that it cannot run are left out.

    Without full prefill there is nothing to compare with, and all are left out.
    """
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    pool = torch.cuda.graph_pool_handle()
    for label, method in methods.items():
        try:
            calls[label], facts = runner(mode, model, ids, method, pool)
        except RuntimeError as error:
            print(f"{label} does not run in mode {mode}: {str(error).splitlines()[0]}", flush=True)
            if label == FULL:
                return {}
            continue
        rows[label] = facts | {"runs_ms": [], "clock_mhz": []}
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_UP_SECONDS:
        timed(calls[FULL])
    for label in turns(list(calls), ids.shape[1]):
        row = rows[label]
        with clock_readings() as clock, peak_memory() as peak:
            row["runs_ms"].append(timed(calls[label])[0])
        row.setdefault("peak_bytes", peak[0])
        row["clock_mhz"] += clock
    for row in rows.values():
        row["ttft_ms"] = statistics.mean(row["runs_ms"])
        row["clock_mhz"] = statistics.mean(row["clock_mhz"])
    return rows


def rows(
    model: PreTrainedModel, ids: Tensor, modes: Sequence[str], methods: dict[str, Method | None]
) -> Iterator[dict]:
    """Measure one model at one length, a mode after the other."""
    backend = fastest_backend(model, ids.shape[1])
    with sdpa_kernel(backend):
        facts = {label: alone(model, ids, method) for label, method in methods.items()}
        for mode in modes:
            with compiled_parts(model) if mode.startswith("parts") else nullcontext():
                found = measured(model, ids, mode, methods)
            for label, row in found.items():
                full = found[FULL]["ttft_ms"]
                about = {"mode": mode, "prefill": label, "backend": backend.name}
                ratio = row["ttft_ms"] / full
                of_full = {"ops_of_full": facts[label]["ops_ms"] / full}
                yield about | {"ratio": ratio} | facts[label] | of_full | row
            del found
            gc.collect()
            torch.cuda.empty_cache()


def printed(row: dict) -> str:
    """One line of the table."""
    return (
        f"{row['model']:<18}{row['tokens']:>7}  {row['mode']:<14}{row['prefill']:<32}"
        f"{row['ttft_ms']:>9.1f}{row['ratio']:>8.3f}{row['operations']:>8.3f}"
        f"{row['peak_bytes'] / 2**30:>10.1f}{row['cache_bytes'] / 2**30:>11.2f}"
        f"{row['decode_ms']:>11.2f}{row['clock_mhz']:>6.0f}{row['ops_ms']:>8.2f}"
        f"{row['ops_of_full']:>9.2%}"
    )


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ttft", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["Llama-3.1-8B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32_768, 131_072])
    parser.add_argument(
        "--prefill",
        nargs="+",
        action="extend",
        metavar="METHOD",
        help="NAME or NAME:SETTING=VALUE:..., beside full prefill; default claa and peak:layer=7",
    )
    parser.add_argument("--keep", nargs="+", type=int, default=[10], help="percent")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["eager"])
    parser.add_argument(
        "--gpus", type=int, default=1, help="spread the layers over as many; eager alone"
    )
    parser.add_argument("--commit", help="the commit, for sources that are not a git checkout")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file, added to")
    arguments = parser.parse_args()
    if arguments.gpus > 1 and arguments.mode != ["eager"]:
        parser.error("--mode must be eager with several GPUs, whose layers run from Python")
    return arguments


@torch.no_grad()
def main() -> None:
    arguments = parsed_arguments()
    # Every method at every length is a graph of the same code.
    torch._dynamo.config.recompile_limit = 256
    about = machine("cuda", arguments.commit)
    print(", ".join(f"{name} {value}" for name, value in about.items()) + "\n" + HEADER)
    for name in arguments.models:
        model = attach(build(name, [f"cuda:{gpu}" for gpu in range(arguments.gpus)]))
        specifications = arguments.prefill or ["claa", "peak:layer=7"]
        methods = contestants(specifications, arguments.keep, model.config.num_hidden_layers)
        for tokens in arguments.tokens:
            ids = torch.randint(1, 1000, (1, tokens), device="cuda")
            place = {"model": name, "gpus": arguments.gpus, "tokens": tokens}
            found = []
            for row in rows(model, ids, arguments.mode, methods):
                found.append(place | row)
                print(printed(found[-1]), flush=True)
            add_to(arguments.out, about, found)
            torch.compiler.reset()
        del model
        gc.collect()
        torch.cuda.empty_cache()


def add_to(path: Path, about: dict, found: list[dict]) -> None:
    """Write the rows of one model at one length in place of older ones in the same modes.

    Each says on which device and of which commit it is. The rows stay sorted by model, length and
    mode, in whatever order they were measured.
    """
    before = json.loads(path.read_text())["rows"] if path.exists() else []

    def place(row: dict) -> tuple[int, int, int]:
        return list(MODELS).index(row["model"]), row["tokens"], MODES.index(row["mode"])

    replaced = {place(row) for row in found}
    kept = [row for row in before if place(row) not in replaced]
    marked = [{"device": about["device"], "commit": about["commit"]} | row for row in found]
    record.write(path, {"machine": about, "rows": sorted(kept + marked, key=place)})


if __name__ == "__main__":
    main()
