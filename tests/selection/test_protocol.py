"""The method protocol, by methods that are not ours: what they may read, decide and need."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import claa_ops
from claa_ops.methods import (
    ASL,
    CLAA,
    METHODS,
    Coarse,
    FastKV,
    GemFilter,
    Hops,
    LazyLLM,
    Method,
    Peak,
    PromptDistill,
    Pruning,
    PyramidInfer,
    Random,
    UniPrefill,
    make_method,
)
from claa_ops.selection import Layer, begin
from claa_ops.selection.padding import mask_padding

LAYERS, HEADS, GROUPS, DIM, TOKENS = 4, 8, 4, 8, 60


def layers(batch: int = 1, tokens: int = TOKENS, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(
            torch.randn(batch, heads, tokens, DIM, generator=generator) for heads in (HEADS, GROUPS)
        )
        for _ in range(LAYERS)
    ]


def trace(method: Method, tensors: list[tuple[Tensor, Tensor]], **options):
    """A prefill that gathers what continues; returns the state, and what each cache keeps."""
    tokens = tensors[0][1].shape[2]
    state = begin(
        method, num_layers=LAYERS, prompt_length=tokens, first_pass=method.two_pass, **options
    )
    kept = torch.arange(tokens, dtype=torch.float32)[None].expand(tensors[0][1].shape[0], -1)
    # The same on each device.
    hidden = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(5))
    cached = []
    index, parked = 0, kept
    while index < len(tensors):
        query, key = tensors[index]
        if state.positions is not None:
            at = state.positions.clamp_min(0)[:, None, :, None]
            query, key = (x.gather(2, at.expand(-1, x.shape[1], -1, DIM)) for x in (query, key))
        state.observe(index, query, key, hidden=hidden[kept.long()])
        rows = kept[:, None, :, None].expand(-1, key.shape[1], -1, 1)
        cached.append(state.compress(index, rows, rows)[0][..., 0])
        if (taken := state.take_up(index)) is not None:
            kept = taken.all_held().float()
            for between in range(state.parked + 1, index + 1):
                cached[between] = kept[:, None].expand(-1, key.shape[1], -1)
        chosen = state.select(index)
        if state.parked == index:
            parked = kept
        if state.layer < index:
            index, kept = state.layer, parked
            del cached[index + 1 :]
        if chosen is not None:
            kept = claa_ops.gather_tokens(kept[..., None], chosen)[..., 0]
            if method.two_pass:
                break
        index += 1
    return state, cached


@dataclass(frozen=True)
class KeyNorm(Pruning):
    """Keys of small norm are attended to most."""

    def score(self, layer):
        return -layer.key[:, :, : layer.context].norm(dim=-1)


def test_a_ranking_is_one_function_of_what_a_layer_saw():
    tensors = layers(batch=2)
    state, cached = trace(KeyNorm(keep=20, keep_kv=12, layer=1), tensors)
    norm = tensors[1][1].norm(dim=-1)[..., :-8]
    window = torch.arange(TOKENS - 8, TOKENS)
    for row in range(2):
        best = norm[row].sum(dim=0).topk(12, largest=False).indices.sort().values
        assert state.positions[row].tolist() == torch.cat([best, window]).tolist()
        for head in range(GROUPS):
            best = norm[row, head].topk(4, largest=False).indices.sort().values
            assert cached[1][row, head].tolist() == torch.cat([best, window]).tolist()


@dataclass(frozen=True)
class Everything(Pruning):
    """Reads everything that a layer can show."""

    reads_hidden = True

    def rank(self, layer, before):
        seen = layer.query, layer.key, layer.value, layer.hidden, layer.lse
        layer.state.notes.setdefault("seen", []).append(seen)
        return layer.hidden[:, : layer.context].norm(dim=-1)


def test_a_method_sees_whatever_the_caller_shows():
    query, key = layers()[0]
    value, hidden, lse = key + 1, torch.randn(1, TOKENS, 5), torch.randn(1, HEADS, TOKENS)
    state = begin(Everything(keep=20, layer=0), num_layers=2, prompt_length=TOKENS)
    state.observe(0, query, key, value=value, hidden=hidden, lse=lse)
    seen = state.notes["seen"][0]
    for actual, expected in zip(
        seen, (query[:, :, -8:], key, value, hidden, lse[:, :, -8:]), strict=True
    ):
        assert torch.equal(actual, expected)
    best = hidden[0, :-8].norm(dim=-1).topk(12).indices.sort().values
    assert state.select(0)[0, :12].tolist() == best.tolist()


# Heads on several devices.


def reduced_over(count: int) -> list[Callable[[Tensor, str], Tensor]]:
    """An all-reduce for each of several threads, which stand for tensor-parallel ranks."""
    given, barrier = [None] * count, threading.Barrier(count, timeout=60)

    def of(rank: int) -> Callable[[Tensor, str], Tensor]:
        def reduce(scores: Tensor, how: str) -> Tensor:
            given[rank] = scores
            barrier.wait()
            every = torch.stack(given)
            barrier.wait()
            return every.amax(dim=0) if how == "max" else every.sum(dim=0)

        return reduce

    return [of(rank) for rank in range(count)]


SPLIT = {
    "claa": CLAA(keep=20, keep_kv=12, layer=2, first_full=0),
    "claa, standardised": CLAA(keep=20, layer=2, zscore=True),
    "claa, sums": CLAA(keep=20, layer=2, zscore=True, over_heads="sum"),
    "claa, mean": CLAA(keep=20, layer=2, over_layers="mean"),
    "claa, staged": CLAA(keep=(30, 20), layer=(0, 2)),
    "fastkv": FastKV(keep=20, keep_kv=12, layer=1),
    "peak": Peak(keep=24, layer=2, window=8),
    "peak, staged": Peak(keep=(40, 24), layer=(0, 2), window=8),
    "hops": Hops(keep=(40, 24), layer=(0, 2), window=8, states="hidden", num_seeds=4, least=4),
    "asl": ASL(keep=24, layer=1, last_n=2, tau=10.0, window=8),
    "gemfilter": GemFilter(keep=20, layer=1),
    "pyramidinfer": PyramidInfer(least=5),
    "lazyllm": LazyLLM(keep=20),
    "lazyllm, revived": LazyLLM(keep=(30, 28), layer=(0, 2), revive=True),
    "coarse": Coarse(keep=24, layer=0, ahead=2, window=8),
    "lazyllm, caches cut": LazyLLM(keep=20, keep_kv=12),
    "promptdistill": PromptDistill(keep=20),
    "promptdistill, caches cut": PromptDistill(keep=(30, 20), layer=(0, 2), keep_kv=12),
    "uniprefill": UniPrefill(top_p=0.6, block=4, num_sinks=4, window=8),
    "random": Random(keep=20, layer=1),
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SPLIT)
def test_devices_with_some_of_the_heads_select_what_one_with_all_does(name, ranks):
    method, tensors = SPLIT[name], layers()
    whole, cached = trace(method, tensors)
    results = [None] * ranks

    def run(rank: int, reduce: Callable[[Tensor, str], Tensor]) -> None:
        own = [
            tuple(x[:, x.shape[1] // ranks * rank :][:, : x.shape[1] // ranks] for x in pair)
            for pair in tensors
        ]
        results[rank] = trace(method, own, reduce=reduce)

    threads = [
        threading.Thread(target=run, args=(rank, reduce))
        for rank, reduce in enumerate(reduced_over(ranks))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for state, _ in results:
        assert torch.equal(state.positions, whole.positions)
        assert torch.equal(state.importance, results[0][0].importance)  # to the bit
    for index, expected in enumerate(cached):
        together = torch.cat([own[index] for _, own in results], dim=1)
        assert torch.equal(together, expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "claa": ["max"],
        "claa, standardised": ["max"],
        "claa, sums": ["sum", "sum", "sum", "max"],  # a sum over heads is standardised
        "claa, mean": ["max", "max", "max"],
        "claa, staged": ["max", "max"],
        "fastkv": ["sum"],
        "peak": ["max"],
        "coarse": ["max"],
    }.items(),
)
def test_devices_merge_no_more_often_than_the_ranking_needs(name, expected):
    merged = []

    def reduce(scores: Tensor, how: str) -> Tensor:
        merged.append(how)
        return scores

    trace(SPLIT[name], layers(), reduce=reduce)
    assert merged == expected


# Budgets and layers that follow from what was seen of each prompt.


@dataclass(frozen=True)
class Mass(Pruning):
    """As many tokens as carry a share of the ranking's mass."""

    share: float = 0.5
    differs_by_row = True

    def of_tokens(self, state):
        """The ranking, with nothing where there is padding, into which pooling reaches."""
        return mask_padding(state.importance, state.start, 0.0).double()

    def select(self, state, layer):
        if layer not in self.stages(state.num_layers):
            return None
        ranked = self.of_tokens(state).sort(dim=1, descending=True).values
        mass = ranked.cumsum(dim=1)
        needed = 1 + (mass < self.share * mass[:, -1:]).sum(dim=1)
        return self.keep_best(state, state.importance, needed + self.window, window=self.window)


