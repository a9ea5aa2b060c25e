"""The examples in the docstrings of the evaluation give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import claa_ops.evaluate

MODULES = [
    module.name
    for module in pkgutil.walk_packages(claa_ops.evaluate.__path__, "claa_ops.evaluate.")
    if not module.ispkg
]
WITH_EXAMPLES = {
    f"claa_ops.evaluate.{name}" for name in ("parse", "intervals", "grid.cells", "oracle.measures")
}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert (results.attempted > 0) == (name in WITH_EXAMPLES)
