"""How long selections take: on a GPU between events, for which nobody waits."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Adds up, for each step, how long its measured parts take.

    A step is reported when a later one starts and the device has done it, never earlier.

    Args:
        report: is told the seconds of a step that has measured parts.

    Example:
        >>> clock = Clock(lambda seconds: print(seconds < 1))
        >>> with clock.measure(torch.device("cpu")):
        ...     pass
        >>> clock.start_step()
        True
    """

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report
        self._parts: list[tuple[Any, Any]] = []
        self._steps: deque[list[tuple[Any, Any]]] = deque()

    def start_step(self) -> None:
        """A step is over, another one starts."""
        if self._parts:
            self._steps.append(self._parts)
            self._parts = []
        while self._steps and _passed(self._steps[0][-1][1]):
            self._report(sum(_seconds(*part) for part in self._steps.popleft()))

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """What runs within is a measured part."""
        begin = _moment(device)
        yield
        self._parts.append((begin, _moment(device)))


def _moment(device: torch.device) -> Any:
    """Now, as a GPU will see it when it gets there; elsewhere as the host does."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _passed(moment: Any) -> bool:
    return isinstance(moment, float) or moment.query()


def _seconds(begin: Any, end: Any) -> float:
    seconds = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
    return float(seconds)
