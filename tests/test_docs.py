"""What README and the documentation say is true: their programs run, their links lead somewhere."""

import importlib
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from claa_ops import gather_tokens
from claa_ops.methods import CLAA, METHODS
from claa_ops.prefill import begin
from support.chat_templates import CHATML, chat_tokenizer
from support.tiny_checkpoint import tiny_tokenizer
from support.tiny_models import build, prompt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs/index.md", *sorted((ROOT / "docs/guide").glob("*.md"))]
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("[!.]*/README.md")]
PUBLIC = ["claa_ops", "claa_ops.methods", "claa_ops.prefill", "claa_ops.selection"]
CHECKPOINT = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that is deep enough for the layers which the pages name."""
    folder = tmp_path_factory.mktemp("deep")
    sizes = {"vocab_size": 300, "num_hidden_layers": 24, "max_position_embeddings": 4096}
    build("llama", **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def names(checkpoint: str) -> dict:
    """What the programs of the pages take for granted."""
    from transformers import AutoModelForCausalLM

    own = runpy.run_path(str(ROOT / "examples/own_model_compiled.py"))
    batch_ids, batch_mask = prompt(80, 60)
    return {
        "model": AutoModelForCausalLM.from_pretrained(checkpoint),
        "ids": prompt(120)[0],
        "tokenizer": chat_tokenizer(CHATML, merges=False),
        "messages": [{"role": "system", "content": "Help."}, {"role": "user", "content": "Now?"}],
        "tools": [{"type": "function", "function": {"name": "now", "parameters": {}}}],
        "batch_ids": batch_ids,
        "batch_mask": batch_mask,
        "layers": [own["Layer"]() for _ in range(24)],
        "hidden": torch.randn(2, 120, own["WIDTH"]),
        "rotary": own["angles"](torch.arange(120)).expand(2, -1, -1),
        "attention": lambda query, key, value: F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        ),
        "caches": {},
        "begin": begin,
        "gather_tokens": gather_tokens,
        "CLAA": CLAA,
    }


@pytest.mark.usefixtures("single_thread")
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem
)
def test_the_programs_of_a_page_run(page, names, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("word " * 60)
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)  # examples compile
    with torch.no_grad():
        for block in blocks(page):
            exec(compile(block.replace(CHECKPOINT, checkpoint), page.name, "exec"), names)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_links_to_files_lead_somewhere(text):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)", text.read_text())
    assert not [link for link in links if not (text.parent / link).exists()]


def test_every_method_is_in_the_guide():
    rows = re.findall(
        r"^\| `(\w+)`, `([\w-]+)` \|", (ROOT / "docs/guide/choose-method.md").read_text(), re.M
    )
    assert {name: method for method, name in rows} == {k: m.__name__ for k, m in METHODS.items()}
    assert f"{len(METHODS) - 1} others" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module):
    pages = "".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.rst"))
    found = re.findall(
        r"^\.\. (?:autofunction|autoclass|py:data):: (?:[\w.]+\.)?(\w+)$", pages, re.M
    )
    assert set(importlib.import_module(module).__all__) <= set(found)
