import pytest
import torch


@pytest.fixture(autouse=True)
def single_thread():
    """Models this tiny only lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
