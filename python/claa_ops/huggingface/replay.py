"""One full prefill that many prefills of the same prompts start from."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from claa_ops.huggingface.answer import ModelReader
from claa_ops.huggingface.cache import ClaaCache, StateLayer
from claa_ops.huggingface.chat_parts import Protect
from claa_ops.huggingface.decoding import count_positions
from claa_ops.huggingface.prefill import Prefilled, prefill
from claa_ops.huggingface.transformers_api import cache_argument, cache_of, decoder_of
from claa_ops.huggingface.work import LayerCost, layer_costs
from claa_ops.methods import FullKV, Method
from claa_ops.methods.pruning import Pruning
from claa_ops.selection.method import Preparation
from claa_ops.selection.state import PrefillState, begin
from claa_ops.selection.work import Work

_ROWS = 64  # of the queries, the last: a method that reads more is computed as a whole

# Settings that a ranking made before the prefill does not depend on.
_AFTER_A_RANKING = {"window", "chunk", *(setting.name for setting in fields(Pruning))} - {
    "kernel_size",
    "pool_mode",
}


class Seen(NamedTuple):
    """Tokens of a padded batch: how many, and of each row, ``[B]``, how many are padding.

    ``layer`` is the one that saw them, and ``joins`` says whether it had seen others before. What
    it selected within itself, and to which share of its keys it attended, is in its ``cache``.
    """

    tokens: int
    start: Tensor | None
    layer: int = 0
    joins: bool = False
    cache: ClaaCache | None = None

    def of_rows(self, batch: int) -> list[int]:
        """How many of them are each row's own."""
        padding = [0] * batch if self.start is None else self.start.tolist()
        return [self.tokens - each for each in padding]


@dataclass
class Replayed(Prefilled):
    """A prefill of a batch, and what each of its prompts would have cost alone.

    Attributes:
        seen: what the layers of each forward saw, as they ran; there are two in a method with two
            passes, and some layers run twice in one that goes back.
        full: the tokens of each prompt.
        costs: of each layer.
        seconds: of the prefill of the batch. All but the layers that were replayed is measured
            here; those count as the full prefill took for them.
        full_seconds: of the full prefill of the same batch.
    """

    seen: list[list[Seen]]
    full: list[int]
    costs: list[LayerCost]
    seconds: float
    full_seconds: float

    def work_shares(self) -> list[float]:
        """For each prompt ``work_share``, were it alone.

        That of a single one has the drafts and answers that made a ranking; the others lack them.
        """
        return [own.linear / full.linear for own, full in self._work_beside_full()]

    def operation_shares(self) -> list[float]:
        """The same of the multiply-adds in attention as well."""
        return [
            (own.linear + own.attention) / (full.linear + full.attention)
            for own, full in self._work_beside_full()
        ]

    def _work_beside_full(self) -> list[tuple[Work, Work]]:
        lengths = [self.state.prompt_length] if len(self.full) == 1 else self.full
        full = [sum((cost.work(tokens) for cost in self.costs), Work()) for tokens in lengths]
        return list(zip(self._work_of_rows(), full, strict=True))

    def _work_of_rows(self) -> list[Work]:
        batch = len(self.full)
        if batch == 1:
            return [self.work]
        work = [Work()] * batch
        for seen, lengths in itertools.chain.from_iterable(map(self._lengths, self.seen)):
            cost, layer = self.costs[seen.layer], seen.layer
            assert seen.cache is not None  # a layer ran with it
            within, share = seen.cache.within, seen.cache.sparse.get(layer)
            for row, tokens in enumerate(lengths):
                if layer not in within:
                    work[row] += cost.work(tokens, share)
                    continue
                index = within[layer]
                if index is not None:
                    index = index[row] - (seen.tokens - tokens)
                    index = index[None, index >= 0]
                work[row] += cost.work_within(tokens, index, share)
        return work

    def _lengths(self, forward: list[Seen]) -> list[tuple[Seen, list[int]]]:
        """Of each layer of a forward, how many tokens each row has; those that join count there."""
        found: list[tuple[Seen, list[int]]] = []
        latest: dict[int, list[int]] = {}
        padding: dict[int, list[int]] = {}  # read from the device once
        for seen in forward:
            start = id(seen.start)
            if start not in padding:
                padding[start] = [seen.tokens - own for own in seen.of_rows(len(self.full))]
            lengths = [seen.tokens - each for each in padding[start]]
            if seen.joins:
                for row, tokens in enumerate(lengths):
                    latest[seen.layer][row] += tokens
            else:
                latest[seen.layer] = lengths
                found.append((seen, lengths))
        return found

    def cache_bytes(self) -> list[int]:
        """For each prompt the bytes that its cache holds before any decoding, were it alone."""
        batch = len(self.full)
        if batch == 1:
            return [self.cache.nbytes()]
        parked = [] if self.cache.parked is None else self.cache.parked.tensors()
        of_a_token = sum(x.shape[-1] * x.element_size() for x in parked)
        total = [tokens * of_a_token for tokens in self.full]
        last = {seen.layer: seen for seen in self.seen[-1]}  # of a layer that ran twice
        for index, layer in enumerate(self.cache.layers):
            if isinstance(layer, StateLayer):
                states = sum(state.nbytes for state in StateLayer.tensors(layer)) // batch
                total = [before + states for before in total]
            if layer.keys is None:
                continue
            of_an_entry = sum(
                held.shape[1] * held.shape[3] * held.element_size()
                for held in (layer.keys, layer.values)
            )
            held = Seen(layer.keys.shape[2], None if layer.is_sliding else layer.start)
            entries = held.of_rows(batch)
            if layer.is_sliding:  # that of a short prompt is not full
                entries = list(map(min, entries, last[index].of_rows(batch)))
            total = [before + own * of_an_entry for before, own in zip(total, entries, strict=True)]
        return total

    def reached(self) -> list[Tensor]:
        """For each prompt ``[N]``, bool: which of its tokens reached the last layer."""
        if self.positions is None:
            return [torch.ones(tokens, dtype=torch.bool) for tokens in self.full]
        padded = self.state.prompt_length
        reached = []
        for positions, tokens in zip(self.positions.cpu(), self.full, strict=True):
            row = torch.zeros(padded, dtype=torch.bool)
            row[positions[positions >= 0]] = True
            reached.append(row[padded - tokens :])
        return reached


