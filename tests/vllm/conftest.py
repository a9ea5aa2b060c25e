"""A tiny model for engines. `make test-vllm` has an environment with vLLM, the others skip this."""

import os

import pytest
import torch

from support.engines import interpret_triton, save_tiny_llama

if os.environ.get("TRITON_INTERPRET") == "1":  # as test_runner_v2.py starts it
    interpret_triton()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)
