"""``claa-ops info``: how the ops were built, and what they run with."""

from __future__ import annotations

from claa_ops.cli.options import AsJson
from claa_ops.info import print_facts


def info(as_json: AsJson = False) -> None:
    """Print how the ops were built, and the versions of what they run with."""
    print_facts(as_json)