class RecordedPrefill:
    """A full prefill, recorded, so that methods need not compute it again.

    Up to its first selection a method sees what full prefill sees: the same hidden states, queries
    and keys. Those layers are replayed from the record, scored and compressed by the method as
    always, and only the layers after the selection are computed. What comes out is what
    :func:`claa_ops.prefill.prefill` computes, to the bit.

    Args:
        model: an attached model (:func:`claa_ops.prefill.attach`).
        input_ids: ``[B, N]``, int64.
        attention_mask: ``[B, N]``; left padding is 0.
        layers: after which of them methods will select; None for any. Hidden states, ``B * N *
            hidden_size`` numbers a layer, are recorded for these alone.

    A method that reads hidden states (``reads_hidden``) is replayed if those of all layers are
    recorded, and computed as a whole otherwise.

    Attributes:
        logits: ``[B, V]``, of the last prompt token in the full prefill.
        seconds: of the full prefill; of a row of a batch, its share of them.

    Example::

        recorded = RecordedPrefill(attach(model), ids)
        for layer in range(4, 29):
            prefilled = recorded.run(CLAA(keep=0.1, layer=layer))
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        layers: Collection[int] | None = None,
    ) -> None:
        self.model = model
        self.input_ids = input_ids.to(model.device)
        self.attention_mask = None if attention_mask is None else attention_mask.to(model.device)
        self._outputs: dict[int, Any] = {}
        self._unseen = 0  # tokens of padding that were not in the recorded forward
        self._prepared: dict[tuple[Any, ...], tuple[Preparation, float]] = {}
        blocks = decoder_of(model).layers
        clock = _Clock(model.device)
        handles = [blocks[0].register_forward_pre_hook(self._keep_embedded, with_kwargs=True)]
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(clock.tick))
            if layers is None or index in layers or index == len(blocks) - 1:
                handles.append(block.register_forward_hook(self._keep_output(index)))
        handles.append(blocks[-1].register_forward_hook(clock.tick))
        recorder = _Recorder(model.config, FullKV())
        try:
            with torch.no_grad(), clock:
                output = model(
                    self.input_ids,
                    attention_mask=self.attention_mask,
                    position_ids=count_positions(self.input_ids, self.attention_mask),
                    use_cache=True,
                    logits_to_keep=1,
                    **cache_argument(model, recorder),
                )
        finally:
            for handle in handles:
                handle.remove()
        assert isinstance(recorder.state, _RecordingState)  # the forward made it
        self._start, self._reduce = recorder.state.start, recorder.reduce
        self._attending, self._depth = recorder.attending, len(blocks)
        self._calls = dict(zip(recorder.attending, recorder.state.calls, strict=True))
        self._states = {
            index: layer
            for index, layer in enumerate(recorder.layers)
            if isinstance(layer, StateLayer)
        }
        self.logits: Tensor = output.logits[:, -1]
        self.seconds, self._layer_seconds = clock.seconds, clock.between_ticks()

    def run(self, method: Method, protect: Protect | None = None) -> Replayed:
        """:func:`claa_ops.prefill.prefill` on these prompts.

        Raises:
            ValueError: the method selects after a layer that was not among ``layers``, or does
                not fit the model or this batch.
        """
        prepared, seconds = self._prepare(method)
        with self._replaying() as replay, _Clock(self.model.device) as clock:
            prefilled = prefill(
                self.model,
                self.input_ids,
                method,
                self.attention_mask,
                protect=protect,
                prepared=prepared,
            )
        seconds += clock.seconds + replay.saved
        return Replayed(
            **vars(prefilled),
            seen=replay.seen,
            full=self._whole.of_rows(len(self.input_ids)),
            costs=self._costs,
            # Handing out what full prefill computed is no part of it.
            seconds=self.seconds if isinstance(method, FullKV) else seconds,
            full_seconds=self.seconds,
        )

    def row(self, index: int) -> RecordedPrefill:
        """The record of one prompt of the batch, as if it had been prefilled alone."""
        tokens = self._whole.of_rows(len(self.input_ids))[index]
        row = slice(index, index + 1)
        alone = copy.copy(self)
        alone.input_ids = self.input_ids[row, -tokens:]
        alone.attention_mask = alone._start = None
        alone.logits = self.logits[row]
        alone._prepared = {}
        batch = len(self.input_ids)
        alone.seconds = self.seconds / batch
        alone._layer_seconds = [seconds / batch for seconds in self._layer_seconds]
        alone._outputs = {
            layer: _each(output, lambda x: x[row, -tokens:])
            for layer, output in self._outputs.items()
        }
        # Of the angles there may be one row for all prompts.
        alone._given = [x[row if len(x) > 1 else slice(1), -tokens:] for x in self._given]
        alone._calls = {layer: call.row(row, tokens) for layer, call in self._calls.items()}
        alone._states = copy.deepcopy(self._states)
        for layer in alone._states.values():
            StateLayer.batch_select_indices(layer, torch.tensor([index]))
        return alone

    def padded(self) -> RecordedPrefill:
        """The record of the same prompts, of one length, with a token of padding before each.

        That is for a method that keeps more of one prompt than of another, which needs a mask
        after its selection. The layers before it never see the padding.
        """
        batch, tokens = self.input_ids.shape
        wider = copy.copy(self)
        wider.input_ids = pad(self.input_ids, (1, 0))
        wider.attention_mask = pad(torch.ones_like(self.input_ids), (1, 0))
        wider._start = self.input_ids.new_ones(batch)
        wider._prepared = {}
        wider._outputs = {
            layer: _each(output, lambda x: pad(x, (0, 0, 1, 0)))
            for layer, output in self._outputs.items()
        }
        wider._given = [pad(x, (0, 0, 1, 0)) for x in self._given]
        wider._unseen = 1
        wider._calls = {layer: call.padded(tokens) for layer, call in self._calls.items()}
        return wider

    @property
    def _whole(self) -> Seen:
        """What full prefill sees in every layer."""
        return Seen(self.input_ids.shape[1], self._start)

    @functools.cached_property
    def _costs(self) -> list[LayerCost]:
        return layer_costs(self.model)

    def _prepare(self, method: Method) -> tuple[Preparation | None, float]:
        """The answer of an oracle or a draft, once for all layers and budgets; its seconds."""
        if not method.needs_ranking:
            return None, 0.0
        settings = {
            setting.name: getattr(method, setting.name)
            for setting in fields(method)
            if setting.init and setting.name not in _AFTER_A_RANKING
        }
        key = type(method), *settings.values()
        if key not in self._prepared:
            with _Clock(self.model.device) as clock:
                prepared = method.prepare(
                    ModelReader(self.model), self.input_ids, self.attention_mask
                )
            assert prepared is not None  # it is what the method needs
            self._prepared[key] = prepared, clock.seconds
        return self._prepared[key]

    def state(self, method: Method, layer: int, ranking: Tensor | None = None) -> PrefillState:
        """The state of a prefill that has observed layers 0 to ``layer``.

        A method that selects after one layer is asked to do so after this one: then
        ``state.importance`` ``[B, M]`` is its ranking here.

        Args:
            method: the method.
            layer: the last layer observed.
            ranking: ``[B, N]``, float32, for methods that need one (:meth:`Method.prepare`).

        Raises:
            ValueError: there is no such layer, or the method reads more queries than the last
                64, which are recorded.
        """
        at_depth = method.at_depth(self._depth)
        if isinstance(getattr(at_depth, "layer", None), int):
            method = replace(at_depth, layer=layer)  # type: ignore[call-arg]
        method, _ = method.among(self._attending, self._depth)
        state = begin(
            method,
            num_layers=len(self._attending),
            prompt_length=self.input_ids.shape[1],
            start=self._start,
            ranking=ranking,
            first_pass=method.two_pass,
            reduce=self._reduce,
        )
        for count, index in enumerate(self._attending):
            if index <= layer:
                call = self._calls[index]
                state.observe(count, call.query, call.key, **self._shown(index, method))
        return state

    def _shown(self, layer: int, method: Method) -> dict[str, Any]:
        """What a method sees of a layer, beside its queries and keys."""
        rest = self._calls[layer].rest
        if not method.reads_hidden:
            return rest
        given = self._outputs[layer - 1] if layer else self._given[0]
        return {**rest, "hidden": given[0] if isinstance(given, tuple) else given}

    @contextlib.contextmanager
    def replay(self) -> Iterator[list[list[Seen]]]:
        """Within, prefills of these prompts by the model replay what was recorded.

        That is any forward of the whole prompts, at the positions that their mask counts, with a
        ClaaCache; all others, such as those of decoding or the second pass of a two-pass method,
        are computed.

        Yields:
            What the layers of each prefill see, filled as they run: see :class:`Replayed`.
        """
        with self._replaying() as replay:
            yield replay.seen

    @contextlib.contextmanager
    def _replaying(self) -> Iterator[_Replay]:
        replay = _Replay(self)
        blocks = decoder_of(self.model).layers
        try:
            for index, block in enumerate(blocks):
                block.forward = _Layer(replay, block, index)
            yield replay
        finally:
            for block in blocks:
                vars(block).pop("forward", None)  # so that the class's is seen again

    def _keep_embedded(self, block: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        bound = inspect.signature(block.forward).bind(*args, **kwargs)
        self._given = _given(bound.arguments)

    def _keep_output(self, layer: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._outputs[layer] = output

        return hook

    def begins(self, arguments: dict[str, Any], cache: ClaaCache) -> bool:
        """Whether a prefill whose first layer gets these arguments is that of the record."""
        assert cache.state is not None  # a prefill has one
        given = _given(arguments)
        same = all(x.shape == y.shape for x, y in zip(given, self._given, strict=True))
        first = self._unseen
        return (
            same
            and cache.method.rows(cache.state) <= _ROWS
            and not cache.method.alters_layers
            and (not cache.method.reads_hidden or len(self._outputs) == self._depth)
            and all(
                torch.equal(x[:, first:], y[:, first:])
                for x, y in zip(given, self._given, strict=True)
            )
        )

    def hand_out(self, layer: int, cache: ClaaCache) -> Any:
        """The output of a layer, whose keys, values and scores the cache gets."""
        if layer in self._states:
            cache.layers[layer].take(self._states[layer])
        if layer in self._calls:
            call = self._calls[layer]
            cache.update(call.key, call.rest["value"], layer)
            cache.observe(layer, call.query, call.key, **self._shown(layer, cache.method))
        # Where an output was not recorded nobody reads it, but it must have the form of one.
        return self._outputs.get(layer, self._outputs[self._depth - 1])

    def require_output(self, layer: int) -> None:
        """Raise ValueError unless the layers after this one can be computed."""
        if layer not in self._outputs:
            recorded = ", ".join(map(str, sorted(self._outputs)))
            raise ValueError(
                f"RecordedPrefill: a selection must come after one of the recorded layers "
                f"{recorded}, got one after layer {layer}"
            )


class _Clock:
    """Seconds of what a device does within, and between ticks of it.

    The device is waited for at the beginning and the end alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._ticks: list[Any] = []
        self.seconds = 0.0

    def __enter__(self) -> _Clock:
        self._wait()
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._begin

    def tick(self, *arguments: Any) -> None:
        """Note the time, as a hook of a module if need be."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._ticks.append(event)
        else:
            self._ticks.append(time.perf_counter())

    def between_ticks(self) -> list[float]:
        """The seconds between each tick and the next, once the clock has stopped."""
        pairs = itertools.pairwise(self._ticks)
        if self._on_gpu:
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)


@dataclass
class _Replay:
    record: RecordedPrefill
    active: bool = False  # whether the layers of the current forward are replayed
    seen: list[list[Seen]] = field(default_factory=list)
    saved: float = 0.0  # seconds that the full prefill took for what was replayed

    def hand_out(self, layer: int, cache: ClaaCache) -> Any:
        """See :meth:`RecordedPrefill.hand_out`."""
        self.saved += self.record._layer_seconds[layer]
        return self.record.hand_out(layer, cache)


class _Layer:
    """Takes the place of a layer's forward: replays it as long as nothing was selected."""

    def __init__(self, replay: _Replay, block: nn.Module, index: int) -> None:
        self._replay, self._index = replay, index
        self._compute, self._signature = block.forward, inspect.signature(block.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._signature.bind(*args, **kwargs).arguments
        cache, replay = cache_of(arguments), self._replay
        if not isinstance(cache, ClaaCache) or not cache.prefilling or cache.state is None:
            return self._compute(*args, **kwargs)
        if self._index == 0:
            replay.active = replay.record.begins(arguments, cache)
            replay.seen.append([])
        counts = cache.look is None or cache.look.key is None  # else it runs on, with some of them
        tokens = arguments["hidden_states"].shape[1]
        start = cache.state.start if cache.taken is None else cache.taken.start
        if replay.active and cache.has_selected:
            replay.record.require_output(self._index - 1)
            replay.active = False
        try:
            if replay.active:
                return replay.hand_out(self._index, cache)
            return self._compute(*args, **kwargs)
        finally:  # a first pass ends within a layer
            if counts:
                joins = cache.taken is not None
                replay.seen[-1].append(Seen(tokens, start, self._index, joins, cache))


def _given(arguments: dict[str, Any]) -> list[Tensor]:
    """What tells one prompt from another: the embedded tokens and any rotary angles."""
    return [arguments["hidden_states"], *(arguments.get("position_embeddings") or ())]


def _each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output of a layer, a tensor or a tuple that may have others, changed."""
    if isinstance(output, tuple):
        return tuple(_each(part, change) for part in output)
    return change(output) if isinstance(output, Tensor) else output


@dataclass(frozen=True)
class _Call:
    """What a layer's attention saw, as :meth:`PrefillState.observe` takes it.

    Attributes:
        query: ``[B, H, rows, D]``, the last.
        key: ``[B, G, N, D]``.
        rest: its other arguments by name.
    """

    query: Tensor
    key: Tensor
    rest: dict[str, Any]

    def row(self, row: slice, tokens: int) -> _Call:
        """The same of one prompt, without its padding."""
        rest = dict(self.rest)
        for name in ("value", "lse"):
            if rest[name] is not None:
                rest[name] = rest[name][row, :, -tokens:]
        return _Call(self.query[row, :, -tokens:], self.key[row, :, -tokens:], rest)

    def padded(self, tokens: int) -> _Call:
        """The same with a token of padding before all ``tokens``."""
        rest = {**self.rest, "value": pad(self.rest["value"], (0, 0, 1, 0))}
        query, lse = self.query, rest["lse"]
        if query.shape[2] == tokens:  # all rows are recorded
            query = pad(query, (0, 0, 1, 0))
            rest["lse"] = None if lse is None else pad(lse, (1, 0))
        return _Call(query, pad(self.key, (0, 0, 1, 0)), rest)


class _RecordingState(PrefillState):
    """A prefill that keeps everything, and what each layer's attention saw."""

    def __init__(self, state: PrefillState) -> None:
        vars(self).update(vars(state))
        self.calls: list[_Call] = []

    def observe(self, layer: int, query: Tensor, key: Tensor, **rest: Any) -> None:
        """Note it."""
        super().observe(layer, query, key, **rest)
        # Copies: the views would keep those of the whole prompt alive.
        lse = None if rest["lse"] is None else rest["lse"][:, :, -_ROWS:].clone()
        self.calls.append(_Call(query[:, :, -_ROWS:].clone(), key, {**rest, "lse": lse}))


class _Recorder(ClaaCache):
    """A cache that keeps everything, and what each layer's attention saw."""

    def begin_forward(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> None:
        """Have the state of the prefill note what it is shown."""
        super().begin_forward(tokens, attention_mask, position_ids)
        assert self.state is not None  # this is the forward of the prompt
        self.state = _RecordingState(self.state)
