"""The example in each op's docstring is true."""

import doctest

import pytest
import torch

import claa_ops


@pytest.mark.parametrize("op", claa_ops.__all__)
def test_example_holds(op):
    function = getattr(claa_ops, op)
    found = doctest.DocTestFinder().find(function, op, globs={"torch": torch, op: function})
    results = [doctest.DocTestRunner(verbose=False).run(test) for test in found]
    assert sum(result.attempted for result in results) > 0, "the docstring has no example"
    assert sum(result.failed for result in results) == 0
