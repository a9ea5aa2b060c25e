"""How long selections take: measured without waiting, counted, and said now and then."""

import pytest
import torch

from claa_ops.vllm.metrics import SelectionTimes
from claa_ops.vllm.timing import Clock

prometheus_client = pytest.importorskip("prometheus_client")


class Event:
    """A GPU's, which is done when it is told so."""

    made: list["Event"] = []

    def __init__(self, enable_timing):
        assert enable_timing
        self.done, self.place = False, len(self.made)
        self.made.append(self)

    def record(self):
        pass

    def query(self):
        return self.done

    def elapsed_time(self, other):
        assert self.done and other.done, "to ask earlier is to wait"
        return 2.0 * (other.place - self.place)


def test_parts_of_a_step_are_added_up_and_reported_by_a_later_one():
    reported = []
    clock = Clock(reported.append)
    for _ in range(3):
        with clock.measure(torch.device("cpu")):
            pass
    assert not reported
    clock.start_step()
    clock.start_step()
    (seconds,) = reported
    assert 0 < seconds < 1


def test_on_a_gpu_a_step_is_reported_once_it_is_done(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "made", [])
    reported = []
    clock = Clock(reported.append)
    for parts in (2, 1):
        for _ in range(parts):
            with clock.measure(torch.device("cuda")):
                pass
        clock.start_step()
    assert not reported and len(Event.made) == 6
    for event in Event.made[:4]:
        event.done = True
    clock.start_step()
    assert reported == [0.004]
    for event in Event.made:
        event.done = True
    clock.start_step()
    assert reported == [0.004, 0.002]


def test_a_line_sums_up_what_came_since_the_last():
    moment, said = [0.0], []
    times = SelectionTimes(said.append, every=10, now=lambda: moment[0])
    before = prometheus_client.REGISTRY.get_sample_value("claa:selection_seconds_count") or 0
    for at, seconds in [(1, 0.001), (9, 0.003), (12, 0.002), (13, 0.5)]:
        moment[0] = at
        times.add(seconds)
    assert said == [
        "claa: 3 steps with a selection in 12 s, which took 2.00 ms on average, at most 3.00 ms"
    ]
    count = prometheus_client.REGISTRY.get_sample_value("claa:selection_seconds_count")
    assert count == before + 4
