"""python -m bench.ttft: time to the first token of whole models, with and without selection.

Random weights in the shapes of known models, bfloat16, one prompt. Every row of the table is
measured in this run, on the same model: full prefill with the fastest SDPA back end; CLAA, with
half of the layers after the selection; and the same with the indices of an earlier run, so that
nothing is scored or selected ("free"). They run in turn, there and back, after a warm-up that
brings the GPU to its power limit: its clock falls as it warms, and differs from kernel to kernel.
So the ratio is that of sums, and the clock is printed too. Beyond 64k tokens each runs
once: its clock no longer falls, and two runs differ by 0.2 %. What the ops themselves cost is the
sum of their kernels' times in a profiled run.
"""

import argparse
import gc
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from bench import record
from bench.machine import machine
from claa_ops.methods import CLAA, Method
from claa_ops.prefill import ClaaCache, PrefillState, attach
from claa_ops.selection import Layer

RESULT = Path(__file__).parent / "results" / "ttft.json"
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
WARM_UP_SECONDS = 2.0
CLOCK_SECONDS = 0.01  # between two readings
DECODE_REPLAYS = 5
_LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        "llama",
        _LLAMA
        | {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "vocab_size": 128_256,
        },
    ),
    "Llama-3.2-3B": (
        "llama",
        _LLAMA
        | {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "vocab_size": 128_256,
            "tie_word_embeddings": True,
        },
    ),
    "Mistral-Nemo-12B": (
        "mistral",
        _LLAMA
        | {
            "hidden_size": 5120,
            "intermediate_size": 14_336,
            "num_hidden_layers": 40,
            "vocab_size": 131_072,
            "sliding_window": None,
        },
    ),
    "Qwen3-8B": (
        "qwen3",
        _LLAMA
        | {
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "vocab_size": 151_936,
        },
    ),
}
HEADER = (
    f"{'model':<18}{'tokens':>7}  {'prefill':<12}{'TTFT ms':>9}{'ratio':>8}{'peak GiB':>10}"
    f"{'cache GiB':>11}{'decode ms':>11}{'MHz':>6}{'ops ms':>8}{'of full':>9}"
)


@dataclass(frozen=True)
class Remembering(CLAA):
    """CLAA that records what each layer's cache kept and which tokens were selected."""

    kept: dict[int, Tensor | None] = field(default_factory=dict, compare=False)
    selected: dict[int, Tensor | None] = field(default_factory=dict, compare=False)

    def compress(self, state: PrefillState, layer: Layer) -> Tensor | None:
        """As CLAA."""
        self.kept[layer.index] = super().compress(state, layer)
        return self.kept[layer.index]

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """As CLAA."""
        self.selected[layer] = super().select(state, layer)
        return self.selected[layer]


@dataclass(frozen=True)
class Known(Method):
    """The decisions of an earlier prefill, at no cost but the gathers."""

    kept: dict[int, Tensor | None]
    selected: dict[int, Tensor | None]

    def compress(self, state: PrefillState, layer: Layer) -> Tensor | None:
        """What the cache kept then."""
        return self.kept[layer.index]

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """The tokens that were selected then."""
        return self.selected[layer]


def build(name: str, device: str, **changes: Any) -> PreTrainedModel:
    """A model of these shapes with random weights, made on its device."""
    family, sizes = MODELS[name]
    config = AutoConfig.for_model(family, max_position_embeddings=1 << 18, **(sizes | changes))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return attach(model.eval())


def selection_layer(model: PreTrainedModel) -> int:
    """The last of the first half of the layers: 15 of 32."""
    return model.config.num_hidden_layers // 2 - 1


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


def timed(call: Callable[[], Any]) -> tuple[float, int, Any]:
    """Milliseconds until the last kernel's end, the peak of memory in bytes, and the result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3, torch.cuda.max_memory_allocated(), result


def prefilled(model: PreTrainedModel, ids: Tensor, method: Method | None) -> Any:
    """The cache after the prompt."""
    cache = DynamicCache() if method is None else ClaaCache(model.config, method)
    model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def cache_bytes(cache: Any) -> int:
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def decode_ms(model: PreTrainedModel, cache: Any) -> float:
    """One more token, as a CUDA graph, so that Python's own time does not count."""
    token = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    held = [(layer.keys, layer.values) for layer in cache.layers]

    def step() -> None:
        for layer, (keys, values) in zip(cache.layers, held, strict=True):
            layer.keys, layer.values = keys, values  # what the prefill left
        model(token, past_key_values=cache)

    step()  # libraries choose their kernels for these sizes now, not while capturing
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return statistics.median(timed(graph.replay)[0] for _ in range(DECODE_REPLAYS))


