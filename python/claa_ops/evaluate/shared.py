"""One full prefill that many prefills of the same prompt start from."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from claa_ops.huggingface.answer import ModelReader
from claa_ops.huggingface.decoding import count_positions
from claa_ops.huggingface.transformers_api import cache_argument, cache_of, decoder_of
from claa_ops.methods import FullKV, Method
from claa_ops.methods.pruning import Pruning
from claa_ops.prefill import ClaaCache, Prefilled, PrefillState, begin, prefill
from claa_ops.selection.method import Preparation

_ROWS = 64  # of the queries, the last: a method that reads more is computed as a whole

# Settings that a ranking made before the prefill does not depend on.
_BEHIND_A_RANKING = {"window", "chunk", *(field.name for field in fields(Pruning))} - {
    "kernel_size",
    "pool_mode",
}


class SharedPrefill:
    """A full prefill of a prompt, recorded, so that methods need not compute it again.

    Up to its first selection a method sees what full prefill sees: the same hidden states, queries
    and keys. Those layers are replayed from the record, scored and compressed by the method as
    always, and only the layers behind the selection are computed. What comes out is what
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

        shared = SharedPrefill(attach(model), ids)
        for layer in range(4, 29):
            prefilled = shared.run(CLAA(keep=0.1, layer=layer))
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
        recorder = _Recorder(model)
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
        assert recorder.state is not None
        self._start = recorder.state.start
        self._calls = recorder.calls
        self.logits: Tensor = output.logits[:, -1]

    def run(self, method: Method) -> Prefilled:
        """:func:`claa_ops.prefill.prefill` on this prompt.

        Raises:
            ValueError: the method selects after a layer that was not among ``layers``.
        """
        with self.replay():
            return prefill(
                self.model,
                self.input_ids,
                method,
                self.attention_mask,
                prepared=self._prepare(method),
            )

    def _prepare(self, method: Method) -> Preparation | None:
        """The answer of an oracle or a draft, once for all layers and budgets."""
        if not method.needs_ranking:
            return None
        settings = {
            field.name: getattr(method, field.name)
            for field in fields(method)
            if field.init and field.name not in _BEHIND_A_RANKING
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
            method: the ranking system.
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
            state.observe(index, call.query, call.key, **call.attention)
        return state

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Within, prefills of this prompt by the model replay what was recorded.

        That is any forward of the whole prompt, at the positions that its mask counts, with a
        ClaaCache; all others, such as those of decoding or the second pass of a two-pass method,
        are computed.
        """
        blocks = decoder_of(self.model).layers
        for index, block in enumerate(blocks):
            block.forward = self._replaying(block, index)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward  # the instance's, so that the class's is seen again

    def _keep_embedded(self, block: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        bound = inspect.signature(block.forward).bind(*args, **kwargs)
        self._given = _given(bound.arguments)

    def _keep_output(self, layer: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._outputs[layer] = output

        return hook

    def _replaying(self, block: nn.Module, layer: int) -> Callable[..., Any]:
        compute, signature = block.forward, inspect.signature(block.forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            cache = cache_of(arguments)
            if layer == 0:
                self._replays = self._is_recorded(_given(arguments), cache)
            if not self._replays:
                return compute(*args, **kwargs)
            if cache.has_selected:
                if layer - 1 not in self._outputs:
                    recorded = ", ".join(map(str, sorted(self._outputs)))
                    raise ValueError(
                        f"SharedPrefill: a selection must come after one of the recorded layers "
                        f"{recorded}, got one after layer {layer - 1}"
                    )
                self._replays = False
                return compute(*args, **kwargs)
            held, call = cache.layers[layer], self._calls[layer]
            cache.update(call.key, call.value, layer)
            cache.state.observe(layer, call.query, call.key, **call.attention)
            if not held.is_sliding:
                held.keys, held.values = cache.state.compress(layer, held.keys, held.values)
            # Where an output was not recorded nobody reads it, but it must have the form of one.
            return self._outputs.get(layer, self._outputs[len(self._calls) - 1])

        return forward

    def _is_recorded(self, given: list[Tensor], cache: Any) -> bool:
        if not isinstance(cache, ClaaCache) or cache.state is None or not cache.prefilling:
            return False
        enough = cache.method.rows(cache.state) <= _ROWS and not cache.method.reads_hidden
        return enough and all(map(torch.equal, given, self._given))


def _given(arguments: dict[str, Any]) -> list[Tensor]:
    """What tells one prompt from another: the embedded tokens and their rotary angles."""
    return [arguments["hidden_states"], *arguments["position_embeddings"]]


@dataclass(frozen=True)
class _Call:
    """What a layer's attention saw: ``[B, H, rows, D]``, ``[B, G, N, D]``, ``[B, G, N, Dv]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    attention: dict[str, Any]


class _Recorder(ClaaCache):
    """A cache that keeps everything, and what each layer's attention saw."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.config, FullKV())
        self.calls: list[_Call] = []

    def begin_forward(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> None:
        """Have the state of the prefill tell what it observes."""
        super().begin_forward(tokens, attention_mask, position_ids)
        assert self.state is not None
        self.state.observe = self._observe  # type: ignore[method-assign]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of a layer."""
        key, self._value = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return key, self._value

    def _observe(self, layer: int, query: Tensor, key: Tensor, **attention: Any) -> None:
        assert self.state is not None
        PrefillState.observe(self.state, layer, query, key, **attention)
        # A copy: the view would keep the queries of the whole prompt alive.
        self.calls.append(_Call(query[:, :, -_ROWS:].clone(), key, self._value, attention))
