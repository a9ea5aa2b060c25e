"""The V2 runner, which vLLM takes where it has Triton; on a CPU the kernels are interpreted.

In a process of its own, since either all kernels of a process are interpreted or none.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not in this environment: make test-vllm")
pytest.importorskip("triton", reason="Triton is not in this environment")

from claa_ops.vllm.refusals import has_place_for_compressed

CASES = [
    "test_tokens_answers_and_blocks_are_those_of_the_adapter[claa-32-3]",
    "test_a_hit_reads_what_was_there_before_it_was_compressed[8192]",
    "test_preemption_changes_no_answer[caching]",
]


@pytest.mark.skipif(
    not has_place_for_compressed(), reason="this vLLM has no place for compressed caches"
)
def test_compressed_caches_with_the_v2_runner():
    tests = Path(__file__).with_name("test_front_caches.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(f"{tests}::{case}" for case in CASES)],
        env=os.environ | {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"},
        capture_output=True,
        text=True,
    )
    assert f"{len(CASES)} passed" in done.stdout, done.stdout
