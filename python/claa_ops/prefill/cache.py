"""The cache that turns a prefill method on: it carries the request, and nothing else does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from claa_ops.methods.base import Method
from claa_ops.prefill.state import PrefillState, begin
from claa_ops.prefill.transformers_api import Cache, DynamicLayer, PreTrainedConfig, cache_layers


class ClaaCache(Cache):
    """Key/value cache of one request, whose prompt is prefilled by a ranking system.

    Pass it to an attached model: ``model.generate(ids, past_key_values=ClaaCache(...))``. Its
    first forward is the prompt; that is scored, selected and compressed. Later forwards, tokens
    one by one or whole turns of a conversation, are kept in full and attend to what is left of
    the prompt. Prompts of different lengths are padded on the left. After a selection the first
    forward returns logits of the selected tokens only; the last one is always among them.

    The prompt must be one forward, so chunked prefill (``prefill_chunk_size``), speculative
    decoding, which adds its drafts to the prompt, and ``crop`` are not served. Nor are training,
    ``labels``, and layers other than full and sliding-window attention. Sliding-window layers are
    not compressed: they hold their window, decided by the original positions of the tokens.

    Args:
        config: the model's configuration.
        method: the ranking system, such as :class:`claa_ops.methods.CLAA`.
        ranking: ``[B, N]``, float32, for methods that need one of the prompt.
        keep_scores: record the token scores of each ranked layer in ``state.scores``.

    Attributes:
        state: the :class:`PrefillState` of the prompt; None before the prefill.

    Raises:
        ValueError: the method does not fit the model or prefills twice, or a layer is of a kind
            not served.

    Example::

        model = claa_ops.prefill.attach(AutoModelForCausalLM.from_pretrained(name))
        cache = ClaaCache(model.config, CLAA(keep=0.1))
        tokens = model.generate(ids, past_key_values=cache, max_new_tokens=32)
    """

    layers: list[Any]
    first_pass = False  # whether it serves the first of two passes, and no decoding

    def __init__(
        self,
        config: PreTrainedConfig,
        method: Method,
        *,
        ranking: Tensor | None = None,
        keep_scores: bool = False,
    ) -> None:
        if method.two_pass and not self.first_pass:
            raise ValueError(
                f"ClaaCache: the method must prefill once, got {type(method).__name__}, which "
                "prefills twice: call claa_ops.prefill.generate(model, input_ids, method) instead"
            )
        kinds = cache_layers(config)
        self.layer_types = [kind for kind, _ in kinds]
        method.check(len(kinds))
        layers: list[Any] = []
        for layer, (kind, window) in enumerate(kinds):
            if kind == "sliding_attention" and window is not None:
                layers.append(SlidingLayer(window))
            elif kind == "full_attention":
                layers.append(FullLayer())
            else:
                raise ValueError(
                    f"ClaaCache: layers must be full_attention or sliding_attention, "
                    f"got {kind} for layer {layer}"
                )
        super().__init__(layers=layers)
        self.method = method
        self.ranking = ranking
        self.keep_scores = keep_scores
        self._clear()

    def _clear(self) -> None:
        self.state: PrefillState | None = None
        self.prefilling = False
        self.in_forward = False
        # The number of tokens seen is the length of an empty tensor: torch.compile keeps sizes
        # symbolic, but compiles anew for every value of an int that it finds on an object.
        self._seen = torch.empty(0, 0)
        # What the model was given, where its decoder gets something made of that.
        self.given: dict[str, Any] = {}
        # What the layers behind a selection receive, made once for each type of layer.
        self.selected: dict[str, dict[str, Any]] = {}

    @property
    def lengths(self) -> list[int]:
        """How many entries each layer holds, for each key/value head."""
        return [layer.get_seq_length() for layer in self.layers]

    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers
            if layer.is_initialized
            for tensor in (layer.keys, layer.values)
        )

    @property
    def has_selected(self) -> bool:
        """Whether the layers so far have dropped tokens of the prompt."""
        return self.state is not None and self.state.positions is not None

    def begin_forward(self, num_tokens: int, attention_mask: Tensor | None) -> None:
        """Called by an attached model before its layers: the first forward is the prefill."""
        self.in_forward = True
        self.prefilling = self.get_seq_length() == 0
        if self.prefilling:
            self.state = begin(
                self.method,
                num_layers=len(self.layers),
                prompt_length=num_tokens,
                start=first_valid(attention_mask, num_tokens),
                ranking=self.ranking,
                keep_scores=self.keep_scores,
            )

    def end_forward(self) -> None:
        """Called by an attached model after its layers."""
        self.given.clear()
        self.selected.clear()
        self.in_forward = self.prefilling = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of a layer; return all that its attention should see."""
        if not self.in_forward:
            raise RuntimeError(
                "ClaaCache: the model must be attached, call claa_ops.prefill.attach(model) first; "
                "got a forward of a model that is not"
            )
        if layer_idx == 0:
            seen = self.get_seq_length() + key_states.shape[2]
            self._seen = self._seen.new_empty(seen, 0)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the model has seen, whether or not their entries are still held."""
        return self._seen.shape[0]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask for the layers of one type.

        A layer that dropped entries takes the last columns of the mask. That is exact, because
        entries are in ascending order and padding is dropped first: an entry is padding if and
        only if its column is.
        """
        seen, layer = self.get_seq_length(), self.layers[layer_idx]
        held = layer.get_seq_length() if layer.is_sliding else seen
        return held + query_length, seen - held

    def reset(self) -> None:
        """Forget the request, to use the cache for another."""
        for layer in self.layers:
            # Dropped, not zeroed: transformers before 5.18 would keep the old length.
            layer.keys = layer.values = None
            layer.is_initialized = False
            layer.reset()
        self._clear()

    @property
    def is_croppable(self) -> bool:
        """False: what a selection dropped cannot be put back."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what a selection dropped cannot be put back."""
        raise ValueError(
            "ClaaCache: crop is not served, and neither is speculative decoding, which adds its "
            f"drafts to the prompt; got crop({tokens_to_remove})"
        )

    def activate_past_recording(self) -> None:
        """Refused, for the reason of :meth:`crop`, which it announces."""
        self.crop(0)


