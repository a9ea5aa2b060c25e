"""The ops on a GPU: absolute times, as nodes of a CUDA graph, with cold caches.

A call of a few microseconds is shorter than its launch, and an event around it shows the launch. So
a graph of a hundred calls is replayed between two events, and its time divided by their number;
nothing is subtracted. Each call has inputs of its own, or they take turns over as many as fill the
caches several times; each output has memory of its own; a read of 256 MiB before the replay evicts
what the last one left. So no call finds its inputs in a cache. The smallest node, timed the same
way, is printed too.

The scores are timed with warm caches too: as nodes on one input, whose keys stay in the L2 cache
where it has the room, and as calls in a row from Python.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import cycle, islice

import torch

from bench.cases import LLAMA, Case
from bench.cuda_cases import cases, layer
from bench.harness import BUFFER_BYTES, Call, Timing, summary

NODES, REPLAYS, CALLS = 100, 7, 25
GRAPH_MS = 20  # long calls: as many as take this long together, but at least 8
LAYERS = 16  # sets of a layer's inputs: 268 MB of keys at 8k
TOKENS = (8192, 32_768, 131_072)
WARM = ("score_tokens", "score_window", "score_layer")  # timed with warm caches too
HEADER = (
    f"{'op':<21}{'shape':<18}{'note':<30}{'ours us':>9}  {'[p10..p90]':<16}"
    f"{'floor':>8}{'x floor':>9}"
    f"{'GB/s':>7}{'torch us':>10}{'/torch':>8}{'eager us':>10}{'/eager':>8}"
    f"{'called: ours':>14}{'eager':>9}{'/eager':>8}"
)


def timed(call: Call, *, is_cold: bool = True) -> float:
    """Milliseconds of a call. The eviction before a cold one hides the latency of its launch."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if is_cold:
        evict()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def evict() -> None:
    """Fill the caches with unrelated lines, none of which must be written back."""
    buffer, total = _unrelated()
    torch.sum(buffer, dim=0, out=total)


