"""Counters of what is kept, on the server's /metrics beside vLLM's own."""

from __future__ import annotations

from functools import cache
from typing import Any


def count(prompt: int, kept: int) -> None:
    """A prompt of so many tokens is about to be served, of which so many go deeper."""
    tokens, rate = _metrics()
    tokens.labels("prompt").inc(prompt)
    tokens.labels("kept").inc(kept)
    rate.observe(kept / max(prompt, 1))


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
