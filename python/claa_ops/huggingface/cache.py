"""The cache that turns a method on: it holds all the state of a request, the model none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from claa_ops.huggingface.chat_parts import Protect, protected_of
from claa_ops.huggingface.generation import AttachedCache, Request
from claa_ops.huggingface.prompt import (
    check_mask,
    check_positions,
    check_same_padding,
    first_valid,
)
from claa_ops.huggingface.transformers_api import (
    WITH_NOTHING,
    DynamicLayer,
    LayerKind,
    LinearAttentionLayer,
    PreTrainedConfig,
    cache_layers,
)
from claa_ops.ops.gather_kv import gather_kv
from claa_ops.selection.budget import Budget
from claa_ops.selection.method import Method
from claa_ops.selection.parallel import Reduce
from claa_ops.selection.state import PrefillState, Turn, begin, check_method
from claa_ops.selection.taken import TakenUp


@dataclass
class Look:
    """What a layer's attention gets of all tokens, before a selection within the layer.

    Attributes:
        start: ``[B]``: the first of these n tokens that is not padding; None without padding.
        key, value: ``[B, G, n, D]``, once the attention was called.
        index: ``[B, k]``: the tokens that are selected; None for all of them.
    """

    start: Tensor | None
    key: Tensor | None = None
    value: Tensor | None = None
    index: Tensor | None = None


class ClaaCache(AttachedCache):
    """Key/value cache of one request, whose prompt is prefilled by a method.

    Pass it to an attached model: ``model.generate(ids, past_key_values=ClaaCache(...))``. Its
    first forward is the prompt, which is scored, selected from and compressed. Later forwards,
    tokens one by one or whole turns of a conversation, are kept in full and attend to what is left
    of the prompt; with a method's ``second_look`` a turn of several tokens first takes up more of
    it. Prompts of different lengths are padded on the left. After a selection the first forward
    returns logits of the selected tokens only; the last one is always among them. Hidden
    states and attentions, if asked for, are likewise those of the tokens that a layer sees.

    The prompt must be one forward, so chunked prefill (``prefill_chunk_size``), speculative
    decoding, which adds its drafts to the prompt, and ``crop`` are not served. Nor are training,
    ``labels``, ``use_cache=False``, masks other than left padding in the prompt, and layers other
    than those below. Sliding-window layers are not compressed: they hold their window, decided by
    the original positions of the tokens.

    A hybrid model has layers that attend and layers, or parts of them, that hand a state of fixed
    size from token to token: short convolutions, gated delta rules, state spaces. The former rank
    and are compressed; the latter read the tokens that reach them, in their order. What this means
    for the settings of a method: :meth:`claa_ops.methods.Method.among`.

    All of that is refused. Two things are not, because no forward can tell them from a turn of a
    conversation: part of a prompt, and an unrelated prompt, if they are given to the model by hand
    without a mask or positions. ``generate`` compares the tokens with those that it has seen.

    Args:
        config: the model's configuration.
        method: such as :class:`claa_ops.methods.CLAA`.
        ranking: ``[B, N]``, float32: a ranking of the prompt, for methods that need one.
        protect: tokens that are never dropped: a mask ``[B, N]``, bool, or a function that makes it
            of ``input_ids``, such as :class:`ChatParts`. Budgets are of the other tokens: see
            :func:`begin`.
        keep_scores: record the token scores of each ranked layer in ``state.scores``.

    Attributes:
        state: the :class:`PrefillState` of the prompt; None before the prefill.

    Raises:
        TypeError: ``method`` is not a method, ``config`` not a configuration, or ``protect`` is
            neither a mask nor a function.
        ValueError: the method does not fit the model or prefills twice, or a layer is of a kind
            not served; later, in a forward or in ``generate``, for what is not served, as above.

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
        protect: Protect | None = None,
        keep_scores: bool = False,
    ) -> None:
        check_method("ClaaCache", method, self.first_pass)
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(
                f"ClaaCache: config must be that of a model, got {type(config).__name__}"
            )
        if not (protect is None or isinstance(protect, Tensor) or callable(protect)):
            raise TypeError(
                "ClaaCache: protect must be a mask, or a function of input_ids such as ChatParts, "
                f"got {type(protect).__name__}"
            )
        self.kinds = tuple(cache_layers(config))
        self.layer_types = [kind.name for kind in self.kinds]
        super().__init__(layers=_new_layers(self.kinds))
        self.attending = [layer for layer, kind in enumerate(self.kinds) if kind.attends]
        if not self.attending:
            raise ValueError("ClaaCache: a layer must attend, got none")
        for layer, kind in enumerate(self.kinds):
            if method.may_park and (kind.states or not kind.attends):
                raise ValueError(
                    f"ClaaCache: {type(method).__name__} runs tokens through layers a second time, "
                    f"which needs layers that attend and have no states, got {kind.name} for "
                    f"layer {layer}"
                )
            if method.looks_again and kind.name != "full_attention":
                raise ValueError(
                    "ClaaCache: a second look needs layers with full attention, "
                    f"got {kind.name} for layer {layer}"
                )
        self.method = method
        self._method, after = method.among(self.attending, len(self.kinds))
        # Methods count the layers that attend: their number by the layer, and by that after which
        # their selection drops tokens.
        self._counted = {layer: count for count, layer in enumerate(self.attending)}
        self._selecting = {layer: count for count, layer in after.items()}
        self.ranking = ranking
        self.protect = protect
        self.keep_scores = keep_scores
        self._clear()

    def _clear(self) -> None:
        self.state: PrefillState | None = None
        self.prefilling = False
        self.in_forward = False
        # Of the prompt, [B]: the first token of each row that is not padding; None without any.
        self.start: Tensor | None = None
        # The turn whose forward this is, if it may take up dropped tokens.
        self.turn: Turn | None = None
        # The tokens that were taken up and run in the layer that is running.
        self.taken: TakenUp | None = None
        # Prompt and answer of the last `generate`, [B, T]; None if unknown.
        self.tokens: Tensor | None = None
        self.holds_beams = False
        # The number of tokens seen is the length of an empty tensor: torch.compile keeps sizes
        # symbolic, but compiles anew for every value of an int that it finds on an object.
        self._seen = torch.empty(0, 0)
        # Arguments of the model, of which its decoder gets only what the model made of them.
        self.given: dict[str, Any] = {}
        # Of each layer that ran in the prefill, how many tokens it saw.
        self.seen: list[int] = []
        # The input of the layer that is running, for a method that reads it.
        self.hidden: Tensor | None = None
        # What a method may come back to.
        self.parked: Parked | None = None
        # What the layers after a selection receive, gathered once for each type of layer.
        self.selected: dict[str, dict[str, Any]] = {}
        # Of the layer that selects within itself, while it runs.
        self.look: Look | None = None
        # Of each such layer that has run, which of its tokens it selected; None for all.
        self.within: dict[int, Tensor | None] = {}
        # Of each layer that has attended to a share of its keys, the share.
        self.sparse: dict[int, Budget] = {}

    @property
    def lengths(self) -> list[int]:
        """How many entries each layer holds, for each key/value head; 0 without attention."""
        return [layer.get_seq_length() for layer in self.layers]

    def nbytes(self) -> int:
        """Bytes of the keys, values and states held, parked hidden states included."""
        held = [tensor for layer in self.layers for tensor in layer.tensors()]
        parked = [] if self.parked is None else self.parked.tensors()
        return sum(tensor.numel() * tensor.element_size() for tensor in (*held, *parked))

    @property
    def has_selected(self) -> bool:
        """Whether the layers so far have dropped tokens of the prompt."""
        return self.state is not None and self.state.positions is not None

    def begin_forward(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> None:
        """Called by an attached model before its layers: the first forward is the prefill."""
        if self.in_forward:
            raise RuntimeError(
                "ClaaCache: the forward before this one did not end, and left the layers of the "
                "cache with different tokens: call reset() and prefill again"
            )
        batch, new = tokens.shape[:2]
        seen = self.get_seq_length()
        if seen == 0:
            self.start = first_valid(attention_mask, batch, new)
            state = self.new_state(new, self.start, protected_of(self.protect, tokens))
            if batch > 1 and self.start is None and state.differs_by_row:
                # Transformers makes no mask then, and rows that keep less need one.
                what = type(self.method).__name__ if self.method.differs_by_row else "protect"
                raise ValueError(
                    f"ClaaCache: {what} keeps more of one prompt than of another, so a batch must "
                    f"be padded or one prompt, got {batch} of one length"
                )
            self.state = state
        else:
            self._check_turn(batch, new, attention_mask)
            if new > 1 and self.parked is not None:
                self._begin_turn(seen, new, attention_mask)
        if (
            position_ids is not None
            and position_ids.dim() == 2
            and (seen == 0 or new > 1 or not position_ids.is_cuda)
        ):
            mask = None if attention_mask is None else attention_mask[:, seen:]
            check_positions(position_ids, mask, seen)
        self.prefilling, self.in_forward = seen == 0, True

    def new_state(
        self, prompt_length: int, start: Tensor | None, protect: Tensor | None = None
    ) -> PrefillState:
        """A prefill by the method, which counts the layers that attend."""
        return begin(
            self._method,
            num_layers=len(self.attending),
            prompt_length=prompt_length,
            start=start,
            ranking=self.ranking,
            protect=protect,
            keep_scores=self.keep_scores,
            first_pass=self.first_pass,
            reduce=self.reduce,
        )

    def _check_turn(self, batch: int, new: int, attention_mask: Tensor | None) -> None:
        rows, seen = self.layers[self.attending[0]].keys.shape[0], self.get_seq_length()
        if batch != rows:
            raise ValueError(f"ClaaCache: the batch must have its {rows} rows, got {batch}")
        if attention_mask is None:
            if self.start is not None:
                raise ValueError(
                    "ClaaCache: attention_mask must be given after a padded prompt, got None"
                )
            return
        check_mask(attention_mask)
        if tuple(attention_mask.shape) != (batch, seen + new):
            raise ValueError(
                f"ClaaCache: attention_mask must have shape [{batch}, {seen + new}], of the {seen} "
                f"tokens that the cache has seen and {new} new ones, "
                f"got {list(attention_mask.shape)}; for another prompt call reset() first"
            )
        if new > 1 or not attention_mask.is_cuda:  # no step of decoding waits for a GPU
            assert self.state is not None  # the prefill made it
            check_same_padding(attention_mask[:, : self.state.prompt_length], self.start)

    def _begin_turn(self, seen: int, new: int, attention_mask: Tensor | None) -> None:
        """Begin a turn that may take up dropped tokens."""
        assert self.state is not None  # the prefill made it
        valid = None
        if attention_mask is not None:
            valid = attention_mask[:, self.state.prompt_length :].bool()
        padded = valid is not None and not valid.all()
        self.turn = self.state.turn(seen, new, valid if padded else None)

    def look_again(self, layer: int, query: Tensor, key: Tensor, **seen: Any) -> None:
        """Take in what a layer saw of a turn, up to the parked one.

        Args:
            layer, query, key, seen: as :meth:`PrefillState.observe` takes them.
        """
        turn = self.turn
        assert turn is not None and turn.parked is not None  # begin_forward made it
        if layer <= turn.parked:
            turn.observe(layer, query, key, **seen)

    def put_in_order(self, layer: int, taken: TakenUp) -> None:
        """Order the entries of a layer, of which those that were taken up came last."""
        assert self.state is not None  # the prefill made it
        held = self.layers[layer]
        device, start = held.keys.device, self.state.start
        held.keys, held.values = gather_kv(held.keys, held.values, taken.order().to(device))
        held.start = None if start is None else start.to(device)

    def observe(self, layer: int, query: Tensor, key: Tensor, **seen: Any) -> None:
        """Take in what a layer of the prompt saw, and keep what the method keeps of its entries.

        Args:
            layer, query, key, seen: as :meth:`PrefillState.observe` takes them.

        Raises:
            ValueError: the layer attends twice, or to other heads than it holds.
        """
        state, held, count = self.state, self.layers[layer], self._counted[layer]
        assert state is not None  # begin_forward made it
        if state.layer == count:
            raise ValueError(f"ClaaCache: a layer must attend once, got two calls in layer {layer}")
        state.observe(count, query, key, **seen)
        if not held.is_sliding:
            if held.keys.shape[1] != key.shape[1]:
                raise ValueError(
                    f"ClaaCache: attention must see the heads that the cache holds, got "
                    f"{key.shape[1]} and {held.keys.shape[1]} in layer {layer}, which makes the "
                    "one from the other (as latent attention does)"
                )
            held.keys, held.values = state.compress(count, held.keys, held.values)
            held.start = state.cache_start
            return
        state.release()
        if state.positions is not None:
            held.place(state.positions, state.start)

    def select(self, layer: int) -> Tensor | None:
        """The tokens of the prompt that continue after a layer, ``[B, k]``; None for all of them.

        Also after a layer without attention, if it is the one that the method's setting names.
        """
        count = self._selecting.get(layer)
        assert self.state is not None  # begin_forward made it
        index = None if count is None or layer in self.within else self.state.select(count)
        if index is not None and self.reduce is not None and not torch.compiler.is_compiling():
            self._check_agreement(index, self.reduce)
        return index

    def _check_agreement(self, index: Tensor, reduce: Reduce) -> None:
        """Raise unless all processes select the same tokens, in all of them alike."""
        highest, lowest = reduce(torch.stack([index, -index]), "max")
        if not torch.equal(highest, -lowest):
            raise ValueError(
                f"ClaaCache: {type(self.method).__name__} must select the same tokens in every "
                "process, by a ranking that layer.reduce has merged, got different ones"
            )

    def selects_within(self, layer: int) -> bool:
        """Whether :meth:`select` may be asked before this layer's attention.

        Not in one with a recurrence too, which hands its state on from all tokens, nor with a
        method that may come back to the hidden states behind the layer.
        """
        count = self._selecting.get(layer)
        if self.method.may_park:
            return False
        if count is None or count != self._counted.get(layer) or self.kinds[layer].states:
            return False
        assert self.state is not None  # begin_forward made it
        return self._method.selects_within(self.state, count)

    def key_share(self, layer: int) -> Budget | None:
        """Of its blocks of keys, the share that this layer attends to; None for all."""
        assert self.state is not None  # begin_forward made it
        return self._method.key_share(self.state, self._counted[layer])

    def end_forward(self) -> None:
        """Called by an attached model after its layers."""
        self.given.clear()
        self.selected.clear()
        self.hidden = self.look = self.turn = self.taken = None
        if self.prefilling and self.parked is not None:
            waits = self.state is not None and self.state.parked is not None
            self.parked = self.parked.after_prefill(self.layer_types) if waits else None
        self.in_forward = self.prefilling = False

    def begin_generate(self, request: Request) -> None:
        """Refuse chunks of a prompt, and a prompt that does not continue what was seen."""
        if request.setting("prefill_chunk_size") is not None:
            raise ValueError(
                "ClaaCache: prefill_chunk_size must be None, because the prompt must be one "
                f"forward, got {request.setting('prefill_chunk_size')}"
            )
        ids, mask, seen = request.input_ids, request.attention_mask, self.get_seq_length()
        if seen == 0 or ids is None:
            return
        if self.holds_beams:
            raise ValueError(
                "ClaaCache: a beam search must be the last turn, because the cache holds its beams "
                "and not its answer, got another one: call reset() first"
            )
        if mask is not None and mask.shape[1] != ids.shape[1]:
            return  # a turn without what came before it
        if ids.shape[1] <= seen or not self._has_seen(ids):
            raise ValueError(
                f"ClaaCache: input_ids must begin with the {seen} tokens that the cache has seen "
                f"and have more, got another prompt, of {ids.shape[1]}: call reset() first"
            )

    def _has_seen(self, ids: Tensor) -> bool:
        """Whether these ids may continue the tokens that were seen."""
        if self.tokens is None:
            return True
        known = self.tokens[:, : self.get_seq_length()]
        copies, rest = divmod(known.shape[0], ids.shape[0])  # several answers to each prompt
        begins = ids[:, : known.shape[1]].to(known.device).repeat_interleave(copies, dim=0)
        return rest == 0 and torch.equal(begins, known)

    def end_generate(self, request: Request, output: Any) -> None:
        """Remember the tokens, to recognise the next turn."""
        tokens = output if isinstance(output, Tensor) else output.sequences
        self.holds_beams = (request.setting("num_beams") or 1) > 1
        # Only the last new token was not fed.
        whole = tokens.shape[1] == self.get_seq_length() + 1
        self.tokens = tokens if whole and not self.holds_beams else None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of a layer; return all that its attention should see."""
        if self.look is not None and self.look.key is not None:  # they were appended then
            assert self.look.value is not None
            return self.look.key, self.look.value
        if layer_idx == self.attending[0] and self.in_forward:
            seen = self.get_seq_length() + key_states.shape[2]
            self._seen = self._seen.new_empty(seen, 0)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the model has seen, whether or not their entries are still held."""
        return self._seen.shape[0]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask for the layers of one type.

        A layer that dropped entries takes the last columns of the mask, one for each entry, and
        hides its own padding: see :func:`visible_columns`.
        """
        seen, layer = self.get_seq_length(), self.layers[layer_idx]
        held = layer.get_seq_length() if layer.is_sliding else seen
        return held + query_length, seen - held

    def reset(self) -> None:
        """Forget the request, to use the cache for another."""
        self.layers = _new_layers(self.kinds)
        self._clear()

    def forget(self, layers: Iterable[int]) -> None:
        """Drop the entries of these layers."""
        for layer in layers:
            (self.layers[layer],) = _new_layers(self.kinds[layer : layer + 1])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search."""
        super().reorder_cache(beam_idx)
        self._change_rows(lambda x: x[beam_idx.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        self._change_rows(lambda x: x[indices])

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tokens = None
        self.start = None if self.start is None else change(self.start)
        if self.parked is None:
            return
        self.parked = self.parked.change_rows(change)
        assert self.state is not None  # the prefill made it
        self.state.change_rows(change)

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


@dataclass
class Parked:
    """What layers after a selection need that run once more, or for more tokens.

    Attributes:
        hidden: ``[B, n, C]``, the hidden states behind a layer, of all tokens that it saw.
        calls: during the prefill, each layer after it that has run, and what the model gave it.
        of_tokens: afterwards, for each type of layer, its arguments with an entry for each token.
    """

    hidden: Tensor
    calls: dict[int, tuple[nn.Module, dict[str, Any]]] = field(default_factory=dict)
    of_tokens: dict[str, dict[str, Any]] = field(default_factory=dict)

    def after_prefill(self, layer_types: list[str]) -> Parked:
        """What a later turn needs of it."""
        kept = "position_embeddings", "position_ids"
        given = {layer_types[layer]: given for layer, (_, given) in self.calls.items()}
        return Parked(
            self.hidden,
            of_tokens={
                kind: {name: each[name] for name in kept if each.get(name) is not None}
                for kind, each in given.items()
            },
        )

    def tensors(self) -> list[Tensor]:
        """All that is held between forwards, each tensor once."""
        angles = [each["position_embeddings"] for each in self.of_tokens.values()]
        return [self.hidden, *{id(x): x for pair in angles for x in pair}.values()]

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> Parked:
        """The same with other rows of the batch."""

        def of_rows(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(of_rows, x))
            return change(x) if x.shape[0] == self.hidden.shape[0] else x  # one row serves all

        return Parked(
            change(self.hidden),
            of_tokens={
                kind: {name: of_rows(x) for name, x in each.items()}
                for kind, each in self.of_tokens.items()
            },
        )


def visible_columns(mask: Tensor, entries: int, start: Tensor | None) -> Tensor:
    """The mask of a layer's entries, for the tokens after them.

    Args:
        mask: ``[B, ..., n]``, of as many entries or more. Entries are in ascending order, so a
            layer that holds fewer takes the last columns.
        entries: how many the layer holds, new ones included.
        start: ``[B]``: the first entry of each row that is not padding; None without padding.
    """
    mask = mask[..., -entries:]
    return mask if start is None else hide_before(mask, start)


def hide_before(mask: Tensor, start: Tensor) -> Tensor:
    """The mask ``[B, ..., n]``, additive or boolean, with columns before ``start`` hidden."""
    first = start.view(-1, *[1] * (mask.dim() - 1))
    hidden = torch.arange(mask.shape[-1], device=mask.device) < first
    fill = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
    return torch.where(hidden, torch.full_like(mask[..., :1], fill), mask)


def _new_layers(kinds: Sequence[LayerKind]) -> list[Any]:
    """A layer of each kind, empty."""
    layers: list[Any] = []
    for layer, kind in enumerate(kinds):
        if kind.name == "sliding_attention" and kind.window is not None:
            layers.append(SlidingLayer(kind.window))
        elif kind.name == "full_attention":
            layers.append(FullLayer())
        elif kind.name == "hybrid":
            layers.append(HybridLayer(kind.states))
        elif kind.states or kind.name in WITH_NOTHING:
            layers.append(StateLayer(kind.states))
        else:
            raise ValueError(
                "ClaaCache: layers must attend in full or in sliding windows, or hand on states, "
                f"got {kind.name} for layer {layer}"
            )
    return layers


class FullLayer(DynamicLayer):
    """All entries. Those of the prompt are held without a copy, unlike in transformers' layer.

    ``start``, ``[B]``, is the first entry of each row that is not padding; None without padding.
    """

    of_rows: tuple[str, ...] = ("start",)  # attributes with an entry for each row of the batch
    start: Tensor | None = None

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

    def tensors(self) -> list[Tensor]:
        """Keys and values, once there are any."""
        return [x for x in (self.keys, self.values) if x is not None]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search."""
        super().reorder_cache(beam_idx)
        self._each_row(lambda x: x[beam_idx.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        self._each_row(lambda x: x[indices])

    def columns(self, mask: Tensor, new: int) -> Tensor:
        """The mask of the layer's entries and of ``new`` tokens, see :func:`visible_columns`."""
        return visible_columns(mask, self.get_seq_length() + new, self.start)

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in self.of_rows:
            if (value := getattr(self, name)) is not None:
                setattr(self, name, change(value))


class StateLayer(LinearAttentionLayer):
    """The states of a layer without attention, of all tokens that it saw; there may be none."""

    is_sliding = False
    keys = values = None

    def get_seq_length(self) -> int:
        """None of them has an entry of its own."""
        return 0

    def tensors(self) -> list[Tensor]:
        """The states, once there are any."""
        held = (*self.conv_states.values(), *self.recurrent_states.values())
        return [state for state in held if state is not None]

    def take(self, other: StateLayer) -> None:
        """Hold copies of the states of another layer."""
        for index, state in other.conv_states.items():
            if state is not None:
                self.update_conv_state(state, index)
        for index, state in other.recurrent_states.items():
            if state is not None:
                self.update_recurrent_state(state, index)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search."""
        self._each_state(lambda x: x[beam_idx.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._each_state(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._each_state(lambda x: x[indices])

    def _each_state(self, change: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for name, state in states.items():
                if state is not None:
                    states[name] = change(state)


class HybridLayer(StateLayer, FullLayer):  # type: ignore[misc, override]  # as in transformers
    """All entries of the attention in a layer, and the states beside it."""

    is_compileable = False

    def __init__(self, number_of_states: int) -> None:
        FullLayer.__init__(self)
        StateLayer.__init__(self, number_of_states)

    def lazy_initialization(  # type: ignore[override]
        self, *entries: Tensor, **states: Any
    ) -> None:
        """Of the entries, keys and values; or of one of the states, by its name."""
        if entries:
            FullLayer.lazy_initialization(self, *entries)
        else:
            StateLayer.lazy_initialization(self, **states)

    def get_seq_length(self) -> int:
        """How many entries."""
        return FullLayer.get_seq_length(self)

    def get_max_length(self) -> int:
        """No maximum."""
        return FullLayer.get_max_length(self)

    def tensors(self) -> list[Tensor]:
        """Keys, values and states, once there are any."""
        return FullLayer.tensors(self) + StateLayer.tensors(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search."""
        FullLayer.reorder_cache(self, beam_idx)
        StateLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        FullLayer.batch_repeat_interleave(self, repeats)
        StateLayer.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        FullLayer.batch_select_indices(self, indices)
        StateLayer.batch_select_indices(self, indices)


def _owned(x: Tensor) -> Tensor:
    """``[B, G, n, D]`` as it is; a copy where it is a slice, which would keep the rest alive."""
    fills_its_memory = x.is_contiguous() or x.transpose(1, 2).is_contiguous()
    return x if fills_its_memory else x.contiguous()


class SlidingLayer(FullLayer):
    """The last ``sliding_window - 1`` entries, all that the next token can see.

    After a selection the entries are not neighbours, but their positions ascend, so no more
    than these can lie in the window of the next token. ``positions``, ``[B, entries]``, are those
    in the prompt; None in a layer that saw the whole prompt.
    """

    is_sliding = True
    of_rows = ("start", "positions")

    def __init__(self, sliding_window: int) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.positions: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append entries; return all of them, and keep the last."""
        key, value = super().update(key_states, value_states, *args, **kwargs)
        # Copies: views would keep the whole prompt's keys alive, and torch.compile would compile
        # anew whenever their strides change.
        self.keys = key[:, :, 1 - self.sliding_window :].clone()
        self.values = value[:, :, 1 - self.sliding_window :].clone()
        return key, value

    def place(self, positions: Tensor, start: Tensor | None) -> None:
        """Note the positions of the selected tokens; that of padding is outside every window."""
        if start is not None:
            padding = torch.arange(positions.shape[1], device=start.device) < start[:, None]
            positions = positions.masked_fill(padding, -self.sliding_window)
        self.positions = positions[:, 1 - self.sliding_window :].clone()

    def visible(self, new: Tensor) -> Tensor:
        """Append the positions of new tokens, ``[q]``; return what they see, ``[B, q, k]``."""
        assert self.positions is not None
        held = torch.cat([self.positions, new.expand(self.positions.shape[0], -1)], dim=1)
        self.positions = held[:, 1 - self.sliding_window :].clone()
        distance = new[:, None] - held[:, None]
        return (distance >= 0) & (distance < self.sliding_window)
