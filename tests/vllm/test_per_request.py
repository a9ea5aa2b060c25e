"""Requests that keep more, less, or all, side by side in one engine."""

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not in this environment: make test-vllm")

from prometheus_client import REGISTRY

from claa_ops.methods import Peak
from support.engines import MIXED, MIXED_ASKS, alone, engine

PEAK = {"method": "peak", "layer": 3, "keep": 0.2, "min_prompt": 60}
METHOD = Peak(layer=3, keep=0.2, keep_kv=1.0)
WHOLE = [2, 4]
PROTECTED = 3


def timed():
    """How many steps have said how long their selection took."""
    return REGISTRY.get_sample_value("claa:selection_seconds_count") or 0


@pytest.fixture(scope="module", params=[8192, 96], ids=["whole", "chunks"])
def served(request, tiny_llama):
    """Answers of one engine: all together, and each alone."""
    limit, before = request.param, timed()
    with engine(tiny_llama, PEAK, max_num_batched_tokens=limit, max_num_seqs=8) as started:
        together = started.answers(MIXED, extra=MIXED_ASKS)
        each = [
            started.answers([ids], extra=[own])[0]
            for ids, own in zip(MIXED, MIXED_ASKS, strict=True)
        ]
        left = started.held_blocks()
        assert not started.runtime.prompts
        assert timed() > before
    return together, each, left


@pytest.fixture(scope="module")
def plain(tiny_llama):
    with engine(tiny_llama) as started:
        return started.answers([MIXED[index] for index in WHOLE])


def test_each_is_as_it_is_alone(served):
    together, each, left = served
    for mixed, own in zip(together, each, strict=True):
        assert (mixed.tokens, mixed.kept) == (own.tokens, own.kept)
    assert set(left) == {0}


def test_as_many_are_kept_as_asked_for(served):
    together, _, _ = served
    counts = [None if answer.kept is None else len(answer.kept) for answer in together]
    protected = 40 + 30  # the last five are in the window
    assert counts == [60, 140, None, protected + (310 - protected) // 5, None, 64]


def test_protected_tokens_are_never_dropped(served):
    together, _, _ = served
    kept = together[PROTECTED].kept
    assert kept == sorted(set(kept))
    window = range(310 - METHOD.window, 310)
    assert {*range(40), *range(100, 130), *window} <= {*kept}


@pytest.mark.parametrize(("index", "keep"), [(0, 0.2), (1, 0.5), (5, 64)])
def test_kept_tokens_and_answers_are_those_of_the_adapter(served, tiny_llama, index, keep):
    method = Peak(layer=3, keep=keep, keep_kv=1.0)
    (expected,) = alone(tiny_llama, [MIXED[index]], method)
    answer = served[0][index]
    assert answer.kept == expected.kept and answer.tokens == expected.tokens


def test_whole_prompts_are_served_as_by_plain_vllm(served, plain):
    """To rounding: neighbours and chunks change the order of sums. The next test is to the bit."""
    for index, expected in zip(WHOLE, plain, strict=True):
        answer = served[0][index]
        assert answer.kept is None and answer.tokens == expected.tokens
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize("keep", [1, 0.01])
def test_the_least_that_a_request_can_keep(tiny_llama, keep):
    with engine(tiny_llama, PEAK) as started:
        (answer,) = started.answers([MIXED[0]], extra={"claa_keep": keep})
    assert len(answer.kept) == METHOD.window + METHOD.num_sinks


def test_a_server_that_prunes_nothing_is_plain_vllm_to_the_bit(tiny_llama):
    asked = [ids[:57] for ids in MIXED]
    with engine(tiny_llama) as started:
        expected = started.answers(asked)
    with engine(tiny_llama, PEAK) as started:
        assert started.answers(asked) == expected
