"""A page that shows a prompt's tokens, coloured by how high a ranking places them."""

from __future__ import annotations

import html
import json
from importlib import resources
from pathlib import Path
from string import Template

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from claa_ops.evaluate.oracle.rank import RankedPrompt

# Shades from 4 down to 1, each for the tokens up to this share of the context; 0 for the rest.
_SHARES = (0.01, 0.03, 0.1, 0.3)
_LEGEND = ("best 1 %", "to 3 %", "to 10 %", "to 30 %", "the rest")


def write_page(
    prompt: RankedPrompt, layers: list[int], tokenizer: PreTrainedTokenizerBase, file: Path
) -> None:
    """Write one HTML file that needs no other: the prompt, with a choice of rankings and layers.

    It carries one byte for each token, method and layer. Without scripts it shows the pooled
    oracle.

    Args:
        prompt: the ranked prompt; the tokens of its needle are underlined.
        layers: which layers its rankings are of.
        tokenizer: what turns its ids into text.
        file: where to write it.
    """
    shades = {
        "pooled oracle": _shades(prompt.pooled[None]),
        "raw oracle": _shades(prompt.raw[None]),
        **{name: _shades(rows) for name, rows in prompt.rankings.items()},
    }
    needle = set() if prompt.needle is None else set(prompt.needle.tolist())
    legend = [f'<i class="b{4 - i}">{text}</i>' for i, text in enumerate(_LEGEND)]
    frame = resources.files("claa_ops.evaluate.oracle").joinpath("page.html")
    text = Template(frame.read_text(encoding="utf-8")).substitute(
        title=f"{len(prompt.ids):,} tokens by rank",
        name=html.escape(prompt.name),
        verdict="" if prompt.score is None else f" (score {prompt.score:.2f} of 1)",
        answer=html.escape(prompt.answer),
        options="".join(f"<option>{html.escape(name)}</option>" for name in shades),
        last=len(layers) - 1,
        legend=" ".join(legend),
        fact="<u>holds the answer</u>" if needle else "",
        tokens=_tokens(_pieces(tokenizer, prompt.ids), shades["pooled oracle"][0], needle),
        layers=json.dumps(layers),
        rankings=json.dumps(shades).replace("<", "\\u003c"),  # no name may end the script
    )
    file.write_text(text, encoding="utf-8")


def _shades(rows: Tensor) -> list[str]:
    """For each row ``[M]`` of ``[L, M]`` a digit per token: 4 for the best, 0 for most."""
    best_first = rows.argsort(dim=-1, descending=True, stable=True)
    tokens = rows.shape[-1]
    shade = torch.zeros_like(best_first)
    for share in _SHARES:
        best = best_first[:, : max(1, round(share * tokens))]
        shade.scatter_add_(-1, best, torch.ones_like(best))
    return ["".join(map(str, row)) for row in shade.tolist()]


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    """The text that each token adds; a character of several tokens is that of its last."""
    stream = DecodeStream(ids=[], skip_special_tokens=False)
    backend = tokenizer.backend_tokenizer
    return [stream.step(backend, token) or "" for token in ids.tolist()]


def _tokens(pieces: list[str], shades: str, needle: set[int]) -> str:
    """One element per token; what comes after the ranked ones is the window."""
    elements = []
    for position, piece in enumerate(pieces):
        kind = f"b{shades[position]}" if position < len(shades) else "w"
        text = html.escape(piece)
        if position in needle:
            text = f"<u>{text}</u>"
        elements.append(f'<i class="{kind}">{text}</i>')
    return "".join(elements)
