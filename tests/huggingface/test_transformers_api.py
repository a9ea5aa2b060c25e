"""One module knows transformers' internals: the others ask it."""

import ast
from pathlib import Path

import pytest
import torch

import claa_ops
from claa_ops.huggingface import transformers_api
from claa_ops.huggingface.transformers_api import cache_argument, cache_of

SOURCES = Path(claa_ops.__file__).parent
ALONE = Path(transformers_api.__file__)
PUBLIC = {
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "DynamicCache",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "logging",
}
INSIDE = {
    *transformers_api.CACHE_NAMES[1:],
    "_attn_implementation",
    "get_decoder",
    "set_attn_implementation",
}


def touched(tree: ast.AST):
    """What a module imports from transformers, and which of its internal names it uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("transformers."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.keyword | ast.arg) and node.arg in INSIDE:
            yield node.arg
        elif isinstance(node, ast.Attribute) and node.attr in INSIDE:
            yield node.attr
        elif isinstance(node, ast.Constant) and node.value in INSIDE:
            yield node.value


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda path: path.stem)
def test_no_other_module_reaches_inside(path):
    allowed = {f"transformers.{name}" for name in PUBLIC}
    found = set(touched(ast.parse(path.read_text()))) - allowed
    assert bool(found) == (path == ALONE), found


@pytest.mark.parametrize("name", transformers_api.CACHE_NAMES)
def test_the_cache_goes_by_the_name_that_the_signature_has(name):
    namespace = {}
    exec(f"def forward(self, ids, {name}=None): return {name}", namespace)
    module = type("Layer", (torch.nn.Module,), {"forward": namespace["forward"]})()
    cache = object()
    assert module(1, **cache_argument(module, cache)) is cache
    assert cache_of({"ids": 1, name: cache}) is cache
    assert cache_of({"ids": 1, name: None}) is None
