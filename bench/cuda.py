"""The ops on a GPU: absolute times, as nodes of a CUDA graph, with cold caches.

A call of a few microseconds is shorter than its launch, and an event around it shows the launch.
So a graph of many [evict, call] is replayed, and beside it a graph of as many [evict]: what one
call adds is their difference over their number. To evict is to read 256 MiB: the caches are then
full of clean lines, which cost nothing to throw away.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch

from bench.cases import LLAMA, Case
from bench.cuda_cases import cases, layer
from bench.harness import BUFFER_BYTES, Call, Timing, summary

NODES, REPLAYS, CALLS = 20, 11, 25
TOKENS = (8192, 32_768, 131_072)
HEADER = (
    f"{'op':<17}{'shape':<18}{'note':<17}{'ours us':>9}  {'[p10..p90]':<16}"
    f"{'floor':>8}{'x floor':>9}"
    f"{'GB/s':>7}{'torch us':>10}{'/torch':>8}{'eager us':>10}{'/eager':>8}"
    f"{'called: ours':>14}{'eager':>9}{'/eager':>8}"
)


class Graph:
    """A number of [evict, call], captured once and replayed."""

    def __init__(self, call: Call, evict: Call, nodes: int) -> None:
        call()  # warm up: modules load, libraries choose their kernels
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(nodes):
                evict()
                call()

    def replay_ms(self) -> float:
        """Replay once; its time on the device."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def eviction() -> Call:
    """A call that leaves nothing of others in the caches, and nothing that must be written."""
    buffer = torch.ones(BUFFER_BYTES // 4, device="cuda")
    total = torch.empty((), device="cuda")
    return lambda: torch.sum(buffer, dim=0, out=total)


def node_times(calls: Mapping[str, Call], *, nodes: int = NODES) -> dict[str, Timing]:
    """What each call costs as a node of a graph, in milliseconds; all replayed in turn."""
    evict = eviction()
    without = Graph(lambda: None, evict, nodes)
    graphs = {name: Graph(call, evict, nodes) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for replay in range(REPLAYS + 1):
        empty = without.replay_ms()
        for name, graph in graphs.items():
            spent = graph.replay_ms()
            if replay:  # the first uploads the graph
                samples[name].append((spent - empty) / nodes)
    return {name: summary(times) for name, times in samples.items()}


def called_times(calls: Mapping[str, Call]) -> dict[str, Timing]:
    """What each call costs as Python makes it, launches and all, in milliseconds."""
    evict = eviction()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(CALLS):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            evict()
            begin.record()  # behind the eviction, which hides the way to the first launch
            call()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end))
    return {name: summary(times) for name, times in samples.items()}


def node_us(call: Call) -> float:
    """Microseconds of one node."""
    return node_times({"": call})[""].median * 1e3


