"""Caches of the layers before the selection, compressed when a prompt is over (``keep_kv`` < 1)."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not in this environment: make test-vllm")

from claa_ops.methods import CLAA, FastKV, Method, Peak
from claa_ops.vllm.refusals import has_place_for_compressed
from claa_ops.vllm.scheduler import to_the_prompts_end
from claa_ops.vllm.spec import CompressedAttentionSpec, HiddenSpec, KeptAttentionSpec
from support.engines import MIXED, MIXED_ASKS, Engine, alone, assert_same, engine, prompts

pytestmark = pytest.mark.skipif(
    not has_place_for_compressed(),
    reason="this vLLM has no place for compressed caches, and refuses them: test_refusals.py",
)
NEW = 12
LENGTHS = [300, 57, 640, 130, 5, 16, 17, 412]
ASKED = prompts(LENGTHS)
METHODS: dict[str, tuple[dict, Method]] = {
    # Whole caches in layer 0, in the layers 1 to 4 compressed ones.
    "claa": (
        {"method": "claa", "layer": 4, "keep": 0.2, "keep_kv": 0.3, "first_full": 1},
        CLAA(layer=4, keep=0.2, keep_kv=0.3, first_full=1),
    ),
    "peak": (
        {"method": "peak", "layer": 3, "keep": 0.3, "keep_kv": 0.3},
        Peak(layer=3, keep=0.3, keep_kv=0.3),
    ),
    # Numbers: the method leaves shorter prompts alone.
    "fastkv": (
        {"method": "fastkv", "layer": 3, "keep": 64, "keep_kv": 96},
        FastKV(keep=64, layer=3, keep_kv=96),
    ),
}


@pytest.fixture(scope="module")
def expected(tiny_llama):
    return cache(lambda name: alone(tiny_llama, ASKED, METHODS[name][1], NEW))


def watch_blocks(served: Engine) -> list[int]:
    """Compare what each group holds with the formula after every allocation; counts these."""
    manager, checked = served.scheduler.kv_cache_manager, [0]
    plain = manager.allocate_slots

    def allocate_slots(request, tokens, *args, **kwargs):
        done = plain(request, tokens, *args, **kwargs)
        if done is None:
            return done
        before = request.num_computed_tokens  # without prefix caching there is no hit
        after, prompt = before + tokens, request.num_prompt_tokens
        kept = served.runtime.settings.kept(prompt)
        cached = served.runtime.settings.cached(prompt, kept)
        for each in manager.coordinator.single_type_managers:
            spec, size = each.kv_cache_spec, each.block_size
            held = sum(not block.is_null for block in each.req_to_blocks[request.request_id])
            if isinstance(spec, KeptAttentionSpec):
                entries = [kept + max(0, after - prompt)]
            elif isinstance(spec, HiddenSpec):
                entries = [] if before >= prompt else [min(after, prompt)]
            elif isinstance(spec, CompressedAttentionSpec) and cached < prompt:
                entries = [] if before >= prompt else [min(after, prompt)]
                entries += [cached + after - prompt] if after >= prompt else []
            else:
                entries = [after]
            assert held == sum(-(-each // size) for each in entries), type(spec)
        checked[0] += 1
        return done

    manager.allocate_slots = allocate_slots
    return checked


# Whole prompts; chunks of a block, and of a prime beside answers.
@pytest.mark.parametrize(
    ("name", "step", "rows"),
    [
        ("claa", 8192, 16),
        ("peak", 8192, 16),
        ("fastkv", 8192, 16),
        ("claa", 32, 3),
        ("peak", 97, 3),
    ],
)
def test_tokens_answers_and_blocks_are_those_of_the_adapter(tiny_llama, expected, name, step, rows):
    options = dict(max_num_batched_tokens=step, max_num_seqs=rows, block_size=32)
    with engine(tiny_llama, METHODS[name][0], **options) as served:
        checked = watch_blocks(served)
        assert_same(served.answers(ASKED, NEW), expected(name))
        assert checked[0] >= len(ASKED) * NEW
        served.assert_idle()


@pytest.mark.parametrize("step", [8192, 97])
def test_a_hit_reads_what_was_there_before_it_was_compressed(tiny_llama, expected, step):
    options = dict(max_num_batched_tokens=step, enable_prefix_caching=True, block_size=32)
    with engine(tiny_llama, METHODS["peak"][0], **options) as served:
        found = served.hits()
        size = served.runtime.parked.block_size
        for time in range(3):
            found.clear()
            assert_same(served.answers(ASKED, NEW), expected("peak"))
            served.assert_idle()
            most = [max(0, length - Peak().window) // size * size for length in LENGTHS]
            assert found == (most if time else [0] * len(most))


PREEMPTED = prompts([100, 120, 90, 110, 130, 80, 140, 95], seed=3)


@pytest.fixture(scope="module")
def not_preempted(tiny_llama):
    return alone(tiny_llama, PREEMPTED, METHODS["peak"][1], 60)


@pytest.mark.parametrize("caching", [False, True], ids=["no-caching", "caching"])
def test_preemption_changes_no_answer(tiny_llama, not_preempted, caching):
    settings = METHODS["peak"][0]
    options = dict(num_gpu_blocks_override=36, block_size=32, max_num_seqs=8, max_model_len=256)
    with engine(tiny_llama, settings, enable_prefix_caching=caching, **options) as served:
        preempted = served.preemptions()
        assert_same(served.answers(PREEMPTED, 60), not_preempted)
        assert max(preempted) > 0
        served.assert_idle()


@pytest.mark.parametrize("step", [8192, 96])
def test_requests_that_keep_more_or_all_in_one_batch(tiny_llama, step):
    settings = {"method": "peak", "layer": 3, "keep": 0.2, "keep_kv": 0.25, "min_prompt": 60}
    methods = {
        0: Peak(layer=3, keep=0.2, keep_kv=0.25),
        1: Peak(layer=3, keep=0.5, keep_kv=0.5),  # no fewer than go deeper
        5: Peak(layer=3, keep=64, keep_kv=72),
    }
    with engine(tiny_llama) as plain:
        whole = plain.answers([MIXED[2], MIXED[4]], NEW)
    with engine(tiny_llama, settings, max_num_batched_tokens=step, block_size=32) as served:
        together = served.answers(MIXED, NEW, extra=MIXED_ASKS)
        each = [
            served.answers([ids], NEW, extra=[own])[0]
            for ids, own in zip(MIXED, MIXED_ASKS, strict=True)
        ]
        assert_same(together, each)
        served.assert_idle()
    for index, method in methods.items():
        assert_same([together[index]], alone(tiny_llama, [MIXED[index]], method, NEW))
    assert [together[index].tokens for index in (2, 4)] == [each.tokens for each in whole]
    assert {*range(40), *range(100, 130)} <= {*together[3].kept}


def test_a_step_ends_where_a_prompt_does():
    request = SimpleNamespace(num_prompt_tokens=100, num_computed_tokens=0)
    assert to_the_prompts_end(request, 130) == 100
    assert to_the_prompts_end(request, 130, 64, 0) == 36
    assert to_the_prompts_end(request, 7) == 7
    request.num_computed_tokens = 100
    assert to_the_prompts_end(request, 30) == 30