@dataclass(frozen=True)
class WhereItIsSure(Mass):
    """A prompt selects at layer 0 if its best token has enough of the mass there, else at 2."""

    layer: tuple[int, ...] = (0, 2)
    keep: tuple[float, ...] = (0.5, 0.5)
    least: float = 0.05

    def select(self, state, layer):
        if layer not in (0, 2):
            return None
        ranking = self.of_tokens(state)
        everything = torch.full((len(ranking),), state.length)
        if state.row_sizes is not None:
            everything = state.row_sizes.seen
        sure = ranking.amax(dim=1) >= self.least * ranking.sum(dim=1)
        done = state.notes.setdefault("done", torch.zeros_like(sure))
        now = ~done if layer == 2 else sure
        state.notes["done"] = done | now
        tokens = torch.where(now, self.window + 12, everything)
        return self.keep_best(state, state.importance, tokens, window=self.window)


@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(30, 60), min_size=2, max_size=4))
@pytest.mark.parametrize("method", [Mass(layer=1, share=0.3), WhereItIsSure()], ids=str)
def test_each_prompt_of_a_batch_decides_for_itself(method, seed, lengths):
    longest = max(lengths)
    tensors = layers(len(lengths), longest, seed)
    start = torch.tensor([longest - length for length in lengths])
    options = {} if len(set(lengths)) == 1 else {"start": start}
    together, _ = trace(method, tensors, **options)
    for row, first in enumerate(start.tolist()):
        own = [tuple(x[row : row + 1, :, first:] for x in pair) for pair in tensors]
        alone, _ = trace(method, own)
        positions = together.positions[row]
        assert (positions[positions >= first] - first).tolist() == alone.positions[0].tolist()


