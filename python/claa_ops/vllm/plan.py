"""What the deeper layers see in one step: numbers that the host knows before the step runs.

Only which tokens are kept depends on data. How many are is known from the lengths of the prompts,
so all shapes, lengths and places in the caches can be made here, without asking the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """The requests of one step, in the order of the packed batch.

    Attributes:
        requests: their ids.
        prompts: ``[R]``, the lengths of their prompts.
        kept: ``[R]``, how many tokens of each prompt go deeper.
        computed: ``[R]``, how many tokens were computed in earlier steps.
        cached: ``[R]``, how many entries compressed caches keep of each prompt; None for all.
    """

    requests: Sequence[str]
    prompts: Integers
    kept: Integers
    computed: Integers
    cached: Integers | None = None


@dataclass(frozen=True)
class Row:
    """A request whose prompt was not over before this step.

    Attributes:
        index: its row in the batch.
        request: its id.
        begin, end: its tokens in the packed batch.
        computed: how many tokens were computed in earlier steps.
        prompt: the length of its prompt.
        kept: how many tokens of the prompt go deeper.
        cached: how many entries compressed caches keep of it.
    """

    index: int
    request: str
    begin: int
    end: int
    computed: int
    prompt: int
    kept: int
    cached: int

    @property
    def after(self) -> int:
        """How many tokens are computed after this step."""
        return self.computed + self.end - self.begin

    @property
    def ends(self) -> bool:
        """Whether the prompt ends in this step, so that its tokens are selected now."""
        return self.after >= self.prompt

    @property
    def drops(self) -> bool:
        """Whether the selection drops any token."""
        return self.kept < self.prompt

    @property
    def compresses(self) -> bool:
        """Whether caches are compressed at the prompt's end."""
        return self.cached < self.prompt


@dataclass(frozen=True, eq=False)
class Pass:
    """Tokens that go through the deeper layers at once.

    Attributes:
        rows: ``[r]``, the rows of the batch that have any.
        first: ``[r]``, the entry of each row's cache where its first token goes.
        count: ``[r]``, how many tokens each has.
    """

    rows: Integers
    first: Integers
    count: Integers

    @cached_property
    def query_start(self) -> NDArray[np.int32]:
        """``[r + 1]``: where each row's tokens begin."""
        return np.concatenate([[0], np.cumsum(self.count)]).astype(np.int32)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """``[r]``: how many entries each row's cache has afterwards."""
        return (self.first + self.count).astype(np.int32)

    @property
    def tokens(self) -> int:
        """How many tokens all rows have."""
        return int(self.query_start[-1])

    def on(self, device: torch.device, block_size: int) -> DevicePass:
        """The same numbers on a device: one copy, which the host does not wait for."""
        key = device, block_size
        if key not in self._on:
            before = np.repeat(self.first - self.query_start[:-1], self.count)
            block, offset = np.divmod(np.arange(self.tokens) + before, block_size)
            of_token = np.repeat(self.rows, self.count)
            parts = (self.query_start, self.lengths, self.rows, of_token, block, offset)
            host = np.concatenate([part.astype(np.int64) for part in parts])
            on_device = to_device(host, device).split([len(part) for part in parts])
            self._on[key] = DevicePass(*on_device)
        return self._on[key]

    @cached_property
    def _on(self) -> dict[tuple[torch.device, int], DevicePass]:
        return {}


@dataclass(frozen=True, eq=False)
class DevicePass:
    """A :class:`Pass` on a device, int64.

    Attributes:
        query_start: ``[r + 1]``.
        lengths: ``[r]``.
        rows: ``[r]``.
        of_token: ``[tokens]``, the row of the batch of each token.
        block, offset: ``[tokens]``, the block of that row's cache where the token goes, and the
            place in it.
    """

    query_start: Tensor
    lengths: Tensor
    rows: Tensor
    of_token: Tensor
    block: Tensor
    offset: Tensor

    def write_slots(self, slots: Tensor, block_table: Tensor, block_size: int) -> None:
        """Where in the pages the tokens go, and -1 behind them.

        Args:
            slots: ``[tokens or more]``, int64, the result.
            block_table: ``[rows of the batch, blocks]``, int32.
            block_size: how many entries a block has.
        """
        tokens = len(self.of_token)
        blocks = block_table[self.of_token, self.block]
        torch.add(self.offset, blocks, alpha=block_size, out=slots[:tokens])
        if tokens < len(slots):
            slots[tokens:].fill_(-1)


