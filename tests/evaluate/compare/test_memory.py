import sys
import threading
import time

import pytest
import torch

from claa_ops.evaluate.compare.memory import watch_memory

MEBIBYTE = 2**20
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells the peak of a resident set"
)


def fill(mebibytes: int) -> None:
    memory = torch.ones(mebibytes * MEBIBYTE, dtype=torch.uint8)
    time.sleep(0.05)  # for a few samples
    del memory


@linux
def test_peak_is_what_the_body_needed_at_once():
    with watch_memory(torch.device("cpu")) as peak:
        for _ in range(3):
            fill(64)
    assert 60 * MEBIBYTE < peak.bytes < 100 * MEBIBYTE


@linux
def test_an_earlier_peak_does_not_count():
    fill(256)
    with watch_memory(torch.device("cpu")) as peak:
        fill(8)
    assert peak.bytes < 64 * MEBIBYTE


@linux
def test_an_error_in_the_body_ends_the_thread():
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), watch_memory(torch.device("cpu")):
        1 / 0  # noqa: B018
    assert threading.active_count() == threads


def test_a_platform_that_does_not_tell_gives_none(monkeypatch, tmp_path):
    monkeypatch.setattr("claa_ops.evaluate.compare.memory._STATM", tmp_path / "statm")
    with watch_memory(torch.device("cpu")) as peak:
        fill(1)
    assert peak.bytes is None
