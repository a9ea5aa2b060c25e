"""The ops whose keys lie in pages, and what each of them does for one prompt alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import claa_ops
from claa_ops import reference
from support.inputs import assert_same_bits, normal
from support.pages import as_dense


@dataclass(frozen=True)
class PagedOp:
    """An op, and how it differs from the other one.

    Attributes:
        call: the op.
        eager: its reference.
        columns: of ``running``, that a prompt of so many tokens updates with so many queries.
        by_query: whether ``running`` has a row for each query.
        dense: updates ``running`` of one prompt by the op without pages.
    """

    call: Callable[..., None]
    eager: Callable[..., None]
    columns: Callable[[int, int], int]
    by_query: bool
    dense: Callable[..., None]

    def zeros(self, prompts: int, queries: int, longest: int, *, device: str) -> Tensor:
        """``running`` at first, with room for prompts of up to ``longest`` tokens."""
        inner = (queries,) if self.by_query else ()
        columns = max(1, self.columns(longest, queries))
        return torch.zeros(prompts, *inner, columns, device=device)

    def running_for(
        self, lengths: list[int], queries: int, *, device: str, more: int = 0
    ) -> Tensor:
        """Some entries above all results, some among them, some below; room for `more` tokens."""
        shape = self.zeros(len(lengths), queries, max(lengths) + more, device=device).shape
        return normal(*shape, device=device, seed=9) / 50

    def assert_is_each_prompt_alone(
        self, running: Tensor, query: Tensor, keys: list[Tensor], paged: tuple, **options
    ) -> None:
        """In the columns of each prompt what the op without pages gives; others are untouched.

        To the bit, unless ``exact`` says otherwise.
        """
        exact = options.pop("exact", True)
        expected = running.clone()
        for row, (key, row_query) in enumerate(zip(keys, query, strict=True)):
            columns = self.columns(len(key), query.shape[1])
            if columns > 0:
                mine = expected[row : row + 1, ..., :columns]
                self.dense(mine, row_query.transpose(0, 1)[None], as_dense(key), **options)
        assert self.call(running, query, *paged, **options) is None
        if exact:
            assert_same_bits(running, expected)
        else:
            torch.testing.assert_close(running, expected, rtol=1e-5, atol=1e-6)


def _peaks(running: Tensor, query: Tensor, key: Tensor, **options) -> None:
    found = claa_ops.peak_attention(query, key, running=running.contiguous(), **options)
    running.copy_(found)


SCORES = PagedOp(
    call=claa_ops.score_layer_paged,
    eager=reference.score_layer_paged,
    columns=lambda tokens, queries: tokens - queries,
    by_query=False,
    dense=claa_ops.score_layer,
)
PEAKS = PagedOp(
    call=claa_ops.peak_attention_paged,
    eager=reference.peak_attention_paged,
    columns=lambda tokens, queries: tokens,
    by_query=True,
    dense=_peaks,
)
PAGED_OPS = [
    pytest.param(SCORES, id="score_layer_paged"),
    pytest.param(PEAKS, id="peak_attention_paged"),
]
