"""Engines on a GPU, in bfloat16, with the kernels and the graphs that vLLM picks there.

`make test-gpu-vllm` runs them on a machine with a GPU; `-k two_gpus` needs two. Sums have another
order there in each kind of engine, which changes last digits, and with them some of the kept tokens
of a random model: what is compared is how many are the same. What has to be exact is asserted so.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM is not in this environment: make test-gpu-vllm")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU: make test-gpu-vllm", allow_module_level=True)

from claa_ops.methods import CLAA, Hops, Method, Peak
from claa_ops.vllm.refusals import has_place_for_compressed
from support.engines import Answer, alone, begin_log, engine, logged, prompts

GIB = 2**30
GPU: dict[str, Any] = {
    "dtype": "bfloat16",
    "kv_cache_memory_bytes": 2 * GIB,
    "gpu_memory_utilization": 0.1,
}
SIZES = [1, 2, 4, 8]  # of captured batches
GRAPHS = {"enforce_eager": False, "max_num_seqs": 8}
KINDS: dict[str, dict[str, Any]] = {
    "chunks-of-256": {"max_num_batched_tokens": 256},
    "chunks-of-100": {"max_num_batched_tokens": 100, "max_num_seqs": 3},
    "compiled": GRAPHS | {"compilation_config": {"cudagraph_mode": "NONE"}},
    "whole-graphs": GRAPHS
    | {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": SIZES,
        }
    },
    "piecewise": GRAPHS
    | {
        "compilation_config": {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": SIZES},
    },
    "as-served": GRAPHS | {"enable_prefix_caching": True},
    "triton": {"attention_backend": "TRITON_ATTN"},
    "flex": {"attention_backend": "FLEX_ATTENTION"},
}
ASKED = prompts([300, 57, 640, 130, 5, 8, 9, 412, 1900])
METHODS: dict[str, tuple[dict[str, Any], Method]] = {
    "claa": ({"method": "claa", "layer": 4, "keep": 0.2}, CLAA(layer=4, keep=0.2, keep_kv=1.0)),
    "peak": ({"method": "peak", "layer": 3, "keep": 0.3}, Peak(layer=3, keep=0.3, keep_kv=1.0)),
    "hops": (
        {"method": "hops", "layer": 2, "keep": 0.3, "keep_least": 64},
        Hops(layer=2, keep=0.3, keep_kv=1.0, keep_least=64),
    ),
}
PEAK = METHODS["peak"][0]
invariant = pytest.mark.skipif(
    os.environ.get("VLLM_BATCH_INVARIANT") != "1",
    reason="in a process of its own: make test-gpu-vllm runs it with VLLM_BATCH_INVARIANT=1",
)


def gpu_engine(model: str, claa: dict[str, Any] | None = None, **options: Any) -> Any:
    return engine(model, claa, **(GPU | options))


def same_kept(answers: list[Answer], wanted: list[Answer]) -> float:
    """The share of the kept tokens that both have; as many they must have."""
    pairs = [
        (set(mine.kept), set(its.kept))
        for mine, its in zip(answers, wanted, strict=True)
        if its.kept is not None and mine.kept is not None
    ]
    assert [mine.kept is None for mine in answers] == [its.kept is None for its in wanted]
    assert [len(mine) for mine, _ in pairs] == [len(its) for _, its in pairs]
    return sum(len(mine & its) for mine, its in pairs) / sum(len(its) for _, its in pairs)


def same_first_tokens(answers: list[Answer], wanted: list[Answer]) -> float:
    pairs = zip(answers, wanted, strict=True)
    return sum(mine.tokens[0] == its.tokens[0] for mine, its in pairs) / len(wanted)


@pytest.fixture(scope="module")
def eager(tiny_llama: str) -> dict[str, list[Answer]]:
    found = {}
    for name, (settings, _) in METHODS.items():
        with gpu_engine(tiny_llama, settings) as running:
            found[name] = running.answers(ASKED)
            running.assert_idle()
    return found


def test_a_full_keep_rate_is_plain_vllm(tiny_llama):
    with gpu_engine(tiny_llama) as running:
        wanted = running.answers(ASKED)
    with gpu_engine(tiny_llama, {"method": "peak", "layer": 3, "keep": 1.0}) as running:
        answers = running.answers(ASKED)
    assert [each.tokens for each in answers] == [each.tokens for each in wanted]


@pytest.mark.parametrize("name", METHODS)
def test_kept_tokens_are_those_of_the_adapter_on_a_cpu(tiny_llama, eager, name):
    wanted = alone(tiny_llama, ASKED, METHODS[name][1], new=1)
    assert same_kept(eager[name], wanted) > 0.85


@pytest.mark.parametrize("kind", KINDS)
def test_neither_chunks_nor_graphs_nor_kernels_change_what_is_kept(tiny_llama, eager, kind):
    with gpu_engine(tiny_llama, PEAK, **KINDS[kind]) as running:
        answers = running.answers(ASKED)
        running.assert_idle()
    assert same_kept(answers, eager["peak"]) > 0.9
    assert same_first_tokens(answers, eager["peak"]) > 0.7


def test_a_graph_of_each_captured_size_answers_as_eager_kernels_do(tiny_llama):
    """One to eight requests: padded rows too. Prefills are eager in both: they keep the same."""
    asked = [prompts([90 + 7 * n for n in range(count)], seed=count) for count in range(1, 9)]
    found = []
    for options in ({}, KINDS["whole-graphs"]):
        with gpu_engine(tiny_llama, PEAK, **options) as running:
            found.append([running.answers(each, new=6) for each in asked])
    for plain, replayed in zip(*found, strict=True):
        assert [each.kept for each in replayed] == [each.kept for each in plain]
        for mine, its in zip(replayed, plain, strict=True):
            assert mine.tokens[0] == its.tokens[0]  # of the prefill
            assert mine.logprobs[1] == pytest.approx(its.logprobs[1], abs=0.05)


def test_the_forward_never_waits_for_the_gpu(tiny_llama):
    with gpu_engine(tiny_llama, PEAK, max_num_batched_tokens=256) as running:
        running.answers(ASKED, new=2)
        model = running.runner.get_model()
        plain = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return plain(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        running.runtime.log = None  # which copies to the host
        model.forward = forward
        outputs = running.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts([300, 700, 90], seed=5)], use_tqdm=False
        )
        del model.forward
    assert all(output.outputs[0].token_ids for output in outputs)


def test_a_prefix_hit_keeps_what_a_whole_prefill_keeps(tiny_llama):
    shared = prompts([900], seed=6)[0]
    asked = [shared + end for end in prompts([60, 130, 90], seed=7)]
    with gpu_engine(tiny_llama, PEAK) as running:
        wanted = running.answers(asked)
    with gpu_engine(tiny_llama, PEAK, enable_prefix_caching=True) as running:
        running.answers([shared], new=1)
        answers = [running.answers([ids])[0] for ids in asked]
        again = [running.answers([ids])[0] for ids in asked]
        running.assert_idle()
    assert same_kept(answers, wanted) > 0.9
    assert same_kept(again, answers) > 0.9


def test_preempted_requests_keep_what_they_kept_before(tiny_llama, eager):
    few = [ids for ids in ASKED if len(ids) < 450]
    options = dict(num_gpu_blocks_override=60, block_size=32, max_model_len=600)
    with gpu_engine(tiny_llama, PEAK, **options) as running:
        preempted = running.preemptions()
        answers = running.answers(few, new=150)
        running.assert_idle()
    assert preempted
    wanted = [its for ids, its in zip(ASKED, eager["peak"], strict=True) if len(ids) < 450]
    assert same_kept(answers, wanted) > 0.9


@pytest.mark.skipif(
    not has_place_for_compressed(),
    reason="this vLLM has no place for compressed caches, and refuses them: test_refusals.py",
)
@pytest.mark.parametrize("step", [8192, 256])
def test_compressed_caches_answer_as_the_adapters_do(tiny_llama, step):
    """In float32, in which answers on a GPU and on a CPU are nearly always the same."""
    options = dict(dtype="float32", attention_backend="TRITON_ATTN", max_num_batched_tokens=step)
    wanted = alone(tiny_llama, ASKED, Peak(layer=3, keep=0.3, keep_kv=0.3))
    with gpu_engine(tiny_llama, PEAK | {"keep_kv": 0.3}, **options) as running:
        answers = running.answers(ASKED)
        running.assert_idle()
    assert same_kept(answers, wanted) > 0.98
    same = [mine.tokens == its.tokens for mine, its in zip(answers, wanted, strict=True)]
    assert sum(same) / len(same) > 0.7


def test_requests_of_one_batch_may_keep_different_shares(tiny_llama):
    asked, extra = prompts([300, 280, 330]), [None, {"claa_keep": "all"}, {"claa_keep": 64}]
    with gpu_engine(tiny_llama) as running:
        (plain,) = running.answers([asked[1]])
    with gpu_engine(tiny_llama, PEAK) as running:
        answers = running.answers(asked, extra=extra)
    assert [each.kept and len(each.kept) for each in answers] == [90, None, 64]
    assert answers[1].logprobs[0] == pytest.approx(plain.logprobs[0], abs=0.05)


@invariant
@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
def test_batch_invariant_kernels_make_neighbours_change_no_bit(tiny_llama, backend):
    """Neither of a request that is not pruned, which is plain vLLM's, nor of one that is.

    With FlashAttention of its prefill alone: in a step that reads prompts too, decoding takes other
    tiles than in one that only decodes (vLLM 0.25), and there last digits differ.
    """
    compared = 1 if backend == "FLASH_ATTN" else None
    asked = prompts([300, 280, 330, 57, 640, 900], seed=8)
    whole = {"claa_keep": "all"}
    extra = [None, whole, {"claa_keep": 64}, whole, None, {"claa_protect": [0, 1]}]
    options = {"attention_backend": backend}
    with gpu_engine(tiny_llama, **options) as running:
        plain = running.answers(asked)
    with gpu_engine(tiny_llama, PEAK, max_num_batched_tokens=512, **options) as running:
        together = running.answers(asked, extra=extra)
        lone = [running.answers([ids], extra=ask)[0] for ids, ask in zip(asked, extra, strict=True)]
    for mine, its, of_plain, ask in zip(together, lone, plain, extra, strict=True):
        assert (mine.tokens, mine.kept) == (its.tokens, its.kept)
        assert mine.logprobs[:compared] == its.logprobs[:compared]
        if ask == whole:
            assert mine.logprobs[:compared] == of_plain.logprobs[:compared]


@invariant
@pytest.mark.parametrize("options", [{"max_num_batched_tokens": 100}, {}], ids=["chunks", "hits"])
def test_batch_invariant_kernels_make_chunks_and_hits_change_no_bit(tiny_llama, options):
    shared = prompts([700], seed=9)[0]
    asked = [shared + end for end in prompts([60, 130, 190], seed=10)]
    with gpu_engine(tiny_llama, PEAK) as running:
        wanted = running.answers(asked)
    with gpu_engine(tiny_llama, PEAK, enable_prefix_caching=True, **options) as running:
        hits = running.hits()
        assert [running.answers([ids])[0] for ids in asked] == wanted
        running.assert_idle()
    assert sum(hit > 0 for hit in hits) >= 2


def test_two_gpus_keep_what_one_keeps(tiny_llama, eager, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions, to workers
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    asked = [{"prompt_token_ids": ids} for ids in ASKED]
    llm = LLM(
        tiny_llama,
        tensor_parallel_size=2,
        hf_overrides={"architectures": ["ClaaLlamaForCausalLM"]},
        additional_config={"claa": PEAK},
        max_model_len=4096,
        enforce_eager=True,
        skip_tokenizer_init=True,
        **GPU,
    )
    try:
        llm.apply_model(begin_log)
        outputs = llm.generate(asked, params, use_tqdm=False)
        first, second = llm.apply_model(logged)
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
    assert first == second and first  # bit for bit
    kept = {name.split("-")[0]: positions for name, positions in first.items()}
    answers = [
        Answer(list(each.outputs[0].token_ids), kept.get(each.request_id), []) for each in outputs
    ]
    assert same_kept(answers, eager["peak"]) > 0.9
