"""Evaluations by name: those that others have published, and ours."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from claa_ops.evaluate.parse import Budget
from claa_ops.huggingface.models import InputError


@dataclass(frozen=True)
class Suite:
    """Methods, budgets and prompts of an evaluation; records come from files.

    Attributes:
        methods: those that any model can run.
        drafted: those that need a draft as well.
        keeps: their rates.
        lengths, depths, prompts: of the prompts made here; depths are those of needles.
        tasks: those made here.
    """

    methods: Sequence[str]
    drafted: Sequence[str]
    keeps: Sequence[Budget]
    lengths: Sequence[int]
    depths: Sequence[float]
    prompts: int
    tasks: Sequence[str] = ("needle",)


_OURS = ("claa", "fastkv", "peak", "hops", "coarse", "random", "oracle")

# CLAA (arXiv 2602.16054): LongBench, RULER and needles of 16k to 64k tokens at ten depths, keep
# 10, 20 and 40 %, selection after the last layer of the first half. Its table has GemFilter,
# Speculative Prefill, FastKV and the oracle; here is every method that there is, as its own paper
# has it, and the two controls that say what the score alone is worth: FastKV with CLAA's deferral,
# and FastKV with as many bytes of cache as CLAA has.
SUITES = {
    "claa-paper": Suite(
        methods=(
            "snapkv",
            "pyramidkv",
            "streaming",
            "gemfilter",
            "fastkv",
            "claa",
            "claa:zscore=true",
            "asl",
            "asl:passes=2",
            "asl:full_before=true",
            "pyramidinfer:rho=0.7",  # it has no rate: about 60, 50 and 35 % of the cache
            "pyramidinfer",
            "pyramidinfer:rho=0.01:recent=0.01",
            "lazyllm",
            "promptdistill",
            "uniprefill",  # it has no rate either
            "selective-context",
            "peak",
            "hops",
            "coarse",
            "oracle",
            "random",
            "sinks-random",
            "fastkv-deferral",
            "fastkv@claa",
        ),
        drafted=("speculative", "speculative:chunk=null:kernel_size=7"),  # the latter CLAA's own
        keeps=(0.1, 0.2, 0.4),
        lengths=(16_000, 32_000, 48_000, 64_000),
        depths=tuple(depth / 9 for depth in range(10)),
        prompts=1,
    ),
    # RULER's tasks (arXiv 2404.06654) and those that it lacks, made here; the methods that drop
    # tokens early, between the worst ranking and the best.
    "ruler": Suite(
        methods=_OURS,
        drafted=(),
        keeps=(0.1, 0.2),
        lengths=(4096, 16_384),
        depths=(0.5,),
        prompts=20,
        tasks=("ruler",),
    ),
    "beyond": Suite(
        methods=_OURS,
        drafted=(),
        keeps=(0.1, 0.2),
        lengths=(4096, 16_384),
        depths=(0.5,),
        prompts=20,
        tasks=("beyond",),
    ),
}


def find_suites(names: Sequence[str]) -> Suite:
    """The suites of these names in one; InputError, with the nearest name, for an unknown one."""
    for name in names:
        if name not in SUITES:
            near = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown suite {name!r}: did you mean {near!r}?")
    suites = [SUITES[name] for name in names]

    def together(setting: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(part for suite in suites for part in getattr(suite, setting)))

    return Suite(
        methods=together("methods"),
        drafted=together("drafted"),
        keeps=together("keeps"),
        lengths=together("lengths"),
        depths=together("depths"),
        prompts=max(suite.prompts for suite in suites),
        tasks=together("tasks"),
    )