def test_prompts_of_one_length_may_differ_in_what_they_keep():
    tensors = layers(batch=3)
    state, _ = trace(Mass(layer=1, share=0.3), tensors)
    kept = (state.positions >= 0).sum(dim=1)
    assert state.start.tolist() == (state.length - kept).tolist() and len(set(kept.tolist())) > 1


# An engine's own form of what a layer saw.


class PagedLayer(Layer):
    """Keys in pages, which are put together when they are read."""

    def __init__(self, state, index, query, pages: list[Tensor]):
        super().__init__(state, index, query, pages[0])
        self.pages = pages

    @property
    def key(self):
        return torch.cat(self.pages, dim=2)


@pytest.mark.parametrize("name", ["claa", "peak", "fastkv"])
def test_an_engine_may_show_its_own_layers(name):
    method = replace(METHODS[name](), keep=30, layer=2)
    expected, _ = trace(method, layers())
    state = begin(method, num_layers=LAYERS, prompt_length=TOKENS)
    for index, (query, key) in enumerate(layers()[:3]):
        state.see(PagedLayer(state, index, query, list(key.split(16, dim=2))))
    state.select(2)
    assert torch.equal(state.positions, expected.positions)


# What is known without a prompt.


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("num_layers", [4, 28, 32])
def test_python_and_the_command_line_have_one_rule_of_depth(name, num_layers):
    method = METHODS[name]()
    made = make_method(name, num_layers=num_layers)
    assert method.at_depth(num_layers) == made == made.at_depth(num_layers)
    assert method.selection_layers(num_layers) == made.selection_layers(num_layers)


def test_a_prefill_selects_where_the_rule_says():
    state, _ = trace(CLAA(keep=20), layers())
    assert state.lengths == [60, 60, 20, 20]
    assert trace(CLAA(keep=20, layer=1), layers())[0].lengths == state.lengths


def test_random_draws_differ_from_prompt_to_prompt_and_not_from_run_to_run():
    method = Random(keep=20, layer=1, seed=3)
    first, again, other = (method.for_prompt(key) for key in ("needle 1", "needle 1", "needle 2"))
    assert first == again != other and first != method
    assert CLAA().for_prompt("needle 1") == CLAA()
    with pytest.raises(ValueError, match="seed must be an integer of at least 0"):
        Random(seed=-1).for_prompt("needle 1")


def test_what_cannot_be_batched_says_so():
    assert not ASL().serves_batches and ASL(tau=None).serves_batches
    assert not METHODS["speculative"]().serves_batches
    assert all(
        METHODS[name]().serves_batches for name in METHODS if name not in ("asl", "speculative")
    )