class Plan:
    """What the deeper layers see in one step.

    Args:
        batch: the requests.
        query_start: ``[R + 1]``: where their tokens begin in the packed batch.

    A row with ``computed`` tokens before the step, ``q`` in it, and of its prompt of ``N`` tokens
    ``k`` kept, has these in the deeper layers:

    | case | condition | tokens | first entry |
    |---|---|---|---|
    | the prompt is not over | computed + q < N | none | |
    | the prompt ends | computed < N <= computed + q | k + computed + q - N | 0 |
    | decoding | computed >= N | q | k + computed - N |

    Tokens after the prompt are in the second case where a preempted request is computed anew
    together with its answer. The window is still the last tokens of the prompt, so it keeps what it
    kept before.

    Layers before the selection see each token of the batch. Those with compressed caches have
    ``c`` entries of a prompt that is over: ``compressed`` says, ``[R]``, which rows have one.
    """

    def __init__(self, batch: Batch, query_start: Integers) -> None:
        self.batch = batch
        self.begin, self.end = query_start[:-1], query_start[1:]
        after = batch.computed + self.end - self.begin
        prefilling = batch.computed < batch.prompts
        self.deeper = after >= batch.prompts
        self._prefilling = np.flatnonzero(prefilling)
        self._first = np.where(prefilling, 0, batch.kept + batch.computed - batch.prompts)
        self._last = batch.kept + after - batch.prompts
        self.drops = bool((batch.kept < batch.prompts).any())
        changed = prefilling & ((batch.kept < batch.prompts) | (batch.computed > 0))
        self.same = bool(self.deeper.all()) and not bool(changed.any())
        self._cached = batch.prompts if batch.cached is None else batch.cached
        self.compressed = ~prefilling & (self._cached < batch.prompts)

    @cached_property
    def prefilling(self) -> list[Row]:
        """The requests whose prompts were not over before this step."""
        batch = self.batch
        return [
            Row(
                index=index,
                request=batch.requests[index],
                begin=int(self.begin[index]),
                end=int(self.end[index]),
                computed=int(batch.computed[index]),
                prompt=int(batch.prompts[index]),
                kept=int(batch.kept[index]),
                cached=int(self._cached[index]),
            )
            for index in map(int, self._prefilling)
        ]

    def parked(self, shared: bool) -> Integers:
        """Which tokens of the batch have hidden states that a later step, or request, may read.

        Args:
            shared: whether other requests read them; if not, a prompt that is whole in this step
                has none.
        """
        rows = [row for row in self.prefilling if shared or row.computed or not row.ends]
        ends = [row.begin + min(row.after, row.prompt) - row.computed for row in rows]
        parts = [np.arange(row.begin, end) for row, end in zip(rows, ends, strict=True)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    @cached_property
    def whole(self) -> Pass:
        """All tokens that go deeper."""
        rows = np.flatnonzero(self.deeper)
        return Pass(rows, self._first[rows], (self._last - self._first)[rows])

    @cached_property
    def compressing(self) -> Pass:
        """All tokens of the batch, in layers whose caches are compressed when a prompt is over."""
        first = self.batch.computed - np.where(
            self.compressed, self.batch.prompts - self._cached, 0
        )
        return Pass(np.arange(len(first)), first, self.end - self.begin)

    def passes(self, most: int) -> list[Pass]:
        """The same in passes of at most this many tokens each."""
        whole = self.whole
        if whole.tokens <= most:
            return [whole] if whole.tokens else []
        start, passes = whole.query_start.astype(np.int64), []
        for cut in range(0, whole.tokens, most):
            low = np.maximum(start[:-1], cut)
            high = np.minimum(start[1:], cut + most)
            some = np.flatnonzero(low < high)
            first = whole.first + low - start[:-1]
            passes.append(Pass(whole.rows[some], first[some], (high - low)[some]))
        return passes

    def runs(self) -> Iterator[tuple[int, int, Row | None]]:
        """The tokens that go deeper as runs: their begin and end among these, and from where.

        A run is either what is selected of one prompt, whose row is given, or the unchanged tokens
        of neighbouring rows, of which :meth:`source` says where they are in the packed batch.
        """
        whole, begin = self.whole, 0
        for row in self.prefilling:
            if not row.ends or not (row.drops or row.computed):
                continue
            place = int(np.searchsorted(whole.rows, row.index))
            first, last = int(whole.query_start[place]), int(whole.query_start[place + 1])
            if begin < first:
                yield begin, first, None
            yield first, last, row
            begin = last
        if begin < whole.tokens:
            yield begin, whole.tokens, None

    def source(self, begin: int, end: int) -> NDArray[np.int64]:
        """Where the tokens of an unchanged run are in the packed batch."""
        whole = self.whole
        shift = np.repeat(self.begin[whole.rows] - whole.query_start[:-1], whole.count)
        return np.arange(begin, end) + shift[begin:end]

    def last_tokens(self) -> tuple[Integers, Integers]:
        """Of each deeper row the last token, which is sampled from: among these, in the batch."""
        whole = self.whole
        return whole.query_start[1:].astype(np.int64) - 1, self.end[whole.rows] - 1


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy on the device, which the host does not wait for."""
    host = torch.from_numpy(array)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