def kernel_ms(call: Callable[[], object]) -> dict[str, float]:
    """What the kernels of this library take in one call, by name."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / 1e3
        for event in profiled.key_averages()
        if "claa" in event.key
    }


@contextmanager
def clock_readings() -> Iterator[list[int]]:
    """The clock of the multiprocessors in MHz, read repeatedly while the block runs."""
    readings: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.wait(CLOCK_SECONDS):
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


def rows(model: PreTrainedModel, name: str, tokens: int, keeps: list[int]) -> Iterator[dict]:
    """Measure one model at one length."""
    ids = torch.randint(1, 1000, (1, tokens), device="cuda")
    layer = selection_layer(model)
    backend = fastest_backend(model, tokens)
    with sdpa_kernel(backend):
        begin = time.perf_counter()
        first = Remembering(keep=keeps[0] / 100, layer=layer)
        kernels = kernel_ms(lambda: prefilled(model, ids, first))
        methods: dict[str, Method | None] = {"full": None}
        methods |= {f"CLAA {keep} %": CLAA(keep=keep / 100, layer=layer) for keep in keeps}
        methods[f"free {keeps[0]} %"] = Known(first.kept, first.selected)
        measured: dict[str, dict[str, Any]] = {}
        # Libraries choose their kernels for each number of tokens the first time: not timed.
        for label, method in methods.items():
            cache = prefilled(model, ids, method)
            sizes = {"cache_bytes": cache_bytes(cache), "decode_ms": decode_ms(model, cache)}
            measured[label] = sizes | {"runs_ms": [], "clock_mhz": []}
            del cache
        while time.perf_counter() - begin < WARM_UP_SECONDS:
            timed(lambda: prefilled(model, ids, None))
        for label in turns(list(methods), tokens):
            row, method = measured[label], methods[label]
            with clock_readings() as clock:
                ms, row["peak_bytes"], cache = timed(lambda m=method: prefilled(model, ids, m))
            del cache
            row["runs_ms"].append(ms)
            row["clock_mhz"] += clock
    ops = sum(kernels.values())
    full = measured["full"]["runs_ms"]
    measured[f"CLAA {keeps[0]} %"] |= {
        "ops_ms": ops,
        "ops_of_full": ops / statistics.mean(full),
        "kernels_ms": kernels,
    }
    for label, row in measured.items():
        row["ttft_ms"] = statistics.mean(row["runs_ms"])
        row["clock_mhz"] = statistics.mean(row["clock_mhz"])
        about = {"model": name, "tokens": tokens, "prefill": label, "backend": backend.name}
        yield about | {"ratio": row["ttft_ms"] / statistics.mean(full)} | row


def printed(row: dict) -> str:
    """One line of the table."""
    ops = f"{row['ops_ms']:>8.2f}{row['ops_of_full']:>9.2%}" if "ops_ms" in row else ""
    return (
        f"{row['model']:<18}{row['tokens']:>7}  {row['prefill']:<12}{row['ttft_ms']:>9.1f}"
        f"{row['ratio']:>8.3f}{row['peak_bytes'] / 2**30:>10.1f}{row['cache_bytes'] / 2**30:>11.2f}"
        f"{row['decode_ms']:>11.2f}{row['clock_mhz']:>6.0f}{ops}"
    )


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ttft", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["Llama-3.1-8B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32_768, 131_072])
    parser.add_argument("--keep", nargs="+", type=int, default=[10, 20, 40], help="percent")
    parser.add_argument("--commit", help="the commit, for sources that are not a git checkout")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file, added to")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    arguments = parsed_arguments()
    about = machine("cuda", arguments.commit)
    print(", ".join(f"{name} {value}" for name, value in about.items()) + "\n" + HEADER)
    for name in arguments.models:
        model = build(name, "cuda")
        for tokens in arguments.tokens:
            measured = []
            for row in rows(model, name, tokens, arguments.keep):
                measured.append(row)
                print(printed(row), flush=True)
            add_to(arguments.out, about, measured)
        del model
        gc.collect()
        torch.cuda.empty_cache()


def add_to(path: Path, about: dict, measured: list[dict]) -> None:
    """Write the rows of one model at one length, with their commit, in place of older ones.

    The rows stay sorted by model and length, in whatever order they were measured.
    """
    before = json.loads(path.read_text())["rows"] if path.exists() else []

    def place(row: dict) -> tuple[int, int]:
        return list(MODELS).index(row["model"]), row["tokens"]

    kept = [row for row in before if place(row) != place(measured[0])]
    marked = [{"commit": about["commit"]} | row for row in measured]
    rows = sorted(kept + marked, key=place)
    record.write(path, {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
