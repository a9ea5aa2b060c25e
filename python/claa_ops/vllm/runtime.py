"""Worker side: what one model knows about the requests that it is prefilling."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from claa_ops.selection import Layer, PrefillState, begin
from claa_ops.selection.parallel import Reduce
from claa_ops.vllm.hidden import ParkedHidden
from claa_ops.vllm.plan import Batch, Integers, Pass, Plan, Row, to_device
from claa_ops.vllm.requests import Spans, kept_of, protected_of
from claa_ops.vllm.settings import Settings
from claa_ops.vllm.timing import Clock


class Pages(Protocol):
    """Keys (0) or values (1) of a layer in vLLM's cache."""

    def read(self, which: int, row: Row) -> Tensor:
        """``[N, G, D]``: of a request whose prompt came in chunks."""

    def write(self, which: int, row: Row, entries: Tensor) -> None:
        """Put ``entries``, ``[k, G, D]``, which are kept of a prompt, behind its blocks."""


@dataclass(frozen=True)
class Group:
    """Layers that share a block table, in one step.

    Attributes:
        layer_names: the layers.
        now: their attention metadata and slots, if they see the batch as it is.
        later: makes them for a pass, padded to a number of tokens, if they do not.
    """

    layer_names: list[str]
    now: tuple[Any, Tensor] | None = None
    later: Callable[[Pass, int], tuple[Any, Tensor]] | None = None

    def metadata(self, some: Pass | None, size: int) -> tuple[Any, Tensor]:
        """Attention metadata and slots of a pass; of the batch as it is if that is None."""
        if some is None:
            assert self.now is not None  # made with the same plan
            return self.now
        assert self.later is not None
        return self.later(some, size)


@dataclass
class Prompt:
    """A prompt whose prefill is not over: what the selection will need of the chunks so far.

    Attributes:
        state: of its prefill.
        queries: for each observed layer the queries of the window, ``[tokens, H, D]``.
    """

    state: PrefillState
    queries: dict[int, list[Tensor]] = field(default_factory=dict)


