"""Engines against plain vLLM, and against our adapter on each prompt alone.

The numbers are those of the invariants: a full keep rate is plain vLLM (1); the adapter's tokens
and answers (2); neither who shares the batch (3), nor the size of chunks (4), nor preemption (5)
changes a result.
"""

import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM is not in this environment: make test-vllm")

from claa_ops.methods import CLAA, FastKV, Hops, Method, Peak
from support.engines import Answer, alone, assert_same, engine, prompts

LENGTHS = [300, 57, 640, 130, 5, 8, 9, 412]  # the window of CLAA is 8
METHODS: dict[str, tuple[dict, Method]] = {
    "claa": ({"method": "claa", "layer": 4, "keep": 0.2}, CLAA(layer=4, keep=0.2, keep_kv=1.0)),
    "peak": ({"method": "peak", "layer": 3, "keep": 0.3}, Peak(layer=3, keep=0.3, keep_kv=1.0)),
    "fastkv": ({"method": "fastkv", "layer": 3, "keep": 64}, FastKV(64, 3, keep_kv=1.0)),
    "hops": (
        {"method": "hops", "layer": 2, "keep": 0.3, "keep_least": 64},
        Hops(layer=2, keep=0.3, keep_kv=1.0, keep_least=64),
    ),
}


@pytest.fixture(scope="module")
def expected(tiny_llama: str) -> dict[str, list[Answer]]:
    asked = prompts(LENGTHS)
    return {name: alone(tiny_llama, asked, method) for name, (_, method) in METHODS.items()}


def test_a_full_keep_rate_is_plain_vllm(tiny_llama):
    asked = prompts(LENGTHS)
    with engine(tiny_llama) as plain:
        wanted = plain.answers(asked)
    with engine(tiny_llama, {"method": "peak", "layer": 3, "keep": 1.0}) as full:
        answers = full.answers(asked)
    assert [each.tokens for each in answers] == [each.tokens for each in wanted]
    assert [each.logprobs for each in answers] == [each.logprobs for each in wanted]


@pytest.mark.parametrize("name", METHODS)
def test_whole_prompts_keep_what_the_adapter_keeps(tiny_llama, expected, name):
    with engine(tiny_llama, METHODS[name][0]) as served:
        assert_same(served.answers(prompts(LENGTHS)), expected[name])
        assert not served.runtime.prompts


# A step of one token, one less than the window, a block, a prime; each with decoding in between.
@pytest.mark.parametrize(("name", "step"), [("claa", 7), ("peak", 32), ("hops", 97), ("claa", 131)])
def test_chunks_and_company_change_nothing(tiny_llama, expected, name, step):
    options = dict(max_num_batched_tokens=step, max_num_seqs=min(step, 3), block_size=32)
    with engine(tiny_llama, METHODS[name][0], **options) as served:
        assert_same(served.answers(prompts(LENGTHS)), expected[name])
        assert not served.runtime.prompts
        assert not any(served.held_blocks())


def test_a_step_of_one_token(tiny_llama):
    asked = prompts([40, 9], seed=2)
    settings, method = METHODS["claa"]
    with engine(tiny_llama, settings, max_num_batched_tokens=1, max_num_seqs=1) as served:
        assert_same(served.answers(asked, new=4), alone(tiny_llama, asked, method, new=4))


def test_what_goes_deeper_may_be_more_than_a_step_has(tiny_llama):
    asked = prompts([600, 500], seed=4)
    settings = {"method": "claa", "layer": 4, "keep": 0.5}
    wanted = alone(tiny_llama, asked, CLAA(layer=4, keep=0.5, keep_kv=1.0), new=4)
    with engine(tiny_llama, settings, max_num_batched_tokens=100) as served:
        assert_same(served.answers(asked, new=4), wanted)  # in passes of 100


def test_preempted_requests_keep_what_they_kept_before(tiny_llama):
    asked = prompts([100, 120, 90, 110, 130, 80, 140, 95], seed=3)
    settings, method = METHODS["claa"]
    options = dict(num_gpu_blocks_override=44, block_size=32, max_num_seqs=8, max_model_len=256)
    with engine(tiny_llama, settings, **options) as served:
        preempted = served.preemptions()
        answers = served.answers(asked, new=60)
        assert preempted
        assert_same(answers, alone(tiny_llama, asked, method, new=60))
        assert not served.runtime.prompts


def test_a_prompt_of_embeddings_is_answered_as_its_tokens(tiny_llama):
    from vllm import SamplingParams

    asked = prompts([300, 57], seed=5)
    settings, _ = METHODS["peak"]
    with engine(tiny_llama, settings, enable_prompt_embeds=True) as served:
        wanted = [answer.tokens for answer in served.answers(asked)]
        embed = served.runner.get_model().model.embed_tokens
        with torch.no_grad():
            given = [{"prompt_embeds": embed(torch.tensor(ids))} for ids in asked]
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        outputs = served.llm.generate(given, params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted
