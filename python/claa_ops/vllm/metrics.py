"""What is kept and how long selections take, beside vLLM's own metrics and in the log.

What is kept is counted where requests are admitted, in the process that has /metrics. Selections
run in a worker, whose metrics get there only if both are one process, or if both were started with
PROMETHEUS_MULTIPROC_DIR set. So a worker writes a line into the log as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any


def count(prompt: int, kept: int) -> None:
    """A prompt of so many tokens is about to be served, of which so many go deeper."""
    tokens, rate = _metrics()
    tokens.labels("prompt").inc(prompt)
    tokens.labels("kept").inc(kept)
    rate.observe(kept / max(prompt, 1))


class SelectionTimes:
    """The times of a worker's selections, in a histogram and, now and then, in a line.

    Args:
        say: writes a line into the log.
        every: seconds between two lines, at least.
        now: the time, in seconds.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        every: float = 10.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._every, self._now = say, every, now
        self._since, self._times = now(), list[float]()

    def add(self, seconds: float) -> None:
        """A step has spent so long on the selection of the prompts that ended in it."""
        _selection().observe(seconds)
        self._times.append(seconds)
        passed = self._now() - self._since
        if passed < self._every:
            return
        times = self._times
        mean, most = sum(times) / len(times) * 1e3, max(times) * 1e3
        self._say(
            f"claa: {len(times)} steps with a selection in {passed:.0f} s, "
            f"which took {mean:.2f} ms on average, at most {most:.2f} ms"
        )
        self._since, self._times = self._now(), []


@cache
def _selection() -> Any:
    from prometheus_client import Histogram

    buckets = [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    said = "Seconds that a step spends on the selection of the prompts that end in it."
    return Histogram("claa:selection_seconds", said, buckets=buckets)


@cache
def _metrics() -> tuple[Any, Any]:
    # When first needed: the server chooses where metrics are kept before it serves, not before
    # plug-ins are loaded.
    from prometheus_client import Counter, Histogram

    tokens = Counter(
        "claa:prompt_tokens",
        "Tokens of admitted prompts, and how many of them the layers behind the selection see.",
        ["seen"],
    )
    buckets = [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0]
    rate = Histogram("claa:keep_rate", "Share of a prompt that is kept.", buckets=buckets)
    return tokens, rate