class Runtime:
    """The settings, the plan of this step, and the prompts under way.

    Args:
        settings: the method and where it cuts the model.
        parked: the hidden states behind the selection layer.
        caches: whether prompts that begin alike share what is cached.
        reduce: merges scores of heads on several devices; None if all heads are here.
        timed: is told how many seconds of a step its selections took.

    Attributes:
        clock: measures them.
        groups: the deeper layers' groups in this step.
        fronts: those of the layers before the selection whose caches are compressed.
        block_tables: of the layers before the selection, by name, ``[rows, blocks]``.
        own_blocks: of those with compressed caches, ``[rows]``: where in the block table the blocks
            behind the prompt's begin.
        known: the requests that the engine still has; others are forgotten.
        kept: how many tokens of each request's prompt go deeper.
        spans: of requests that protect any, which tokens are never dropped.
        log: for tests: the positions kept of each request; None to keep no log.
    """

    def __init__(
        self,
        settings: Settings,
        parked: ParkedHidden,
        *,
        caches: bool = False,
        reduce: Reduce | None = None,
        timed: Callable[[float], None],
    ) -> None:
        self.settings = settings
        self.parked = parked
        self.caches = caches
        self.reduce = reduce
        self.clock = Clock(timed)
        self.groups: list[Group] = []
        self.fronts: list[Group] = []
        self.block_tables: dict[str, Tensor] = {}
        self.own_blocks: dict[str, Integers | None] = {}
        self.known: Collection[str] | None = None
        self.log: dict[str, Tensor] | None = None
        self.prompts: dict[str, Prompt] = {}
        self.kept: dict[str, int] = {}
        self.spans: dict[str, Spans] = {}
        self._batch: Batch | None = None
        self._plan: Plan | None = None

    # Before the forward, once a step.

    def start_step(self, batch: Batch | None) -> None:
        """A runner is about to build the metadata of a step.

        Args:
            batch: its requests; None for a dummy batch, of profiling or of a graph's capture.
        """
        self._batch, self._plan = batch, None
        self.clock.start_step()
        for made in (self.groups, self.fronts, self.block_tables, self.own_blocks):
            made.clear()

    def plan_of(self, common: Any) -> Plan | None:
        """The plan of this step, from what the runner built for it; None for a dummy batch."""
        if self._plan is None and self._batch is not None:
            rows = len(self._batch.requests)
            starts = common.query_start_loc_cpu[: rows + 1].numpy().astype(np.int64)
            self._plan = Plan(self._batch, starts)
            self._forget()
        return self._plan

    @property
    def plan(self) -> Plan | None:
        """The plan of this step; None for a dummy batch."""
        return self._plan

    @property
    def observes(self) -> bool:
        """Whether this step has tokens of a prompt that is not over."""
        return self._plan is not None and bool(self._plan.prefilling)

    def forget(self, request: str) -> None:
        """Drop what is held of a request: it is over, aborted or preempted."""
        for held in (self.prompts, self.kept, self.spans):
            held.pop(request, None)

    def kept_of(self, request: str, prompt: int, params: Any) -> int:
        """How many tokens of a prompt go deeper, which its request may have asked for.

        Args:
            request: its id.
            prompt: the length of the prompt.
            params: the request's sampling parameters.
        """
        if request not in self.kept:
            kept = kept_of(params)
            self.kept[request] = self.settings.kept(prompt) if kept is None else kept
            if spans := protected_of(params):
                self.spans[request] = spans
        return self.kept[request]

    def _forget(self) -> None:
        """Drop prompts that start anew, and those of requests that have gone."""
        assert self._plan is not None  # the caller has made it
        for row in self._plan.prefilling:
            # Before the window nothing is held, unless by a request that was preempted in it.
            if row.computed <= max(0, row.prompt - self.settings.method.window):
                self.prompts.pop(row.request, None)
        if self.known is not None and len(self.kept) > len(self.known):
            for request in [each for each in self.kept if each not in self.known]:
                self.forget(request)

    # In a layer that informs the ranking, after its attention.

    def observe(
        self,
        layer: int,
        query: Tensor,
        key_value: tuple[Tensor, Tensor],
        pages: Pages,
        scale: float,
    ) -> None:
        """Show the method what a layer saw of each prompt that ends, and hold what it will need.

        If the layer's cache is compressed, write what it keeps.

        Args:
            layer: the layer.
            query: ``[tokens, H, D]``, after the rotary embedding.
            key_value: ``[tokens, G, D]`` each, likewise.
            pages: the layer's, from which prompts that came in chunks are read.
            scale: of the attention.
        """
        assert self._plan is not None  # the caller has asked
        for row in self._plan.prefilling:
            first = max(row.prompt - self.settings.method.window, row.computed, 0)
            last = min(row.prompt, row.after)
            if not row.drops or first >= last:  # no query of the window is in this chunk
                continue
            prompt = self._prompt(row)
            shift = row.begin - row.computed
            tail = query[first + shift : last + shift]
            held = prompt.queries.setdefault(layer, [])
            held.append(tail if row.ends else tail.clone())
            if not row.ends:
                continue
            with self.clock.measure(query.device):
                tail = torch.cat(prompt.queries.pop(layer))
                state = prompt.state
                seen = EngineLayer(state, layer, tail, row, key_value, pages, scale)
                state.see(seen)
                if row.compresses and layer in self.settings.compressed:
                    self._compress(seen, row, pages)

    def _compress(self, seen: EngineLayer, row: Row, pages: Pages) -> None:
        """Write what a layer's cache keeps of a prompt that ends, out of blocks that are shared."""
        assert row.after == row.prompt  # the scheduler ends the step there: see scheduler.py
        seen.protect(self.spans.get(row.request, ()))
        kept = seen.state.compress(seen.index, seen.key, seen.value)
        assert kept[0].shape[2] == row.cached  # as planned
        for which, entries in enumerate(kept):
            pages.write(which, row, entries[0].transpose(0, 1))

    # Between the layers.

    def select(self, row: Row) -> Tensor:
        """``[kept]``, int64, ascending: the tokens of a prompt that go deeper."""
        if not row.drops:
            device = next(iter(self.block_tables.values())).device
            return torch.arange(row.prompt, device=device)
        state = self.prompts.pop(row.request).state
        if spans := self.spans.get(row.request):
            assert state.importance is not None  # the layer was observed
            past = state.importance.shape[1]  # the window behind it is kept anyway
            tokens = [np.arange(first, min(last, past)) for first, last in spans]
            index = to_device(np.concatenate(tokens), state.importance.device)
            state.importance.index_fill_(1, index, torch.inf)
        kept = state.select(self.settings.layer)
        assert kept is not None and kept.shape[1] == row.kept  # as planned
        if self.log is not None:
            self.log[row.request] = kept[0].cpu()
        return kept[0]

    def park(self, hidden: Tensor, residual: Tensor) -> None:
        """Hold the states behind the selection layer of the prompts of this step.

        Args:
            hidden: ``[tokens, C]``, of the batch.
            residual: likewise. The next layer adds the two up, in their dtype: so does this.
        """
        assert self._plan is not None  # the caller has asked
        tokens = self._plan.parked(self.caches)
        if len(tokens):
            index = to_device(tokens, hidden.device)
            self.parked.write(hidden[index] + residual[index], index)

    def take_parked(self, row: Row, tokens: Tensor) -> Tensor:
        """The states of some ``tokens``, ``[n]``, of a prompt: ``[n, C]``."""
        return self.parked.read(row.index, tokens)

    def _prompt(self, row: Row) -> Prompt:
        prompt = self.prompts.get(row.request)
        if prompt is None:
            settings, method = self.settings, self.settings.method
            if row.kept != settings.kept(row.prompt):
                method = replace(method, keep=row.kept, keep_kv=row.cached)
            state = begin(
                method,
                num_layers=settings.num_layers,
                prompt_length=row.prompt,
                reduce=self.reduce,
            )
            prompt = self.prompts[row.request] = Prompt(state)
        return prompt


class EngineLayer(Layer):
    """What a layer saw of one prompt; its values are read only if the method asks for them."""

    def __init__(
        self,
        state: PrefillState,
        index: int,
        query: Tensor,
        row: Row,
        key_value: tuple[Tensor, Tensor],
        pages: Pages,
        scale: float,
    ) -> None:
        def read(which: int) -> Tensor:
            if row.computed:
                found = pages.read(which, row)
            else:
                found = key_value[which][row.begin : row.begin + row.prompt]
            return found.transpose(0, 1)[None]

        super().__init__(state, index, query.transpose(0, 1)[None], read(0), scale=scale)
        self._read = read

    def protect(self, spans: Spans) -> None:
        """Have the layer's cache keep the tokens of these spans, whatever their scores."""
        if spans:
            self._scores = self.scores.clone()
        for first, last in spans:
            self.scores[..., first:last] = torch.inf

    @property
    def value(self) -> Tensor:
        """``[1, G, N, D]``."""
        return self._read(1)
