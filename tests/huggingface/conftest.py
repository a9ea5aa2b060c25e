import pytest


@pytest.fixture(autouse=True)
def every_test_has_a_single_thread(single_thread):
    """The models of this folder are tiny."""
