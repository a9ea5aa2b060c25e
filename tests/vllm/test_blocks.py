"""Scheduler side: what each group holds after every step, and what a prefix hit may reuse."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not in this environment: make test-vllm")

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from claa_ops.selection import Budget
from claa_ops.vllm import scheduler, spec
from claa_ops.vllm.capacity import Capacity
from claa_ops.vllm.spec import CompressedAttentionSpec, HiddenSpec, KeptAttentionSpec

WINDOW, BLOCK = 8, 4
BUDGET = Budget(1, 5)


@pytest.fixture(scope="module", autouse=True)
def registered():
    spec.register()
    scheduler.register()
    init_none_hash(sha256)


class Engine:
    """vLLM's cache manager over a front, a back of two groups and the hidden states.

    Instead of a forward it notes which prefix each page holds the last token of.
    """

    def __init__(self, num_blocks: int, width: int = 8, caching: bool = True):
        full = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=4, dtype=torch.float32)
        kept = KeptAttentionSpec.of(full, BUDGET, WINDOW)
        hidden = HiddenSpec.of(full, width=width, layers=2, window=WINDOW)
        self.specs = [full, kept, kept, hidden]
        groups = [KVCacheGroupSpec([f"layer.{i}"], s) for i, s in enumerate(self.specs)]
        config = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        self.coarse = max(BLOCK, hidden.block_size)
        self.fine = min(BLOCK, hidden.block_size)
        self.manager = KVCacheManager(
            config,
            max_model_len=512,
            scheduler_block_size=self.coarse,
            hash_block_size=self.fine,
            enable_caching=caching,
            log_stats=True,
        )
        self.free_at_rest = self.manager.block_pool.get_num_free_blocks()
        self.pages: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self.tables: dict[str, tuple[list[int], ...]] = {}

    def request(self, name: str, prompt: list[int]) -> Request:
        hasher = get_request_block_hasher(self.fine, sha256)
        return Request(name, prompt, SamplingParams(max_tokens=99), None, block_hasher=hasher)

    def step(self, request: Request, tokens: int) -> int | None:
        """Schedule up to so many tokens and compute them; the length of the hit, None if full."""
        found, hit = None, 0
        if request.num_computed_tokens == 0:
            found, hit, *_ = self.manager.get_computed_blocks(request)
        tokens = min(tokens, request.num_tokens - hit - request.num_computed_tokens)
        if self.manager.allocate_slots(request, tokens, hit, found) is None:
            return None
        # The worker keeps what it once was told: blocks freed since stay in its table.
        blocks = self.manager.get_blocks(request.request_id).get_block_ids()
        table = self.tables.setdefault(request.request_id, tuple([] for _ in self.specs))
        for old, new in zip(table, blocks, strict=True):
            old.extend(new[len(old) :])
        before = request.num_computed_tokens + hit
        self._compute(request, table, before, before + tokens)
        request.num_computed_tokens = before + tokens
        self.check_blocks(request)
        return hit

    def _compute(self, request, table, before, after):
        ids, prompt = request.all_token_ids, request.num_prompt_tokens
        for group in (0, 3):
            size = self.specs[group].block_size
            for at in range(before, after):
                if group == 0 or at < prompt:
                    self.pages[group, table[group][at // size], at % size] = tuple(ids[: at + 1])
            # Attention reads all keys of the front; the selection all of a prompt's hidden states.
            ends = before < prompt <= after
            for at in range(after if group == 0 else prompt * ends):
                held = self.pages.get((group, table[group][at // size], at % size))
                assert held == tuple(ids[: at + 1]), (group, at)
        kept = self.specs[1].entries(0, prompt)
        for group in (1, 2):
            if after >= prompt:
                assert len(table[group]) * BLOCK >= kept + after - prompt

    def check_blocks(self, request):
        prompt, computed = request.num_prompt_tokens, request.num_computed_tokens
        held = self.manager.get_blocks(request.request_id).blocks
        own = [sum(not block.is_null for block in blocks) for blocks in held]
        kept = -(-self.specs[1].entries(computed, prompt) // BLOCK)
        hidden = -(-min(computed, prompt) // self.specs[3].block_size)
        # What was computed in this step is freed before the next is scheduled.
        assert own == [-(-computed // BLOCK), kept, kept, own[3]]
        assert own[3] in ((hidden,) if computed <= prompt else (0, hidden))

    def finish(self, request: Request) -> None:
        self.manager.free(request)
        self.tables.pop(request.request_id, None)

    def run(self, name: str, prompt: list[int], chunk: int = 64, answer: int = 3) -> int:
        """A request alone, from its prompt to its end; the length of its hit."""
        request = self.request(name, prompt)
        hit = self.step(request, chunk)
        while request.num_computed_tokens < len(prompt):
            assert self.step(request, chunk) is not None
        for token in range(answer):
            request.append_output_token_ids(900 + token)
            assert self.step(request, 1) is not None
        self.finish(request)
        return hit

    def assert_idle(self):
        assert self.manager.block_pool.get_num_free_blocks() == self.free_at_rest
        for manager in self.manager.coordinator.single_type_managers:
            assert not manager.req_to_blocks
            assert not getattr(manager, "prompts", None)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 1000 + at).randrange(800) for at in range(length)]


# A slice of 4, 8 or 32 elements: blocks of 16, 8 or 2 hidden states beside 4 keys and values.
WIDTHS = pytest.mark.parametrize("width", [8, 16, 64])


@WIDTHS
def test_a_repeated_prompt_hits_up_to_its_window(width):
    engine = Engine(200, width)
    assert engine.run("a", prompt(100)) == 0
    assert engine.run("b", prompt(100)) == (100 - WINDOW) // engine.coarse * engine.coarse
    engine.assert_idle()


@WIDTHS
def test_a_shared_beginning_hits_whatever_comes_after(width):
    engine = Engine(400, width)
    shared = prompt(64)
    engine.run("a", shared + prompt(40, seed=1))
    assert engine.run("b", shared + prompt(30, seed=2), chunk=7) == 64
    assert engine.run("c", shared + prompt(3, seed=3)) == (67 - WINDOW) // engine.coarse * (
        engine.coarse
    )
    engine.assert_idle()


def test_a_hit_may_reach_into_the_chunks_of_a_prompt_under_way():
    engine = Engine(200)
    first, second = engine.request("a", prompt(100)), engine.request("b", prompt(100))
    engine.step(first, 40)
    assert engine.step(second, 20) == 40 // engine.coarse * engine.coarse
    engine.step(first, 60)
    engine.finish(first)
    engine.step(second, 60)
    assert second.num_computed_tokens == 100
    engine.finish(second)
    engine.assert_idle()


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 16])
def test_short_prompts_hit_nothing_of_their_window(length):
    engine = Engine(100)
    engine.run("a", prompt(length))
    assert engine.run("b", prompt(length)) <= max(0, length - WINDOW)
    engine.assert_idle()


def test_hidden_states_are_freed_after_the_selection_and_still_hit():
    engine = Engine(200)
    request = engine.request("a", prompt(96))
    engine.step(request, 96)
    hidden = engine.manager.coordinator.single_type_managers[3]
    assert sum(not block.is_null for block in hidden.req_to_blocks["a"]) == 96 // 16
    request.append_output_token_ids(1)
    engine.step(request, 1)
    assert all(block.is_null for block in hidden.req_to_blocks["a"])
    assert engine.run("b", prompt(96)) == 80
    engine.finish(request)
    engine.assert_idle()


def test_evicted_hidden_states_end_a_hit():
    engine = Engine(200)
    engine.run("a", prompt(96))
    coordinator = engine.manager.coordinator
    hits, length = coordinator.find_longest_cache_hit(
        engine.request("b", prompt(96)).block_hashes, 95
    )[:2]
    assert length == 80
    engine.manager.block_pool.evict_blocks({hits[3][2].block_id})  # 0.32 and 0.25 have it
    assert engine.run("c", prompt(96)) == 32
    engine.assert_idle()


def test_a_preempted_request_computes_its_window_again():
    engine = Engine(200)
    request = engine.request("a", prompt(80))
    engine.step(request, 80)
    for token in range(40):
        request.append_output_token_ids(token)
        engine.step(request, 1)
    engine.finish(request)  # preempted: its blocks are freed, its tokens stay
    request.num_computed_tokens = 0
    # 120 tokens are known, but the window is that of the prompt.
    assert engine.step(request, 200) == 64
    assert request.num_computed_tokens == 120
    engine.finish(request)
    engine.assert_idle()


def test_admission_counts_the_kept_tokens_alone():
    engine = Engine(1 + 25 + 2 * 5 + 7)  # the null block; 100 tokens of each kind
    request = engine.request("a", prompt(100))
    found, hit, *_ = engine.manager.get_computed_blocks(request)
    allocated = engine.manager.allocate_slots(request, 10, hit, found, full_sequence_must_fit=True)
    assert allocated is not None
    engine.finish(request)
    small = Engine(25 + 2 * 5 + 7)
    request = small.request("a", prompt(100))
    found, hit, *_ = small.manager.get_computed_blocks(request)
    assert (
        small.manager.allocate_slots(request, 10, hit, found, full_sequence_must_fit=True) is None
    )
    small.finish(request)


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no-caching"])
@WIDTHS
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_steps_reads_what_was_written_and_leaks_nothing(width, caching, seed):
    """Requests with shared beginnings, chunks, answers, preemption and aborts in a small cache."""
    rng = random.Random(seed)
    engine = Engine({8: 70, 16: 76, 64: 124}[width], width, caching)
    running: list[Request] = []
    hits = preempted = 0
    for index in range(60):
        shared = prompt(rng.choice([0, 16, 40, 64]))
        request = engine.request(
            str(index), shared + prompt(rng.randint(1, 60), seed=index % 7 + 1)
        )
        running.append(request)
        for _ in range(rng.randint(0, 6)):
            if not running:
                break
            current = rng.choice(running)
            if current.num_computed_tokens == current.num_tokens:
                current.append_output_token_ids(rng.randrange(800))
            done = engine.step(current, rng.choice([1, 5, 7, 16, 33, 100]))
            if done is None:  # full: preempt the last, as vLLM does
                victim = running[-1]
                engine.finish(victim)
                victim.num_computed_tokens = 0
                preempted += 1
            else:
                hits += done > 0
            if rng.random() < 0.15 or current.num_output_tokens > 12 or len(running) > 6:
                gone = current if rng.random() < 0.5 else running[0]
                engine.finish(gone)
                running.remove(gone)
    for request in running:
        engine.finish(request)
    engine.assert_idle()
    assert preempted
    assert bool(hits) == caching


def test_capacity_counts_blocks_as_the_manager_does():
    full = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=4, dtype=torch.float32)
    kept = KeptAttentionSpec.of(full, BUDGET, WINDOW)
    hidden = HiddenSpec.of(full, width=8, layers=2, window=WINDOW)
    specs = [full, kept, kept, hidden]
    groups = [
        KVCacheGroupSpec([f"{index}.{layer}" for layer in range(2)][: 1 if index == 2 else 2], spec)
        for index, spec in enumerate(specs)
    ]
    config = KVCacheConfig(num_blocks=101, kv_cache_tensors=[], kv_cache_groups=groups)
    capacity = Capacity.of(config, 100)
    assert (capacity.blocks, capacity.parked, capacity.total) == (25 + 5 + 5, 7, 100)
    assert capacity.padding == pytest.approx(5 / 70)  # the third group has one layer of two
    assert capacity.plain == 25 * 5 / 2
    assert "holds 35 of 100 blocks, 2.9 fit at once, 1.79 times as many" in str(capacity)


def test_capacity_counts_compressed_caches_once_the_prompt_is_over():
    full = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=4, dtype=torch.float32)
    some = CompressedAttentionSpec.of(full, BUDGET, WINDOW, 0, Budget(2, 5))
    kept = KeptAttentionSpec.of(full, BUDGET, WINDOW)
    hidden = HiddenSpec.of(full, width=8, layers=2, window=WINDOW)
    groups = [
        KVCacheGroupSpec([f"{index}.{layer}" for layer in range(2)], spec)
        for index, spec in enumerate([some, kept, hidden])
    ]
    config = KVCacheConfig(num_blocks=101, kv_cache_tensors=[], kv_cache_groups=groups)
    capacity = Capacity.of(config, 100, new=4)
    # 40 entries and 20 are kept; until the prompt ends, its 25 blocks and 7 of hidden states.
    assert (capacity.blocks, capacity.parked) == (11 + 6, 25 + 7)


@pytest.mark.parametrize("prompt", [1, 8, 40, 41, 63, 64])
@pytest.mark.parametrize("kept", [None, 5, 39])
def test_block_tables_are_wide_enough_for_any_prompt_and_answer(prompt, kept):
    full = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=4, dtype=torch.float32)
    spec = CompressedAttentionSpec.of(full, BUDGET, WINDOW, 0, Budget(4, 5))
    width = spec.max_num_blocks_per_req(None, 64)
    assert max(spec.blocks(tokens, prompt, kept) for tokens in range(65)) <= width
