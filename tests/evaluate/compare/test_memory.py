"""The peak of a piece of work: all that it held at once, and nothing that came before."""

import sys

import pytest
import torch

from claa_ops.evaluate.compare.memory import watch_memory

MEBIBYTE = 2**20
SLACK = 2 * MEBIBYTE  # Python's own, and what the kernel counts late
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells the peak of a resident set"
)


def fill(mebibytes: int) -> None:
    torch.ones(mebibytes * MEBIBYTE, dtype=torch.uint8)


@linux
@pytest.mark.parametrize("times", [1, 3])
def test_peak_is_what_the_body_needed_at_once(times):
    with watch_memory(torch.device("cpu")) as peak:
        for _ in range(times):
            fill(64)
    assert abs(peak.bytes - 64 * MEBIBYTE) < SLACK


@linux
def test_what_is_held_together_counts_together():
    with watch_memory(torch.device("cpu")) as peak:
        held = [torch.ones(32 * MEBIBYTE, dtype=torch.uint8) for _ in range(3)]
        del held
        fill(64)
    assert abs(peak.bytes - 96 * MEBIBYTE) < SLACK


@linux
def test_an_earlier_peak_does_not_count():
    fill(256)
    with watch_memory(torch.device("cpu")) as peak:
        fill(8)
    assert abs(peak.bytes - 8 * MEBIBYTE) < SLACK


@linux
def test_memory_that_was_freed_before_is_no_room_for_the_body():
    blocks = [torch.ones(MEBIBYTE // 4, dtype=torch.uint8) for _ in range(256)]
    del blocks
    with watch_memory(torch.device("cpu")) as peak:
        blocks = [torch.ones(MEBIBYTE // 4, dtype=torch.uint8) for _ in range(128)]
        del blocks
    assert abs(peak.bytes - 32 * MEBIBYTE) < SLACK


@linux
def test_an_error_in_the_body_is_the_caller_s():
    with pytest.raises(ZeroDivisionError), watch_memory(torch.device("cpu")):
        1 / 0  # noqa: B018


def test_a_platform_that_does_not_tell_gives_none(monkeypatch, tmp_path):
    monkeypatch.setattr("claa_ops.evaluate.compare.memory._PROCESS", tmp_path / "no such")
    with watch_memory(torch.device("cpu")) as peak:
        fill(1)
    assert peak.bytes is None