@cache
def roofs() -> dict[str, float]:
    """What this GPU can do: GB/s copied (read + written) and read, bf16 TFLOP/s, an empty node."""
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    total = torch.empty((), device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    calls = {
        "copy_gbps": lambda: torch.neg(source, out=target),  # copy_ is no kernel but a memcpy node
        "read_gbps": lambda: torch.sum(source, dim=0, out=total),
        "matmul_tflops": lambda: torch.mm(a, b, out=product),
        "node_us": lambda: torch.cuda._sleep(0),  # a kernel that does nothing
    }
    ms = {name: timing.median for name, timing in node_times(calls, nodes=4).items()}
    return {
        "copy_gbps": 2 * source.nbytes / ms["copy_gbps"] / 1e6,
        "read_gbps": source.nbytes / ms["read_gbps"] / 1e6,
        "matmul_tflops": 2 * 8192**3 / ms["matmul_tflops"] / 1e9,
        "node_us": node_us(calls["node_us"]),
    }


def floor_ms(case: Case) -> float:
    """The larger of moving the bytes and multiplying; never less than an empty node."""
    roof = roofs()
    read = case.min_bytes - case.outputs
    rate = roof["read_gbps"] if read > 4 * case.outputs else roof["copy_gbps"]
    multiply = case.flops / roof["matmul_tflops"] / 1e9
    return max(case.min_bytes / rate / 1e6, multiply, roof["node_us"] / 1e3)


def line_of(case: Case) -> dict:
    """Measure one case, as nodes and as called from Python."""
    calls: dict[str, Call] = {"ours": case.ours}
    if case.builtin is not None:
        calls["torch"] = case.builtin
    nodes = node_times(calls) | node_times({"eager": case.eager}, nodes=4)
    called = called_times({"ours": case.ours, "eager": case.eager})
    floor = floor_ms(case)
    return {
        "op": case.op,
        "shape": str(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "note": case.note,
        "node_ms": {name: timing._asdict() for name, timing in nodes.items()},
        "called_ms": {name: timing._asdict() for name, timing in called.items()},
        "speedup": {n: t.median / nodes["ours"].median for n, t in nodes.items() if n != "ours"},
        "called_speedup": called["eager"].median / called["ours"].median,
        "min_bytes": case.min_bytes,
        "flops": case.flops,
        "gbps": case.min_bytes / nodes["ours"].median / 1e6,
        "floor_ms": floor,
        "times_floor": nodes["ours"].median / floor,
    }


def printed(line: dict) -> str:
    """One line of the table, in microseconds."""
    us = {name: timing["median"] * 1e3 for name, timing in line["node_ms"].items()}
    called = {name: timing["median"] * 1e3 for name, timing in line["called_ms"].items()}
    ours = line["node_ms"]["ours"]
    spread = f"[{ours['p10'] * 1e3:.1f}..{ours['p90'] * 1e3:.1f}]"
    torch_us = f"{us['torch']:.1f}" if "torch" in us else ""
    torch_ratio = f"{line['speedup']['torch']:.2f}x" if "torch" in us else ""
    return (
        f"{line['op']:<17}{line['shape']:<18}{line['note']:<17}{us['ours']:>9.2f}  {spread:<16}"
        f"{line['floor_ms'] * 1e3:>8.2f}{line['times_floor']:>9.2f}{line['gbps']:>7.0f}"
        f"{torch_us:>10}{torch_ratio:>8}{us['eager']:>10.1f}{line['speedup']['eager']:>7.1f}x"
        f"{called['ours']:>14.1f}{called['eager']:>9.1f}{line['called_speedup']:>7.1f}x"
    )


def layer_line(tokens: int) -> dict:
    """What a layer runs one after the other, and what the aggregation is of it."""
    steps = layer(tokens)

    def run(*names: str) -> Callable[[], None]:
        def call() -> None:
            for name in names:
                steps[name]()

        return call

    names = list(steps)
    calls = {"layer": run(*names)}
    calls |= {f"without {name}": run(*(n for n in names if n != name)) for name in names}
    us = {name: timing.median * 1e3 for name, timing in node_times(calls).items()}
    share = {name: 1 - us[f"without {name}"] / us["layer"] for name in names}
    return {"tokens": tokens, "us": us, "share": share}


def peak_bytes(call: Call) -> int:
    """What a call allocates at its peak, its output included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory_line(case: Case) -> dict:
    """Peak extra memory of one call, eager and ours."""
    return {
        "op": case.op,
        "shape": str(case.shape),
        "note": case.note,
        "bytes": {"eager": peak_bytes(case.eager), "ours": peak_bytes(case.ours)},
    }


def report(ops: list[str], quick: bool) -> dict:
    """Measure and print everything."""
    roof = roofs()
    print(
        f"roofs: copy {roof['copy_gbps']:.0f} GB/s (read + written), read {roof['read_gbps']:.0f} "
        f"GB/s, bf16 matmul {roof['matmul_tflops']:.0f} TFLOP/s, smallest node "
        f"{roof['node_us']:.2f} us\n"
        "us: as a node of a CUDA graph, cold caches. called: from Python, events around the call, "
        "cold caches.\n" + HEADER
    )
    tokens = TOKENS[:1] if quick else TOKENS
    lines, memory = [], []
    for op in ops:
        for case in cases(op, tokens):
            lines.append(line_of(case))
            print(printed(lines[-1]), flush=True)
            if op == "score_tokens" and case.shape.tokens == tokens[-1]:
                memory.append(memory_line(case))
    for line in memory:
        mib = {name: size / 2**20 for name, size in line["bytes"].items()}
        print(
            f"peak extra memory of {line['op']}, {line['shape']}, {line['note']}: "
            f"eager {mib['eager']:.0f} MiB, ours {mib['ours']:.1f} MiB"
        )
    layers = list(layer_lines(tokens)) if "aggregate_scores" in ops else []
    return {"roofs": roof, "lines": lines, "layers": layers, "memory": memory}


def layer_lines(tokens: tuple[int, ...]) -> Iterator[dict]:
    """Measure and print the sequences of a layer."""
    for count in tokens:
        line = layer_line(count)
        shares = ", ".join(f"{name} {share:.1%}" for name, share in line["share"].items())
        print(f"layer of {LLAMA.name}, {count // 1024}k: {line['us']['layer']:.1f} us; {shares}")
        yield line
