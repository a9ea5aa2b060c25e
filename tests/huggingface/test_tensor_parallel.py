"""A model whose heads are in two processes keeps, and answers, what it does in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from support import tensor_parallel
from support.tensor_parallel import BATCHES, METHODS, PROCESSES, find
from support.tiny_models import build
from support.workers import made_once

SECONDS = 300  # after which processes that wait for each other are given up
CASES = [f"{name}, {lengths}" for name in METHODS for lengths in BATCHES]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process finds, and what each of two does."""
    folder = made_once(tmp_path_factory, "tensor_parallel", find_all)
    names = ["alone", *range(PROCESSES)]
    alone, *apart = (torch.load(folder / f"{name}.pt", weights_only=False) for name in names)
    return alone, apart


def find_all(folder: Path) -> None:
    """Save what one process and two find, at the same time."""
    vocab_size = 100  # 5.17 divides it too
    build("llama", vocab_size=vocab_size).save_pretrained(folder / "model")
    uneven = build("llama", vocab_size=vocab_size, num_key_value_heads=1)
    uneven.save_pretrained(folder / "uneven")
    script = Path(tensor_parallel.__file__)
    paths = [str(script.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_VISIBLE_DEVICES": "",  # gloo, on the CPU
        "OMP_NUM_THREADS": "1",
    }
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    command = [sys.executable, "-m", *torchrun, str(script), str(folder)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        try:
            alone = find(AutoModelForCausalLM.from_pretrained(folder / "model"))
            output, _ = running.communicate(timeout=SECONDS)
        finally:
            running.terminate()
    assert running.returncode == 0, output[-5000:]
    torch.save(alone, folder / "alone.pt")


def compare(results, case):
    """What one process finds in a case, and what each of several does, which must agree."""
    alone, apart = results[0][case], [each["found"][case] for each in results[1]]
    for own in apart:
        assert (own["positions"] is None) == (alone["positions"] is None)
        if alone["positions"] is not None:
            assert torch.equal(own["positions"], alone["positions"])
        assert torch.equal(own["answer"], alone["answer"])
    return alone, apart


@pytest.mark.parametrize("case", CASES)
def test_two_processes_keep_and_answer_what_one_does(results, case):
    alone, apart = compare(results, case)
    if alone["ranking"] is not None:
        assert torch.equal(apart[0]["ranking"], apart[1]["ranking"])  # to the bit
    for one, *others in zip(*(each["scores"].values() for each in (alone, *apart)), strict=True):
        assert torch.equal(*others)
        if (
            "pyramidinfer" not in case
        ):  # whose means over heads are merged as a sum, which ranks alike
            torch.testing.assert_close(one, others[0], atol=1e-4, rtol=1e-4)
    assert all(own["work"] == alone["work"] for own in apart)


@pytest.mark.parametrize("case", [*CASES, "second look"])
def test_each_process_holds_the_entries_of_its_own_heads(results, case):
    alone, apart = compare(results, case)
    for one, *others in zip(*(each["keys"] for each in (alone, *apart)), strict=True):
        assert [each.shape[1] for each in others] == [one.shape[1] // PROCESSES] * PROCESSES
        torch.testing.assert_close(one, torch.cat(others, dim=1), atol=1e-3, rtol=1e-3)


def test_generate_answers_as_in_one_process(results):
    compare(results, "generate")


def test_each_process_knows_the_model_by_its_whole_weights(results):
    alone, apart = results
    for each in apart:
        assert each["found"]["model"] == alone["model"]


REFUSED = {
    "uneven": "attach: LlamaForCausalLM must have key/value heads that 2 processes share evenly, "
    "got 1",
    "base": "attach: LlamaModel must be the whole model that was loaded tensor parallel, "
    "got a part of it",
    "attached": "Hops: states must be 'hidden' where the heads are on several devices, got 'value'",
    "prefill": "Hops: states must be 'hidden' where the heads are on several devices, got 'value'",
    "unmerged": "ClaaCache: Unmerged must select the same tokens in every process, by a ranking "
    "that layer.reduce has merged, got different ones",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_divided_is_refused(results, what):
    for each in results[1]:
        assert each["refused"][what] == REFUSED[what]
