"""One full prefill that many prefills of the same prompts start from."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from claa_ops.huggingface.answer import ModelReader
from claa_ops.huggingface.cache import ClaaCache
from claa_ops.huggingface.decoding import count_positions
from claa_ops.huggingface.prefill import Prefilled, prefill
from claa_ops.huggingface.transformers_api import cache_argument, cache_of, decoder_of
from claa_ops.huggingface.work import count_work
from claa_ops.methods import FullKV, Method
from claa_ops.methods.pruning import Pruning
from claa_ops.selection.method import Preparation
from claa_ops.selection.state import PrefillState, begin

_ROWS = 64  # of the queries, the last: a method that reads more is computed as a whole

# Settings that a ranking made before the prefill does not depend on.
_AFTER_A_RANKING = {"window", "chunk", *(setting.name for setting in fields(Pruning))} - {
    "kernel_size",
    "pool_mode",
}


class Seen(NamedTuple):
    """Tokens of a padded batch: how many, and of each row, ``[B]``, how many are padding."""

    tokens: int
    start: Tensor | None

    def of_rows(self, batch: int) -> list[int]:
        """How many of them are each row's own."""
        padding = [0] * batch if self.start is None else self.start.tolist()
        return [self.tokens - each for each in padding]


@dataclass
class Replayed(Prefilled):
    """A prefill of a batch, and what each of its prompts would have cost alone.

    Attributes:
        seen: what the layers of each forward saw; there are two in a method with two passes.
        full: the tokens of each prompt.
        weights: of each layer, the multiply-adds of a token by its weights.
    """

    seen: list[list[Seen]]
    full: list[int]
    weights: list[int]

    def work_shares(self) -> list[float]:
        """For each prompt ``work_share``, were it alone.

        That of a single one has the drafts and answers that made a ranking; the others lack them.
        """
        batch = len(self.full)
        if batch == 1:
            return [self.work_share]
        work = [0] * batch
        for forward in self.seen:
            layers = zip(forward, self.weights, strict=False)  # a first pass ends early
            # The layers before a selection see the same, and so do those after it.
            for _, alike in itertools.groupby(
                layers, key=lambda layer: (layer[0].tokens, id(layer[0].start))
            ):
                group = list(alike)
                weights = sum(weight for _, weight in group)
                for row, tokens in enumerate(group[0][0].of_rows(batch)):
                    work[row] += tokens * weights
        return [
            done / (tokens * sum(self.weights))
            for done, tokens in zip(work, self.full, strict=True)
        ]

    def cache_bytes(self) -> list[int]:
        """For each prompt the bytes of its keys and values, before any decoding, were it alone."""
        batch = len(self.full)
        if batch == 1:
            return [self.cache.nbytes()]
        total = [0] * batch
        for layer, seen in zip(self.cache.layers, self.seen[-1], strict=True):
            of_an_entry = sum(
                held.shape[1] * held.shape[3] * held.element_size()
                for held in (layer.keys, layer.values)
            )
            held = Seen(layer.keys.shape[2], None if layer.is_sliding else layer.start)
            # A sliding window of a short prompt is not full.
            entries = map(min, held.of_rows(batch), seen.of_rows(batch))
            total = [before + own * of_an_entry for before, own in zip(total, entries, strict=True)]
        return total

    def kept(self) -> list[int]:
        """For each prompt how many of its tokens reached the last layer."""
        if self.positions is None:
            return self.full
        return (self.positions >= 0).sum(dim=1).tolist()


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

    Attributes:
        logits: ``[B, V]``, of the last prompt token in the full prefill.

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
        self._prepared: dict[tuple[Any, ...], Preparation] = {}
        blocks = decoder_of(model).layers
        handles = [blocks[0].register_forward_pre_hook(self._keep_embedded, with_kwargs=True)]
        for index, block in enumerate(blocks):
            if layers is None or index in layers or index == len(blocks) - 1:
                handles.append(block.register_forward_hook(self._keep_output(index)))
        recorder = _Recorder(model.config, FullKV())
        try:
            with torch.no_grad():
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
        self._start = recorder.state.start
        self._calls = recorder.state.calls
        self.logits: Tensor = output.logits[:, -1]

    def run(self, method: Method) -> Replayed:
        """:func:`claa_ops.prefill.prefill` on these prompts.

        Raises:
            ValueError: the method selects after a layer that was not among ``layers``, or does
                not fit the model or this batch.
        """
        with self.replay() as seen:
            prefilled = prefill(
                self.model,
                self.input_ids,
                method,
                self.attention_mask,
                prepared=self._prepare(method),
            )
        full = self._whole.of_rows(len(self.input_ids))
        return Replayed(**vars(prefilled), seen=seen, full=full, weights=self._weights)

    def row(self, index: int) -> RecordedPrefill:
        """The record of one prompt of the batch, as if it had been prefilled alone."""
        tokens = self._whole.of_rows(len(self.input_ids))[index]
        row = slice(index, index + 1)
        alone = copy.copy(self)
        alone.input_ids = self.input_ids[row, -tokens:]
        alone.attention_mask = alone._start = None
        alone.logits = self.logits[row]
        alone._prepared = {}
        alone._outputs = {
            layer: _each(output, lambda x: x[row, -tokens:])
            for layer, output in self._outputs.items()
        }
        # Of the angles there may be one row for all prompts.
        alone._given = [x[row if len(x) > 1 else slice(1), -tokens:] for x in self._given]
        alone._calls = [call.row(row, tokens) for call in self._calls]
        return alone

    @property
    def _whole(self) -> Seen:
        """What full prefill sees in every layer."""
        return Seen(self.input_ids.shape[1], self._start)

    @functools.cached_property
    def _weights(self) -> list[int]:
        """Of each layer, the multiply-adds of a token by its weights."""
        layers = range(len(self._calls))
        return [count_work(self.model, [0] * layer + [1]).linear for layer in layers]

    def _prepare(self, method: Method) -> Preparation | None:
        """The answer of an oracle or a draft, once for all layers and budgets."""
        if not method.needs_ranking:
            return None
        settings = {
            setting.name: getattr(method, setting.name)
            for setting in fields(method)
            if setting.init and setting.name not in _AFTER_A_RANKING
        }
        key = type(method), *settings.values()
        if key not in self._prepared:
            prepared = method.prepare(ModelReader(self.model), self.input_ids, self.attention_mask)
            assert prepared is not None  # it is what the method needs
            self._prepared[key] = prepared
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
        at_depth = method.at_depth(len(self._calls))
        if isinstance(getattr(at_depth, "layer", None), int):
            method = replace(at_depth, layer=layer)  # type: ignore[call-arg]
        state = begin(
            method,
            num_layers=len(self._calls),
            prompt_length=self.input_ids.shape[1],
            start=self._start,
            ranking=ranking,
            first_pass=method.two_pass,
        )
        for index in range(layer + 1):
            call = self._calls[index]
            state.observe(index, call.query, call.key, **call.rest)
        return state

    @contextlib.contextmanager
    def replay(self) -> Iterator[list[list[Seen]]]:
        """Within, prefills of these prompts by the model replay what was recorded.

        That is any forward of the whole prompts, at the positions that their mask counts, with a
        ClaaCache; all others, such as those of decoding or the second pass of a two-pass method,
        are computed.

        Yields:
            What the layers of each prefill see, filled as they run: see :class:`Replayed`.
        """
        replay = _Replay(self)
        blocks = decoder_of(self.model).layers
        try:
            for index, block in enumerate(blocks):
                block.forward = _Layer(replay, block, index)
            yield replay.seen
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
        return (
            same
            and cache.method.rows(cache.state) <= _ROWS
            and not cache.method.reads_hidden
            and not cache.method.alters_layers
            and all(map(torch.equal, given, self._given))
        )

    def hand_out(self, layer: int, cache: ClaaCache) -> Any:
        """The output of a layer, whose keys, values and scores the cache gets."""
        call = self._calls[layer]
        cache.update(call.key, call.rest["value"], layer)
        cache.observe(layer, call.query, call.key, **call.rest)
        # Where an output was not recorded nobody reads it, but it must have the form of one.
        return self._outputs.get(layer, self._outputs[len(self._calls) - 1])

    def require_output(self, layer: int) -> None:
        """Raise ValueError unless the layers after this one can be computed."""
        if layer not in self._outputs:
            recorded = ", ".join(map(str, sorted(self._outputs)))
            raise ValueError(
                f"RecordedPrefill: a selection must come after one of the recorded layers "
                f"{recorded}, got one after layer {layer}"
            )


@dataclass
class _Replay:
    record: RecordedPrefill
    active: bool = False  # whether the layers of the current forward are replayed
    seen: list[list[Seen]] = field(default_factory=list)


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
        if cache.look is None or cache.look.key is None:  # else it runs on, with some of them
            replay.seen[-1].append(Seen(arguments["hidden_states"].shape[1], cache.state.start))
        if replay.active and cache.has_selected:
            replay.record.require_output(self._index - 1)
            replay.active = False
        if replay.active:
            return replay.record.hand_out(self._index, cache)
        return self._compute(*args, **kwargs)


def _given(arguments: dict[str, Any]) -> list[Tensor]:
    """What tells one prompt from another: the embedded tokens and their rotary angles."""
    return [arguments["hidden_states"], *arguments["position_embeddings"]]


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