class FullLayer(DynamicLayer):
    """All entries. Those of the prompt are held as they come; appending to nothing would copy."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append entries; return them with those before them."""
        # Entries that were appended to are contiguous, those of the prompt may not be: for other
        # strides torch.compile would compile the step of decoding anew.
        if self.is_initialized or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = _owned(key_states), _owned(value_states)
        return self.keys, self.values


def _owned(x: Tensor) -> Tensor:
    """``[B, G, n, D]`` as it is; a copy where it is a slice, which would keep the rest alive."""
    fills_its_memory = x.is_contiguous() or x.transpose(1, 2).is_contiguous()
    return x if fills_its_memory else x.contiguous()


class SlidingLayer(FullLayer):
    """The last ``sliding_window - 1`` entries, all that the next token can see.

    Behind a selection the entries are not neighbours, but their positions ascend, so no more
    than these can lie in the window of the next token. ``positions`` says where they stood,
    ``[B, entries]``; None in a layer that saw the whole prompt.
    """

    is_sliding = True

    def __init__(self, sliding_window: int) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.positions: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append entries; return them with those before them, keep the last."""
        key, value = super().update(key_states, value_states, *args, **kwargs)
        # Copies: views would keep the whole prompt's keys alive, and torch.compile would compile
        # anew where the strides that they show happen to change.
        self.keys = key[:, :, 1 - self.sliding_window :].clone()
        self.values = value[:, :, 1 - self.sliding_window :].clone()
        return key, value

    def place(self, positions: Tensor, start: Tensor | None) -> None:
        """Note where the selected tokens of the prompt stood, padding out of every window."""
        if start is not None:
            padding = torch.arange(positions.shape[1], device=start.device) < start[:, None]
            positions = positions.masked_fill(padding, -self.sliding_window)
        self.positions = positions[:, 1 - self.sliding_window :].clone()

    def visible(self, new: Tensor) -> Tensor:
        """Append the positions of new tokens, ``[q]``; which entries they see, ``[B, q, k]``."""
        assert self.positions is not None
        held = torch.cat([self.positions, new.expand(self.positions.shape[0], -1)], dim=1)
        self.positions = held[:, 1 - self.sliding_window :].clone()
        distance = new[:, None] - held[:, None]
        return (distance >= 0) & (distance < self.sliding_window)

    def reset(self) -> None:
        """Forget the request."""
        super().reset()
        self.positions = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search."""
        super().reorder_cache(beam_idx)
        if self.positions is not None:
            self.positions = self.positions[beam_idx.to(self.positions.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        if self.positions is not None:
            self.positions = self.positions.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        if self.positions is not None:
            self.positions = self.positions[indices]


def first_valid(attention_mask: Tensor | None, num_tokens: int) -> Tensor | None:
    """[B]: the first token of each row that is not left padding; None where there is no padding."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != num_tokens:
        raise ValueError(
            f"ClaaCache: attention_mask of the prompt must have shape [batch, {num_tokens}], "
            f"got {list(attention_mask.shape)}"
        )
    valid = attention_mask.bool()
    if not torch.compiler.is_compiling():  # a compiled graph cannot look at the values
        if valid.all():
            return None
        if (valid[:, :-1] & ~valid[:, 1:]).any():
            raise ValueError("ClaaCache: prompts must be padded on the left, got other padding")
    return num_tokens - valid.sum(dim=1)
