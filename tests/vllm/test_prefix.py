"""Prefix caching on: a hit computes the rest alone, and nothing else about an answer changes."""

from __future__ import annotations

from functools import cache

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not in this environment: make test-vllm")

from claa_ops.methods import Hops, Peak
from support.engines import Engine, alone, engine, prompts

NEW = 40
METHODS = {
    "peak": ({"method": "peak", "layer": 3, "keep": 0.3}, Peak(layer=3, keep=0.3, keep_kv=1.0)),
    "hops": (
        {"method": "hops", "layer": 2, "keep": 0.4, "keep_least": 32, "least": 16},
        Hops(layer=2, keep=0.4, keep_least=32, least=16, keep_kv=1.0),
    ),
}
SHARED = prompts([200])[0]
ASKED = [
    *prompts([300, 57, 640, 130, 5, 412], seed=1),
    *(SHARED + end for end in prompts([60, 30, 3, 100], seed=2)),
]


@pytest.fixture(scope="module")
def expected(tiny_llama):
    """What a method keeps of each prompt and answers, alone."""
    return cache(lambda name, new: alone(tiny_llama, ASKED, METHODS[name][1], new))


def ask(running: Engine, asked, expected, new: int = 4) -> list[int]:
    """Ask, compare with the answers of each prompt alone; how much of each was cached."""
    found = running.hits()
    answers = running.answers(asked, new)
    for answer, want in zip(answers, expected, strict=True):
        assert answer.tokens == want.tokens[:new]
        assert answer.kept == want.kept
    running.assert_idle()
    return [*found]


@pytest.mark.parametrize(
    ("method", "chunk"), [("peak", 8192), ("peak", 37), ("hops", 96)], ids=["whole", "37", "hops"]
)
def test_a_hit_changes_no_answer(tiny_llama, expected, method, chunk):
    options = dict(max_num_batched_tokens=chunk, enable_prefix_caching=True, block_size=32)
    with engine(tiny_llama, METHODS[method][0], **options) as running:
        want = expected(method, 4)
        block = running.runtime.parked.block_size
        window = running.runtime.settings.method.window
        # Whole blocks of hidden states, and never the window.
        most = [max(0, len(ids) - window) // block * block for ids in ASKED]
        shared = [min(each, len(SHARED) // block * block) for each in most]
        # One of the last four may be there before what it shares is.
        first = ask(running, ASKED, want)
        assert first[:6] == [0] * 6
        assert first[7:] == shared[7:]
        assert any(first)
        assert ask(running, ASKED, want) == most
        assert ask(running, ASKED[-1:], want[-1:]) == most[-1:]
        abort_in_prefill(running, ASKED[2])
        assert ask(running, ASKED[2:3], want[2:3]) == most[2:3]


def abort_in_prefill(running: Engine, ids) -> None:
    from vllm import SamplingParams

    core = running.llm.llm_engine
    running.scheduler.reset_prefix_cache()
    for steps in (1, 3):
        core.add_request("0", {"prompt_token_ids": ids}, SamplingParams(max_tokens=50))
        for _ in range(steps):
            core.step()
        core.abort_request(["0"])
        core.step()
        running.assert_idle()
    # A whole one, of which the next has what it computed.
    running.answers([ids], 1)


def test_a_small_cache_evicts_and_preempts_and_changes_no_answer(tiny_llama, expected):
    options = dict(
        enable_prefix_caching=True,
        block_size=32,
        num_gpu_blocks_override=56,
        max_num_batched_tokens=96,
        max_model_len=700,
    )
    with engine(tiny_llama, METHODS["peak"][0], **options) as running:
        preempted = running.preemptions()
        # The short ones run together, and outgrow the cache while they answer.
        order = [*range(6, 10), 3, 1, 4] * 2 + [2, 0, 5, 2]
        asked, want = ([each[i] for i in order] for each in (ASKED, expected("peak", NEW)))
        found = ask(running, asked, want, NEW)
        assert any(found)
        assert preempted


def test_keeping_all_equals_plain_vllm(tiny_llama):
    options = dict(enable_prefix_caching=True, block_size=32, max_num_batched_tokens=96)
    with engine(tiny_llama, **options) as running:
        plain = [answer.tokens for answer in running.answers(ASKED, 4)]
    settings = {"method": "peak", "layer": 3, "keep": 1.0}
    with engine(tiny_llama, settings, **options) as running:
        for _ in range(2):
            assert [answer.tokens for answer in running.answers(ASKED, 4)] == plain
        running.assert_idle()
