"""Which thread computes a unit, and when, changes no bit: threads, callers, forked processes."""

import multiprocessing
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import claa_ops
from support.inputs import normal, queries_and_keys, threads
from support.pages import in_pages

TIMEOUT_S = 120
ROOT = Path(__file__).parents[2]


def calls() -> dict[str, Callable[[], Tensor]]:
    """One call of each op with more than one step or round, large enough for several threads."""
    query, key = queries_and_keys(2, 6, 3, 8, 2100, 32, device="cpu")
    lse = normal(2, 6, 8, device="cpu") + 8
    scores = normal(5, 2, 3000, device="cpu")
    states = normal(2, 2, 3000, 24, device="cpu")
    paged = in_pages([x.transpose(0, 1) for x in (key[0], key[1, :, :900])], 16)
    windows = query.transpose(1, 2)

    def written(op: Callable[..., None], *shape: int) -> Tensor:
        highest = torch.zeros(shape)
        op(highest, windows, *paged)
        return highest

    def running(call: Callable[[Tensor], Tensor]) -> Tensor:
        highest = torch.zeros(2, 2100 - 8)
        return torch.cat([call(highest).flatten(), highest.flatten()])

    return {
        "score_window": lambda: claa_ops.score_window(query, key),
        "score_tokens": lambda: claa_ops.score_tokens(query, key),
        "score_tokens, lse given": lambda: claa_ops.score_tokens(query, key, lse=lse),
        "score_layer": lambda: running(lambda x: claa_ops.score_layer(x, query, key)),
        "score_layer_paged": lambda: written(claa_ops.score_layer_paged, 2, 2092),
        "peak_attention_paged": lambda: written(claa_ops.peak_attention_paged, 2, 8, 2100),
        "peak_attention": lambda: claa_ops.peak_attention(query, key),
        "rank_variance": lambda: claa_ops.rank_variance(scores, 300),
        "hop_tokens": lambda: claa_ops.hop_tokens(scores[0], states),
        "select_topk": lambda: claa_ops.select_topk(scores, 300),
    }


def bits(result: Tensor) -> bytes:
    return result.numpy().tobytes()


def expected() -> dict[str, bytes]:
    with threads(1):
        return {name: bits(call()) for name, call in calls().items()}


def wrong(count: int, callers: int = 1, repeats: int = 5) -> list[str]:
    """The ops whose bits differ with so many threads, called from so many threads at once."""
    right = expected()
    with threads(count), ThreadPoolExecutor(callers) as pool:

        def check(caller: int) -> set[str]:
            torch.set_num_threads(count)  # each thread has its own number
            found = set()
            for repeat in range(repeats):
                if repeat == 1:
                    time.sleep(0.05)  # torch's threads fall asleep, so that ours take over
                found |= {name for name, call in calls().items() if bits(call()) != right[name]}
            return found

        return sorted(set().union(*pool.map(check, range(callers))))


@pytest.mark.parametrize("count", [2, 3, 5, 8, 33])
def test_any_number_of_threads(count):
    assert wrong(count) == []


@pytest.mark.parametrize("callers", [2, 7])
def test_several_callers_at_once(callers):
    assert wrong(3, callers) == []


def _exit_with_wrong(count: int, callers: int) -> None:
    raise SystemExit(len(wrong(count, callers)))


@pytest.mark.parametrize("callers", [1, 3])
def test_a_forked_process(callers):
    """As a data loader's workers are: their parent's threads are not there to help."""
    assert wrong(4) == []  # the parent has threads
    child = multiprocessing.get_context("fork").Process(target=_exit_with_wrong, args=(4, callers))
    child.start()
    child.join(TIMEOUT_S)
    try:
        assert child.exitcode == 0
    finally:
        child.kill()


@given(
    count=st.integers(2, 12),
    heads=st.integers(1, 5),
    tokens=st.integers(9, 1600),
    batch=st.integers(1, 3),
)
def test_more_threads_than_units_and_fewer(count, heads, tokens, batch):
    """A unit that nobody computed would leave the NaNs of the memory that was freed before."""
    query, key = queries_and_keys(batch, heads, heads, 8, tokens, 64, device="cpu")
    with threads(1):
        alone = claa_ops.score_tokens(query, key)
    torch.full_like(alone, torch.nan)
    with threads(count):
        assert bits(claa_ops.score_tokens(query, key)) == bits(alone)


def test_each_unit_is_done_once_and_in_its_turn(tmp_path):
    """The dealer alone, from C++: the result of an op would not show a unit that was done twice."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "deal_units"
    sources = [Path(__file__).with_name("deal_units.cpp")]
    sources += [ROOT / "csrc/cpu" / name for name in ("helpers.cpp", "progress.cpp")]
    subprocess.run(
        [compiler, "-std=gnu++20", "-O1", "-pthread", f"-I{ROOT}", "-o", program, *sources],
        check=True,
    )
    result = subprocess.run([program], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (result.stdout, result.returncode) == ("", 0)
