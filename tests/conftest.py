"""The devices that the tests run on, and how many examples hypothesis tries."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import claa_ops

# Derandomized, so that a failure is reproducible. No deadline: the machine is shared.
settings.register_profile("claa", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("claa")


def _has_cuda_kernels() -> bool:
    scores = torch.zeros(1, 1, device="cuda")
    try:
        claa_ops.aggregate_scores(scores, scores)
    except RuntimeError as error:
        if "no CUDA kernel" in str(error):
            return False
        raise
    return True


DEVICES = ["cpu"] + ["cuda"] * (torch.cuda.is_available() and _has_cuda_kernels())


@pytest.fixture(params=DEVICES, scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def single_thread() -> Iterator[None]:
    """Tiny models are slower with threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a tiny random model."""
    from support.tiny_checkpoint import save_tiny_checkpoint  # not for tests without models

    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))
