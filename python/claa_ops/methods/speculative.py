from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from claa_ops.methods.drafted import Drafted
from claa_ops.ops.aggregate_scores import aggregate_scores
from claa_ops.ops.peak_attention import peak_attention
from claa_ops.ops.pool_heads import pool_heads
from claa_ops.ops.select_topk import select_topk
from claa_ops.selection.answer import Answer, Reader
from claa_ops.selection.budget import Size, is_count, smaller
from claa_ops.selection.method import Preparation
from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class SpeculativePrefill(Drafted):
    """A small model reads the prompt first and says which parts the large one must read.

    The draft prefills the prompt and looks a few tokens ahead. Its attention to the prompt is
    pooled for each layer, head and query; the maximum over layers and heads and the mean over
    the queries rank the tokens. The best chunks go to the model, as token ids in their original
    positions; decoding continues after the whole prompt.

    Args:
        keep: what the model reads: a rate of the chunks in (0, 1], rounded up, or a number of
            tokens. No token is sure to be kept.
        draft: any decoder with the tokenizer of the model; None for the model itself.
        look_ahead: forwards of the draft, the one over the prompt included.
        shared_tokenizer: the draft is known to have the model's tokenizer, although its vocabulary
            is of another size, as when both are padded.
        chunk: neighbouring tokens that are kept or dropped together; None for single tokens.
        kernel_size: see :class:`Method`; pooling averages, and ``window`` is unused.

    Raises:
        ValueError: a setting is out of its range; or, in a prefill, the vocabularies of draft
            and model differ in size, or several prompts are to be kept in chunks: the last chunk
            of each may be shorter.

    Source: Speculative Prefill (arXiv 2502.02789) and its public code
    (Jingyu6/speculative_prefill, c1d6bd3). CLAA's comparison runs ``chunk=None, kernel_size=7``.
    Departures: the softmax stays in float32; an answer ends at the draft's own end tokens.

    Example:
        >>> method = SpeculativePrefill(keep=0.3, look_ahead=4)
    """

    look_ahead: int = 8
    chunk: int | None = 32
    kernel_size: int = field(default=13, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_count(self.look_ahead, 1), "look_ahead", "a positive integer")
        chunked = self.chunk is None or is_count(self.chunk, 1)
        self.require(chunked, "chunk", "a positive integer or None")
        self.require(self.pool_mode == "avg", "pool_mode", "'avg'")

    @property
    def keeps_positions(self) -> bool:
        """True: the model reads the kept tokens where they stood."""
        return True

    def prepare(
        self, reader: Reader, input_ids: Tensor, attention_mask: Tensor | None
    ) -> Preparation:
        """Rank the prompt with the draft."""
        answer = self.ask(reader).answer(input_ids, self.look_ahead, attention_mask)
        return Preparation(self.rank_prompt(answer).to(input_ids.device), answer.work)

    @property
    def serves_batches(self) -> bool:
        """Only without chunks, of which the last may be shorter."""
        return self.chunk is None

    def choose(self, state: PrefillState) -> Tensor | None:
        """The best chunks, or tokens, ``[B, k]``."""
        ranking = state.ranking
        assert ranking is not None  # begin refuses a prefill that lacks one
        if self.chunk is None:
            if self._units(state.length, 1) >= state.length:
                return None
            return self.keep_best(state, ranking, lambda sizes: self._units(sizes.prompt, 1))
        if ranking.shape[0] > 1:
            raise ValueError(
                "SpeculativePrefill: a batch must be one prompt unless chunk is None, "
                f"got {ranking.shape[0]} prompts"
            )
        first = 0 if state.start is None else int(state.start)
        chunks = ranking[:, first:].split(self.chunk, dim=1)  # the last may be short
        kept = self._units(len(chunks), self.chunk)
        if kept >= len(chunks):
            return None
        means = torch.cat([chunk.mean(dim=1, keepdim=True) for chunk in chunks], dim=1)
        best = select_topk(means, kept)[0]
        tokens = torch.arange(ranking.shape[1] - first, device=ranking.device)
        among = torch.isin(tokens // self.chunk, best)
        if state.protected is not None:
            among = among | state.protected[0, first:]
        return (first + tokens[among])[None]

    def _units(self, units: Size, size: int) -> Size:
        """How many of the units, of ``size`` tokens each, the budget covers; at least one."""
        if self._keep.per:
            return -(-units * self._keep.count // self._keep.per)
        return smaller(units, units * 0 + -(-self._keep.count // size))

    def rank_prompt(self, answer: Answer) -> Tensor:
        """``[B, N]``: pooled attention, the maximum over layers and heads, then the mean."""
        batch, queries = answer.votes.shape
        running = answer.votes.new_zeros(batch * queries, answer.keys[0].shape[2])
        start = answer.start
        for query, key, scale in zip(answer.queries, answer.keys, answer.scales, strict=True):
            heads, groups = query.shape[1], key.shape[1]
            # A batch row for each key/value head: the peak over a single head is its attention.
            attention = peak_attention(
                query.reshape(batch * groups, 1, -1, query.shape[3]),
                key.reshape(batch * groups, 1, *key.shape[2:]),
                scale=scale,
                start=None if start is None else start.repeat_interleave(groups),
            )
            attention = attention.view(batch, heads, queries, -1).transpose(1, 2)
            pooled = pool_heads(attention.flatten(0, 1), heads, kernel_size=self.kernel_size)
            running = aggregate_scores(running, pooled)
        peak = answer.over_devices(running).view(batch, queries, -1)
        return (answer.votes[:, None] @ peak)[:, 0] / answer.votes.sum(dim=1, keepdim=True)