@cache
def _unrelated() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(BUFFER_BYTES // 4, device="cuda"), torch.empty((), device="cuda")


class Graph:
    """Calls captured one after the other.

    The results of cold calls are kept, so each has memory of its own; warm ones share theirs.
    """

    def __init__(self, calls: Sequence[Call], *, is_cold: bool) -> None:
        calls[0]()  # warm up: modules load, libraries choose their kernels
        self.nodes = min(len(calls), max(8, int(GRAPH_MS / timed(calls[0]))))
        self.graph = torch.cuda.CUDAGraph()
        self.results = []
        with torch.cuda.graph(self.graph):
            for call in calls[: self.nodes]:
                result = call()
                if is_cold:
                    self.results.append(result)


def node_times(calls: Mapping[str, Sequence[Call]], *, is_cold: bool = True) -> dict[str, Timing]:
    """What a call costs as a node, in milliseconds, by name.

    Under a name is the same call on several inputs, which the nodes take in turn. The graphs are
    replayed in turn too, so that a slow moment affects all of them.
    """
    graphs = {
        name: Graph(list(islice(cycle(same), NODES)), is_cold=is_cold)
        for name, same in calls.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for replay in range(REPLAYS + 1):
        for name, graph in graphs.items():
            spent = timed(graph.graph.replay, is_cold=is_cold)
            if replay:  # the first uploads the graph
                samples[name].append(spent / graph.nodes)
    return {name: summary(times) for name, times in samples.items()}


def called_times(calls: Mapping[str, Call]) -> dict[str, Timing]:
    """What each call costs as Python makes it, launches and all, in milliseconds."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(CALLS):
        for name, call in calls.items():
            samples[name].append(timed(call))
    return {name: summary(times) for name, times in samples.items()}


def row_times(calls: Mapping[str, Call]) -> dict[str, Timing]:
    """What one of many calls in a row takes: its launches or its kernels, the longer of them."""
    samples = {}
    for name, call in calls.items():
        count = min(CALLS, max(2, int(GRAPH_MS / timed(call))))
        row = partial(_in_a_row, call, count)
        samples[name] = [timed(row, is_cold=False) / count for _ in range(REPLAYS)]
    return {name: summary(times) for name, times in samples.items()}


def _in_a_row(call: Call, count: int) -> None:
    for _ in range(count):
        call()


def sets_of(make: Callable[[], Case]) -> list[Case]:
    """The same case on as many inputs as fill the caches several times."""
    case = make()
    count = min(max(4, BUFFER_BYTES // case.min_bytes), NODES)
    return [case, *(make() for _ in range(count - 1))]


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
    timings = node_times({name: [call] for name, call in calls.items()})
    ms = {name: timing.median for name, timing in timings.items()}
    return {
        "copy_gbps": 2 * source.nbytes / ms["copy_gbps"] / 1e6,
        "read_gbps": source.nbytes / ms["read_gbps"] / 1e6,
        "matmul_tflops": 2 * 8192**3 / ms["matmul_tflops"] / 1e9,
        "node_us": ms["node_us"] * 1e3,
    }


def floor_ms(case: Case) -> float:
    """The larger of moving the bytes and multiplying; never less than an empty node."""
    roof = roofs()
    read = case.min_bytes - case.outputs
    rate = roof["read_gbps"] if read > 4 * case.outputs else roof["copy_gbps"]
    multiply = case.flops / roof["matmul_tflops"] / 1e9
    return max(case.min_bytes / rate / 1e6, multiply, roof["node_us"] / 1e3)


def line_of(sets: list[Case]) -> dict:
    """Measure one case, as nodes and as called from Python."""
    case = sets[0]
    calls = {"ours": [each.ours for each in sets], "eager": [each.eager for each in sets]}
    if case.builtin is not None:
        calls["torch"] = [each.builtin for each in sets if each.builtin is not None]
    nodes = node_times(calls)
    once = {"ours": case.ours, "eager": case.eager}
    called = called_times(once)
    warm = {}
    if case.op in WARM:
        same = {name: [call] for name, call in once.items()}
        warm["warm_ms"] = node_times(same, is_cold=False)
        warm["called_warm_ms"] = row_times(once)
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
        **{how: {name: t._asdict() for name, t in times.items()} for how, times in warm.items()},
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
        f"{line['op']:<21}{line['shape']:<18}{line['note']:<30}{us['ours']:>9.2f}  {spread:<16}"
        f"{line['floor_ms'] * 1e3:>8.2f}{line['times_floor']:>9.2f}{line['gbps']:>7.0f}"
        f"{torch_us:>10}{torch_ratio:>8}{us['eager']:>10.1f}{line['speedup']['eager']:>7.1f}x"
        f"{called['ours']:>14.1f}{called['eager']:>9.1f}{line['called_speedup']:>7.1f}x"
    )


def printed_warm(line: dict) -> str:
    """The warm-cache numbers of a line."""
    parts = []
    for how, name in (("warm_ms", "nodes"), ("called_warm_ms", "calls in a row")):
        ours, eager = (line[how][side]["median"] * 1e3 for side in ("ours", "eager"))
        parts.append(f"{name} {ours:.2f} us, eager {eager:.1f} us, {eager / ours:.1f}x")
    return f"{'':<21}with warm caches: {'; '.join(parts)}"


def layer_line(tokens: int) -> dict:
    """What a layer runs one after the other, and the share of each step."""
    sets = [layer(tokens) for _ in range(LAYERS)]
    names = [name for name in sets[0] if name != "score_layer"]
    sequences = {"layer": names, "fused": ["score_layer", "select_topk"]}
    sequences |= {f"without {name}": [step for step in names if step != name] for name in names}
    calls = {name: [partial(_run, steps, of) for steps in sets] for name, of in sequences.items()}
    us = {name: timing.median * 1e3 for name, timing in node_times(calls).items()}
    share = {name: 1 - us[f"without {name}"] / us["layer"] for name in names}
    return {"tokens": tokens, "us": us, "share": share}


def _run(steps: Mapping[str, Call], names: list[str]) -> list:
    return [steps[name]() for name in names]


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
        "cold caches. Warm caches only where it says so.\n" + HEADER
    )
    tokens = TOKENS[:1] if quick else TOKENS
    lines, memory = [], []
    for op in ops:
        for make in cases(op, tokens):
            sets = sets_of(make)
            lines.append(line_of(sets))
            print(printed(lines[-1]), flush=True)
            if "warm_ms" in lines[-1]:
                print(printed_warm(lines[-1]), flush=True)
            if op == "score_tokens" and sets[0].shape.tokens == tokens[-1]:
                memory.append(memory_line(sets[0]))
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
        print(
            f"layer of {LLAMA.name}, {count // 1024}k: {line['us']['layer']:.1f} us, with "
            f"score_layer {line['us']['fused']:.1f} us; {shares}"
        )
        yield line
