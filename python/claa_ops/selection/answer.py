"""A model's own answer to a prompt, which some methods rank by, and whom they ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from claa_ops.ops.peak_attention import peak_attention
from claa_ops.ops.pool_heads import pool_heads
from claa_ops.selection.parallel import Reduce
from claa_ops.selection.work import Work

_ROWS = 128  # query rows reduced at a time: [B, T, N] is never in memory


@dataclass(frozen=True)
class Answer:
    """A model's own greedy answer, and the queries that made it.

    Attributes:
        tokens: ``[B, T]``, int64, as :func:`claa_ops.prefill.decode` returns them.
        queries: for each layer with full attention, ``[B, H, T, D]``, after the rotary embedding:
            the queries of the last prompt token and of all new tokens but the last.
        keys: for each such layer, ``[B, G, N, D]``: the keys of the prompt.
        scales: for each such layer, the factor on their products; None for ``D ** -0.5``.
        votes: ``[B, T]``, float32: 1 for the queries up to the end of the row's answer, else 0.
        start: ``[B]``: the first token of each row that is not padding; None without padding.
        work: the multiply-adds of the prompt and the answer.
        reduce: merges what heads on several devices paid attention to; None if all are here.
    """

    tokens: Tensor
    queries: list[Tensor]
    keys: list[Tensor]
    scales: list[float | None]
    votes: Tensor
    start: Tensor | None
    work: Work
    reduce: Reduce | None = None

    def peak(self) -> Tensor:
        """``[B, N]``, float32: the maximum over layers and heads, averaged over the queries.

        The softmax of each query is over the prompt alone.
        """
        total: Tensor | float = 0.0
        for first in range(0, self.votes.shape[1], _ROWS):
            rows = slice(first, first + _ROWS)
            running = None
            for query, key, scale in zip(self.queries, self.keys, self.scales, strict=True):
                running = peak_attention(
                    query[:, :, rows], key, scale=scale, running=running, start=self.start
                )
            assert running is not None  # a model has layers
            total = total + (self.votes[:, None, rows] @ self.over_devices(running))[:, 0]
        return total / self.votes.sum(dim=1, keepdim=True)

    def over_devices(self, maxima: Tensor) -> Tensor:
        """Of maxima over layers and the heads of this device, those over the heads of all."""
        return maxima if self.reduce is None else self.reduce(maxima, "max")


class Reader(Protocol):
    """A model that a method may ask before the prefill."""

    @property
    def vocab_size(self) -> int:
        """The size of its vocabulary."""

    def drafted_by(self, draft: Any | None) -> Reader:
        """The reader of a draft model; this reader itself if ``draft`` is None."""

    def answer(
        self, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None
    ) -> Answer:
        """Its greedy answer to a prompt ``[B, N]``, padded on the left, on any device."""

    def self_information(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Work]:
        """How little it expected each token of such a prompt, ``[B, N]``, and the work it took."""


def pool(ranking: Tensor, kernel_size: int) -> Tensor:
    """A ranking ``[B, N]``, averaged over ``kernel_size`` neighbouring tokens."""
    return pool_heads(ranking[:, None], 1, kernel_size=kernel_size)[:, 0]
