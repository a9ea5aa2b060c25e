"""The public API, listed once: a name that comes or goes is a change here and in CHANGELOG.md."""

import inspect
import re
import subprocess
import sys
from importlib import import_module

import pytest

PUBLIC = {
    "claa_ops": """
        aggregate_scores compact_pages gather_kv gather_pages gather_rows gather_tokens hop_tokens
        kept_metadata peak_attention peak_attention_paged pool_heads rank_variance score_layer
        score_layer_paged score_tokens score_window select_topk select_topk_packed store_pages
    """,
    "claa_ops.methods": """
        ASL CLAA Coarse FastKV FastKVDeferral FullKV GemFilter Hops LazyLLM METHODS Method Oracle
        Peak PromptDistill Pruning PyramidInfer PyramidKV Random SelectiveContext SinksRandom SnapKV
        SpeculativePrefill StreamingLLM UniPrefill find_method make_method register
    """,
    "claa_ops.prefill": """
        ChatParts ClaaCache PackedPrefill PrefillState Prefilled StaticClaaCache attach attached
        begin begin_packed decode detach generate prefill tuned_method
    """,
    "claa_ops.selection": """
        Answer Budget Layer Method PackedPrefill PrefillState Preparation Reader Sizes TakenUp Turn
        Work begin begin_packed
    """,
}
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names.split()]


def sections(docstring: str) -> set[str]:
    """The words that stand alone on an unindented line and end in a colon, and Source."""
    lines = docstring.splitlines()
    found = {line[:-1] for line in lines if line.endswith(":") and line[:-1].isalpha()}
    return found | {"Source" for line in lines if line.startswith("Source: ")}


@pytest.mark.parametrize("module", PUBLIC)
def test_is_what_is_listed(module):
    assert sorted(import_module(module).__all__) == sorted(PUBLIC[module].split())


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_has_a_docstring(module, name):
    """A function describes each parameter, or refers to a function that does."""
    home = import_module(module)
    value = getattr(home, name)
    if not callable(value):
        return
    docstring = inspect.getdoc(value)
    assert docstring and docstring.splitlines()[0].endswith(".")
    if inspect.isfunction(value):
        referred = re.findall(r":func:`(\w+)`", docstring)
        told = "\n".join([docstring, *(inspect.getdoc(getattr(home, other)) for other in referred)])
        missing = {
            x for x in inspect.signature(value).parameters if not re.search(rf"\b{x}\b", told)
        }
        assert not missing


@pytest.mark.parametrize("op", PUBLIC["claa_ops"].split())
def test_an_op_says_what_it_takes_gives_and_refuses(op):
    docstring = inspect.getdoc(getattr(import_module("claa_ops"), op))
    assert {"Args", "Returns", "Raises", "Source", "Example"} <= sections(docstring)


def test_the_reference_comes_with_the_package():
    """In a process of its own: here others have imported it already."""
    use = "import claa_ops; claa_ops.reference.pool_heads"
    subprocess.run([sys.executable, "-c", use], check=True)
