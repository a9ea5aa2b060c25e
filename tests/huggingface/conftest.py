"""Tests of the adapter, on tiny models."""

import pytest


@pytest.fixture(autouse=True)
def every_test_has_a_single_thread(single_thread):
    """Tiny models run fastest so."""
