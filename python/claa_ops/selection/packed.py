"""The functional API for prompts of several lengths, one behind the other, as engines do it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from claa_ops.selection.method import Method
from claa_ops.selection.parallel import Reduce
from claa_ops.selection.state import PrefillState, begin


def begin_packed(
    method: Method | Sequence[Method],
    *,
    num_layers: int,
    prompt_lengths: Sequence[int],
    protect: Sequence[Tensor | None] | None = None,
    reduce: Reduce | None = None,
) -> PackedPrefill:
    """Start the prefill of several prompts whose tokens lie one behind the other, without padding.

    That is the form in which variable-length attention takes them, such as flash attention's. In
    the layer loop, after the attention of each layer::

        state.observe(layer, query, key)                        # [T, H, D] and [T, G, D]
        key, value, lengths = state.compress(layer, key, value) # for the decode caches

    and after the whole layer::

        index = state.select(layer)
        if index is not None:
            hidden = hidden[index]                              # and cos, sin, position ids
            limits = state.limits                               # where each prompt begins now

    Each prompt keeps the tokens that it keeps alone, to the bit: neither its neighbours nor their
    number are seen by its ranking.

    Args:
        method: of all prompts, or of each its own, such as with a keep rate of its own. Their
            selection layers may differ.
        num_layers: how many layers the model has; see :func:`begin`.
        prompt_lengths: of each prompt.
        protect: of each prompt ``[n]``, bool, which of its tokens are never dropped, or None; see
            :func:`begin`.
        reduce: for a model whose heads are on several devices; see :func:`begin`.

    Returns:
        The state of this prefill.

    Raises:
        TypeError, ValueError: as :func:`begin` does for each prompt; there are no prompts, or
            another number of methods; or a method goes back to an earlier layer, which the other
            prompts do not do with it.

    Example:
        >>> from claa_ops.methods import CLAA
        >>> state = begin_packed(
        ...     [CLAA(keep=0.1), CLAA(keep=0.5)], num_layers=32, prompt_lengths=[4096, 700]
        ... )
        >>> state.limits
        [0, 4096, 4796]
    """
    lengths = list(prompt_lengths)
    methods = [method] * len(lengths) if isinstance(method, Method) else list(method)
    if not lengths:
        raise ValueError("begin_packed: there must be a prompt, got none")
    if len(methods) != len(lengths):
        raise ValueError(
            f"begin_packed: method must be one, or one for each of the {len(lengths)} prompts, "
            f"got {len(methods)}"
        )
    masks = [None] * len(lengths) if protect is None else list(protect)
    if len(masks) != len(lengths):
        raise ValueError(
            f"begin_packed: protect must be one for each of the {len(lengths)} prompts, "
            f"got {len(masks)}"
        )
    prompts = [
        begin(
            each,
            num_layers=num_layers,
            prompt_length=length,
            protect=mask[None] if isinstance(mask, Tensor) else mask,
            reduce=reduce,
        )
        for each, length, mask in zip(methods, lengths, masks, strict=True)
    ]
    for each in methods:
        if each.may_park:
            raise ValueError(
                "begin_packed: the method must leave behind what it drops, "
                f"got {type(each).__name__}, which may come back to it: see begin"
            )
    return PackedPrefill(prompts)


class PackedPrefill:
    """What the prefill of several packed prompts has seen so far; made by :func:`begin_packed`.

    Attributes:
        prompts: the state of each prompt, as if it were alone.
    """

    def __init__(self, prompts: list[PrefillState]) -> None:
        self.prompts = prompts
        self._device: torch.device | None = None  # of the layer that was observed last

    @property
    def lengths(self) -> list[int]:
        """How many tokens of each prompt the current layer sees."""
        return [prompt.length for prompt in self.prompts]

    @property
    def limits(self) -> list[int]:
        """Where each prompt begins among the T tokens of the current layer, and where all end."""
        return list(accumulate(self.lengths, initial=0))

    @property
    def positions(self) -> Tensor:
        """``[T]``, int64: the place that each token of the current layer has in its prompt."""
        return torch.cat(
            [
                torch.arange(prompt.length, device=self._device)
                if prompt.positions is None
                else prompt.positions[0]
                for prompt in self.prompts
            ]
        )

    def observe(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        *,
        value: Tensor | None = None,
        hidden: Tensor | None = None,
        lse: Tensor | None = None,
        **attention: Any,
    ) -> None:
        """Show the methods what a layer saw.

        Args:
            layer: the layer, from 0; layers come in ascending order.
            query: ``[T, H, D]``, of all tokens of all prompts, after the rotary embedding.
            key: ``[T, G, D]``, likewise.
            value: ``[T, G, Dv]``, for methods that read it.
            hidden: ``[T, C]``, the layer's input, likewise.
            lse: ``[H, T]``, float32: the attention's logsumexp, as variable-length flash attention
                returns it.
            attention: ``scale``, ``sliding_window``, ``softcap`` and ``sink_logits`` of the
                layer's attention; see :meth:`PrefillState.observe`.

        Raises:
            RuntimeError: layers do not ascend.
            ValueError: the layer is out of range, or a tensor does not have T tokens.
        """
        self._device, tokens = key.device, self.limits[-1]
        seen = {"query": query, "key": key, "value": value, "hidden": hidden, "lse": lse}
        for name, x in seen.items():
            if x is not None and x.shape[name == "lse"] != tokens:
                raise ValueError(
                    f"observe: {name} of layer {layer} must have the {tokens} tokens that the "
                    f"layer sees, got shape {list(x.shape)}"
                )
        for prompt, own in zip(self.prompts, self._parts(), strict=True):
            prompt.observe(
                layer,
                _of_heads(query[own]),
                _of_heads(key[own]),
                value=None if value is None else _of_heads(value[own]),
                hidden=None if hidden is None else hidden[own][None],
                lse=None if lse is None else lse[None, :, own],
                **attention,
            )

    def compress(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """What the decode caches of an observed layer keep.

        Args:
            layer: the layer that was observed last.
            key: ``[T, G, D]``.
            value: ``[T, G, Dv]``.

        Returns:
            The kept rows, ``[K, G, D]`` and ``[K, G, Dv]``, one prompt behind the other, and how
            many each prompt has. Heads may keep different tokens, each in ascending order.

        Raises:
            RuntimeError: the layer was not observed just before.
        """
        kept = [
            prompt.compress(layer, _of_heads(key[own]), _of_heads(value[own]))
            for prompt, own in zip(self.prompts, self._parts(), strict=True)
        ]
        keys, values = (
            torch.cat([pair[which][0].transpose(0, 1) for pair in kept]) for which in (0, 1)
        )
        return keys, values, [key.shape[2] for key, _ in kept]

    def select(self, layer: int) -> Tensor | None:
        """Which tokens continue to the layers after an observed layer.

        Returns:
            ``[K]``, int64, ascending, into the T tokens of this layer; None if all continue.
            :attr:`limits` and :attr:`positions` are then those of the tokens that continue.

        Raises:
            RuntimeError: the layer was not observed just before, or selects a second time.
        """
        parts = self._parts()
        selected = [prompt.select(layer) for prompt in self.prompts]
        known = [index for index in selected if index is not None]
        if not known:
            return None
        device = known[0].device
        return torch.cat(
            [
                torch.arange(own.start, own.stop, device=device)
                if index is None
                else own.start + index[0]
                for index, own in zip(selected, parts, strict=True)
            ]
        )

    def _parts(self) -> list[slice]:
        """Where the tokens of each prompt lie."""
        return [slice(*limits) for limits in pairwise(self.limits)]


def _of_heads(x: Tensor) -> Tensor:
    """``[n, H, D]`` of one prompt as ``[1, H, n, D]``, without a copy."""
    return x.transpose(0, 1)[None]
