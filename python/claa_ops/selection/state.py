"""The functional API: the state of one prefill, and the calls of a model's layer loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from claa_ops.ops.gather_kv import gather_kv
from claa_ops.selection.budget import Sizes
from claa_ops.selection.layer import Layer
from claa_ops.selection.method import Method
from claa_ops.selection.padding import gather_kept, places_in_prompt
from claa_ops.selection.parallel import Reduce
from claa_ops.selection.protection import Protection, check_protect
from claa_ops.selection.taken import TakenUp

_CALLS = ("observe", "compress", "take_up", "select")


def begin(
    method: Method,
    *,
    num_layers: int,
    prompt_length: int,
    start: Tensor | None = None,
    ranking: Tensor | None = None,
    protect: Tensor | None = None,
    keep_scores: bool = False,
    first_pass: bool = False,
    reduce: Reduce | None = None,
) -> PrefillState:
    """Start the prefill of one batch of prompts.

    In the layer loop, after the attention of each layer::

        state.observe(layer, query, key)
        key, value = state.compress(layer, key, value)   # for the decode cache

    and after the whole layer::

        index = state.select(layer)
        if index is not None:
            hidden = claa_ops.gather_tokens(hidden, index)   # and cos, sin, position ids

    All three may come before the attention, for they need its queries and keys alone. Then only
    the tokens at ``index`` need its output, over all keys that precede them, and only they go
    through the rest of the layer.

    With a method that goes back, such as :class:`claa_ops.methods.Coarse`, or looks a second time
    in a later turn, the hidden states behind one layer are parked. Between these two::

        if state.parked == layer:
            parked = hidden
        if state.layer < layer:       # back behind that layer, whose tokens are selected anew
            layer, hidden = state.layer, parked

    A method may also ask, before ``select``, for parked tokens to join:
    :meth:`PrefillState.take_up`.

    Args:
        method: such as :class:`claa_ops.methods.CLAA`.
        num_layers: how many layers the model has; of a hybrid one, how many have attention, which
            alone are observed and counted.
        prompt_length: N, the length of the (padded) prompts.
        start: ``[B]``, int64 or int32: the first token of each row that is not left padding.
        ranking: ``[B, N]``, float32: what :meth:`Method.prepare` returned for the prompt, for
            methods that need it.
        protect: ``[B, N]``, bool: tokens that are never dropped, by no layer and no cache, such as
            a system prompt. Budgets are then of the others: a rate of 0.1 keeps these and a tenth
            of the rest. The host reads how many each selection keeps. In rows that keep different
            numbers the first ones are padding, as in a padded batch.
        keep_scores: record ``state.scores`` for plots, for which every layer is scored that the
            method ranks by.
        first_pass: this is the first pass of a method that prefills twice: it ends with the
            selection and keeps nothing in its caches.
        reduce: for a model whose heads are on several devices: ``reduce(scores, how)`` returns the
            maximum or the sum (``how`` is ``"max"`` or ``"sum"``) of the scores of all devices, the
            same on each. Then each device observes its own heads, and all select the same tokens.

    Under ``torch.export`` make the length of the prompt ``torch.export.Dim.AUTO``: what is kept
    depends on comparisons with it, such as ``n > max(window, n // 10)``, which become conditions
    of the program. A named ``Dim`` asks export to prove them for its whole range, which it cannot
    do for all of them: it needs ``prefer_deferred_runtime_asserts_over_guards=True`` and a minimum.

    Returns:
        The state of this prefill. It belongs to this request alone; drop it when the prefill is
        over, or keep it to read what was selected.

    Raises:
        TypeError: ``method`` is not a :class:`Method`, or another argument has the wrong type.
        ValueError: ``prompt_length`` is below 1, the method does not fit the model, prefills
            twice, or needs a ranking and got none; or ``start``, ``ranking`` or ``protect`` has the
            wrong shape or dtype.

    Example:
        >>> from claa_ops.methods import CLAA
        >>> state = begin(CLAA(keep=0.1), num_layers=32, prompt_length=4096)
    """
    check_method("begin", method, first_pass)
    check_count("begin", "prompt_length", prompt_length)
    check_count("begin", "num_layers", num_layers)
    method.check(num_layers)
    for name, value in (("start", start), ("ranking", ranking)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"begin: {name} must be a tensor, got {type(value).__name__}")
    if start is not None and start.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"begin: start must be int64 or int32, got {start.dtype}")
    if start is not None and start.dim() != 1:
        raise ValueError(f"begin: start must have shape [batch], got {list(start.shape)}")
    if ranking is not None and (ranking.dim() != 2 or ranking.shape[1] != prompt_length):
        raise ValueError(
            f"begin: ranking must have shape [batch, {prompt_length}], got {list(ranking.shape)}"
        )
    if ranking is not None and ranking.dtype != torch.float32:
        raise ValueError(f"begin: ranking must be float32, got {ranking.dtype}")
    check_protect("begin", protect, prompt_length)
    if method.needs_ranking and ranking is None:
        raise ValueError(
            f"begin: {type(method).__name__} needs a ranking of the prompt, which "
            "claa_ops.prefill.generate and .prefill prepare, got none"
        )
    state = PrefillState(
        method, num_layers, prompt_length, start, ranking, protect, keep_scores, reduce
    )
    method.begin(state)
    return state


def check_count(caller: str, name: str, value: Any) -> None:
    """Raise unless the value is an integer, Python's or numpy's, of at least 1."""
    if not isinstance(value, (Integral, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{caller}: {name} must be at least 1, got {value}")


def check_method(caller: str, method: Method, first_pass: bool) -> None:
    """Raise if it is not a method, or if it prefills twice and this is not its first pass."""
    if not isinstance(method, Method):
        raise TypeError(
            f"{caller}: method must be a claa_ops.methods.Method, such as CLAA(), got {method!r}"
        )
    if method.two_pass and not first_pass:
        raise ValueError(
            f"{caller}: the method must prefill once, got {type(method).__name__}, which prefills "
            "twice: call claa_ops.prefill.generate(model, input_ids, method) or .prefill instead"
        )


class PrefillState:
    """What one prefill has seen and selected so far; made by :func:`begin`.

    Attributes:
        method: the method.
        num_layers: how many layers the model has.
        prompt_length: N, the length of the prompts, padding included.
        layer: the layer that was observed last, -1 before the first.
        length: n, how many tokens the current layer sees: N until some are selected.
        start: ``[B]`` or None: the first of these n that is not left padding.
        positions: ``[B, n]``, int64, ascending: the places of these n in the prompt, -1 for
            padding that has none; None while they are the whole prompt.
        ranking: ``[B, N]``, float32: the ranking with which the prefill began, or None.
        protect: ``[B, N]``, bool: the tokens that are never dropped; None if there are none.
        row_lengths: ``[B]``, int64: how many tokens each prompt has; None while all rows are alike.
        importance: ``[B, M]``, float32: the method's ranking so far; None before there is one. The
            next layer may update it in place. After a selection it still ranks the tokens that
            were selected from.
        running: ``importance`` if it ranks the tokens that the current layer sees, else None.
        parked: the layer behind which the caller holds the hidden states of all tokens that it
            saw, because the method may come back to them; None if there is none.
        seen_when_parked: ``length``, ``start`` and ``positions`` of that layer.
        ahead: of each pass that ran ahead and was given up, its first layer, and how many tokens
            each of its layers saw.
        reduce: what merges the scores of heads on several devices; None if all heads are here.
        notes: whatever else the method has to remember.
        lengths: for each observed layer, how many tokens it saw.
        cache_start: ``[B]`` or None: the first entry of what :meth:`compress` returned last that
            is not padding.
        scores: with ``keep_scores``, for each layer its token scores, ``[B, M]``: the maximum
            over key/value heads.
    """

    def __init__(
        self,
        method: Method,
        num_layers: int,
        prompt_length: int,
        start: Tensor | None,
        ranking: Tensor | None,
        protect: Tensor | None,
        keep_scores: bool,
        reduce: Reduce | None = None,
    ) -> None:
        self.method = method
        self.num_layers = num_layers
        self.prompt_length = prompt_length
        self.length = prompt_length
        self.start = start
        self.cache_start: Tensor | None = None
        self.row_lengths = None if start is None else prompt_length - start.long()
        self.positions: Tensor | None = None
        self.ranking = ranking
        self.protect = protect
        self.reduce = reduce
        self.importance: Tensor | None = None
        self.running: Tensor | None = None
        self.notes: dict[str, Any] = {}
        self.lengths: list[int] = []
        self.parked: int | None = None
        self.ahead: list[tuple[int, list[int]]] = []
        self.seen_when_parked: tuple[int, Tensor | None, Tensor | None] = prompt_length, start, None
        self.scores: dict[int, Tensor] = {}
        self._keep_scores = keep_scores
        self._observed: Layer | None = None
        self._device: torch.device | None = None
        self.layer, self._call = -1, "select"

    @property
    def sizes(self) -> Sizes[int]:
        """How many tokens the prompt has and the current layer sees, padding included."""
        return Sizes(self.prompt_length, self.length, self.num_layers)

    @property
    def row_sizes(self) -> Sizes[Tensor] | None:
        """The same for each row, ``[B]``, without padding; None if no row has any."""
        if self.start is None or self.row_lengths is None:
            return None
        return Sizes(self.row_lengths, self.length - self.start, self.num_layers)

    @property
    def protected(self) -> Tensor | None:
        """``[B, n]``, bool: which of the tokens that the current layer sees are never dropped."""
        protect = self.protect
        if protect is not None and self.positions is not None:
            protect = gather_kept(protect, self.positions)
        if protect is None or self.start is None:
            return protect
        return protect & (torch.arange(self.length, device=protect.device) >= self.start[:, None])

    def protection(self, context: int, num_sinks: int) -> Protection | None:
        """What is never dropped of the first ``context`` tokens that the current layer sees.

        Of a prompt that has any, the ``num_sinks`` first tokens are among them.
        """
        protected = self.protected
        if protected is None:
            return None
        place = places_in_prompt(context, self.start, protected.device)
        sinks = (place >= 0) & (place < num_sinks) & protected.any(dim=1, keepdim=True)
        tokens = protected[:, :context] | sinks
        return Protection(tokens, tokens.sum(dim=1))

    def update_ranking(self, ranking: Tensor) -> None:
        """Called by the method: its ranking ``[B, M]`` after the current layer."""
        # Not a property's setter, which torch 2.11 leaves out of a compiled graph.
        self.importance = self.running = ranking

    @property
    def rows(self) -> int:
        """W: how many of the last query rows the method reads."""
        return self.method.rows(self)

    @property
    def observed(self) -> Layer:
        """What the current layer saw, from :meth:`observe` to the end of :meth:`compress`."""
        if self._observed is None:
            raise RuntimeError(
                f"observed: must be read between observe and compress, got layer {self.layer} after"
            )
        return self._observed

    def observe(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        *,
        value: Tensor | None = None,
        hidden: Tensor | None = None,
        lse: Tensor | None = None,
        scale: float | None = None,
        sliding_window: int = 0,
        softcap: float = 0.0,
        sink_logits: Tensor | None = None,
    ) -> None:
        """Show the method what a layer saw, of which it computes what it needs.

        Args:
            layer: the layer, from 0; layers come in ascending order.
            query: ``[B, H, n, D]``, after the rotary embedding. Only the last rows are read,
                ``method.rows(state)`` of them, and it may hold just these.
            key: ``[B, G, n, D]``, likewise.
            value: ``[B, G, n, Dv]``, for methods that read it; none of ours does.
            hidden: ``[B, n, C]``, the layer's input, likewise.
            lse: ``[B, H, n]`` or its last rows, float32: the attention's logsumexp.
            scale, sliding_window, softcap, sink_logits: those of the layer's attention, as in
                :func:`claa_ops.score_window`.

        Raises:
            RuntimeError: layers do not ascend.
            ValueError: the layer is out of range, ``key`` does not have n rows, or ``query`` has
                fewer than the method reads.
        """
        self._follow(key.device)
        self.see(
            Layer(
                self,
                layer,
                query,
                key,
                value=value,
                hidden=hidden,
                lse=lse,
                scale=scale,
                sliding_window=sliding_window,
                softcap=softcap,
                sink_logits=sink_logits,
            )
        )

    def see(self, layer: Layer) -> None:
        """Like :meth:`observe`, with a view of the layer that the caller has made."""
        self._advance(layer.index, "observe")
        for name, given in (("ranking", self.ranking), ("protect", self.protect)):
            if given is not None and given.shape[0] != layer.key.shape[0]:
                raise ValueError(
                    f"observe: {name} must be of the {layer.key.shape[0]} prompts of the batch, "
                    f"got one of {given.shape[0]}"
                )
        if layer.key.shape[2] != self.length:
            raise ValueError(
                f"observe: key of layer {layer.index} must have the {self.length} tokens that the "
                f"layer sees, got {layer.key.shape[2]}"
            )
        self.lengths.append(self.length)
        self._observed = layer
        self.method.observe(self, layer)
        if self._keep_scores and self.method.ranks(self, layer.index):
            self.scores[layer.index] = layer.reduce(layer.scores.amax(dim=1), "max")

    def release(self) -> None:
        """Drop what the layer saw, if :meth:`compress` is not called; select may follow."""
        self._observed = None

    def compress(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What the decode cache of an observed layer keeps.

        Args:
            layer: the layer that was observed last.
            key: ``[B, G, n, D]``.
            value: ``[B, G, n, Dv]``.

        Returns:
            The kept rows, ``[B, G, k, D]`` and ``[B, G, k, Dv]``; the arguments themselves if
            the layer keeps all. Heads may keep different tokens, each in ascending order. In a
            padded batch, entries before ``cache_start`` are padding.

        Raises:
            RuntimeError: the layer was not observed just before.
        """
        self._advance(layer, "compress")
        if self.method.two_pass:  # its first pass only chooses tokens
            self.release()
            return key[:, :, :0].clone(), value[:, :, :0].clone()
        index = self.method.compress(self, self.observed)
        self.release()
        self.cache_start = self._padding(index)
        return (key, value) if index is None else gather_kv(key, value, index)

    def select(self, layer: int) -> Tensor | None:
        """Which tokens continue to the layers after an observed layer.

        Returns:
            ``[B, k]``, int64, ascending, into the n tokens of this layer, or of the parked one if
            ``state.layer`` says that the method went back to it; None if all continue. The caller
            gathers hidden states, position embeddings and ids with
            :func:`claa_ops.gather_tokens`, which gives zeros where the index is -1, in rows that
            keep fewer tokens than others. Attention must not see anything before the new
            ``start``.

        Raises:
            RuntimeError: the layer was not observed just before, or selects a second time.
        """
        self._advance(layer, "select")
        self.release()
        index = self.method.select(self, layer)
        if index is not None and self.layer == layer:
            parks = self.method.may_park and self.method.parks(self, layer)
            self.parked = layer if parks else None
            self.seen_when_parked = self.length, self.start, self.positions
        return self._keep(index)

    def take_up(self, layer: int) -> TakenUp | None:
        """Which of the parked tokens, that were dropped, join those of an observed layer.

        Asked before :meth:`select`. The caller gathers their hidden states, takes them through the
        layers after the parked one up to this one, and puts them among those that are there::

            taken = state.take_up(layer)
            if taken is not None:
                joining = gather_tokens(parked, taken.among_parked)
                ...     # in each of the layers, attend to what taken.visible() says, and then
                key, value = gather_kv(key, value, taken.order())   # all entries of the layer
                hidden = gather_tokens(torch.cat([hidden, joining], dim=1), taken.order())

        From then on they are tokens that the layer saw.

        Returns:
            None if there are none.

        Raises:
            RuntimeError: the layer was not observed just before, or is asked a second time.
        """
        self._advance(layer, "take_up")
        self.release()
        if self.parked is None or self.parked >= layer:
            return None
        index = self.method.take_up(self, layer)
        if index is None:
            return None
        taken = self._taken(index, self.prompt_length, 0)
        again = range(self.parked + 1, layer + 1)
        for each in again:
            self.lengths[each] += index.shape[1]
        self.running = None
        self.hold(taken.all_held())
        return taken

    def missing(self) -> Tensor:
        """``[B, N]``, bool: the tokens of the prompt that were parked and are not held now."""
        parked, held = self.among_prompt(self.seen_when_parked[2]), self.among_prompt(self.held)
        start = self.seen_when_parked[1]
        if start is not None and self.seen_when_parked[2] is None:
            parked = parked & (torch.arange(parked.shape[1], device=held.device) >= start[:, None])
        return parked & ~held

    @property
    def held(self) -> Tensor:
        """``[B, k]``: the tokens of the prompt that the layers after the parked one hold."""
        assert self.positions is not None  # something was dropped, or nothing would be parked
        return self.positions

    def among_prompt(self, positions: Tensor | None) -> Tensor:
        """``[B, N]``, bool: which tokens of the prompt these are; all, padding too, if None."""
        batch, beyond = self.held.shape[0], 1 + self.prompt_length  # padding goes before them
        among = torch.zeros(batch, beyond, dtype=torch.bool, device=self.held.device)
        if positions is None:
            return ~among[:, 1:]
        return among.scatter(1, 1 + positions, True)[:, 1:]

    def _taken(self, index: Tensor, seen: int, new: int, valid: Tensor | None = None) -> TakenUp:
        """What it takes for tokens at ``[B, r]`` of the prompt to join."""
        among, parked = index, self.seen_when_parked[2]
        if parked is not None:
            among = torch.searchsorted(parked.contiguous(), index).masked_fill(index < 0, -1)
        return TakenUp(index, among, self.held, self.prompt_length, seen, new, valid)

    def go_back(self) -> None:
        """Called by the method in ``select``: the layers after the parked one run anew.

        What ``select`` then returns is an index into the tokens which the parked layer saw, and
        the caches of the layers after it are filled anew. These are no longer parked, unless a
        later ``select`` parks again.

        Raises:
            RuntimeError: no layer before this one is parked.
        """
        if self.parked is None or self.parked >= self.layer:
            raise RuntimeError(
                f"go_back: a layer before {self.layer} must be parked, got {self.parked}"
            )
        self.layer, self.parked = self.parked, None
        self.length, self.start, self.positions = self.seen_when_parked
        self.ahead.append((self.layer + 1, self.lengths[self.layer + 1 :]))
        del self.lengths[self.layer + 1 :]

    def turn(self, seen: int, new: int, valid: Tensor | None = None) -> Turn | None:
        """A later turn of the conversation, which may take up tokens that the prefill dropped.

        Args:
            seen: how many tokens the caches have seen, prompt and padding included.
            new: how many tokens the turn has, padding included.
            valid: ``[B, seen - N + new]``, bool: which tokens after the prompt are no padding; None
                if none is. Rows then rank by themselves, and the host reads which these are.

        Returns:
            Its state; None if nothing is parked, so that a turn is like any other forward.
        """
        return None if self.parked is None else Turn(self, seen, new, valid)

    def row(self, row: int) -> PrefillState:
        """The state after the prefill of one prompt of the batch, as if it had been alone."""
        alone = copy.copy(self)
        padding = 0
        if self.row_lengths is not None:
            padding = self.prompt_length - int(self.row_lengths[row])

        def own(positions: Tensor | None) -> Tensor | None:
            if positions is None:
                return None
            return (positions[row][positions[row] >= 0] - padding)[None]

        alone.prompt_length -= padding
        alone.start = alone.row_lengths = alone.protect = None  # what was protected is held
        alone.positions = own(self.positions)
        parked = own(self.seen_when_parked[2])
        tokens = alone.prompt_length if parked is None else parked.shape[1]
        alone.seen_when_parked = tokens, None, parked
        return alone

    def hold(self, positions: Tensor) -> None:
        """Note the tokens ``[B, k]`` that the layers after the parked one hold by now."""
        if self.start is not None:
            self.start = (positions < 0).sum(dim=1)
        self.positions, self.length = positions, positions.shape[1]

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Between forwards: the batch has other rows from now on, as in a beam search."""
        length, start, positions = self.seen_when_parked
        tensors = start, positions, self.start, self.positions, self.row_lengths
        changed = [None if x is None else change(x) for x in tensors]
        self.seen_when_parked = length, changed[0], changed[1]
        self.start, self.positions, self.row_lengths = changed[2:]

    @property
    def between_layers(self) -> bool:
        """Whether the last call was ``select``, so that the next layer may be observed."""
        return self._call == "select"

    def choose(self) -> Tensor | None:
        """Before any layer: the tokens of a second pass, ``[B, k]``, if they are already known."""
        return self._keep(self.method.choose(self))

    def _keep(self, index: Tensor | None) -> Tensor | None:
        """Continue with the tokens at ``index`` of the current ones."""
        if index is None:
            return None
        self.running = None
        self.start = self._padding(index)
        if self.start is not None and self.row_lengths is None:
            self.row_lengths = torch.full_like(self.start, self.prompt_length)
        if self.positions is None:
            self.positions = index
        elif self.start is None:
            self.positions = self.positions.gather(1, index)
        else:
            positions = self.positions.gather(1, index.clamp_min(0))
            self.positions = torch.where(index < 0, index, positions)
        self.length = index.shape[-1]
        return index

    @property
    def differs_by_row(self) -> bool:
        """Whether more may be kept of one prompt than of another of the same length."""
        if self.protect is None or self.method.differs_by_row:
            return self.method.differs_by_row
        return not bool((self.protect == self.protect[:1]).all())

    def _padding(self, index: Tensor | None) -> Tensor | None:
        """``[B]``: how many tokens at ``[B, k]`` or ``[B, G, k]``, the first, are padding."""
        start = self.start
        if index is None:
            return start
        if start is None and index.shape[0] > 1 and self.differs_by_row:
            start = index.new_zeros(index.shape[0])
        if start is None:
            return None
        head = index if index.dim() == 2 else index[:, 0]  # all heads keep the same number
        return (head < start[:, None]).sum(dim=1)

    def _follow(self, device: torch.device) -> None:
        """Move what the state holds to the device of the next layer, where it is another one."""
        before, self._device = self._device, device
        if before in (None, device):
            return

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        for name in ("start", "row_lengths", "positions", "ranking", "protect", "importance"):
            setattr(self, name, moved(getattr(self, name)))
        length, start, positions = self.seen_when_parked
        self.seen_when_parked = length, moved(start), moved(positions)
        self.running = None if self.running is None else self.importance
        self.notes = {name: moved(value) for name, value in self.notes.items()}

    def _advance(self, layer: int, call: str) -> None:
        """Check that calls come in order: layers ascend; observe, then compress, then select."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"{call}: layer must be in [0, {self.num_layers - 1}], got {layer}")
        if call == "observe":
            in_order = layer > self.layer
        else:
            in_order = layer == self.layer and _CALLS.index(call) > _CALLS.index(self._call)
        if not in_order:
            expected = "after lower layers" if call == "observe" else "once, after its observe"
            raise RuntimeError(
                f"{call}: must be called for layer {layer} {expected}; "
                f"the last call was {self._call} for layer {self.layer}"
            )
        self.layer, self._call = layer, call


class Turn(PrefillState):
    """What a later turn of a conversation has seen, which may take up dropped tokens of the prompt.

    Made by :meth:`PrefillState.turn`. The layers up to the parked one hold all tokens, and the
    turn's last tokens rank those of the prompt there. In the layer loop of the turn, of these::

        turn.observe(layer, query, key)     # after its attention, of the turn's queries to all keys

    Behind the parked layer::

        taken = turn.take_up(layer)
        if taken is not None:
            joining = gather_tokens(parked, taken.among_parked)
            hidden = torch.cat([joining, hidden], dim=1)    # and cos, sin

    In the layers after it, these tokens attend to what ``taken.visible()`` says, and afterwards
    the cache has to hold its entries in the order of their positions::

        key, value = gather_kv(key, value, taken.order())

    Attributes:
        turn_length: how many tokens the turn has.
        taken: what :meth:`take_up` returned.

    The other attributes are those of :class:`PrefillState`, for the layers up to the parked one.
    """

    def __init__(
        self, prefill: PrefillState, seen: int, new: int, valid: Tensor | None = None
    ) -> None:
        vars(self).update(vars(prefill))
        _, self.start, self.positions = prefill.seen_when_parked
        self.turn_length, self.length = new, seen + new
        self.protect = None  # what was protected is held
        self.taken: TakenUp | None = None
        self.importance = self.running = None
        self.notes, self.lengths, self.scores, self.ahead = {}, [], {}, []
        self.layer, self._call = -1, "select"
        self._prefill, self._valid = prefill, valid
        # With padding after the prompt each row ranks by itself.
        self._alone = [] if valid is None else [self._row(row) for row in range(len(valid))]

    def _row(self, row: int) -> Turn:
        assert self._valid is not None  # there is padding
        valid = self._valid[row]
        alone, new = self._prefill.row(row), int(valid[-self.turn_length :].sum())
        return Turn(alone, alone.prompt_length + int(valid.sum()) - new, new)

    def see(self, layer: Layer) -> None:
        """Like :meth:`observe`, with a view of the layer that the caller has made."""
        if self._valid is None:
            super().see(layer)
            return
        self._advance(layer.index, "observe")
        for row, alone in enumerate(self._alone):
            own = torch.cat([self._of_prompt(row), self._valid[row]])
            alone.see(layer.of_row(alone, row, own))

    def _of_prompt(self, row: int) -> Tensor:
        """``[N]``, bool: which tokens are no padding."""
        assert self._valid is not None  # there is padding
        place = torch.arange(self.prompt_length, device=self._valid.device)
        return place >= (0 if self.start is None else self.start[row])

    @property
    def rows(self) -> int:
        """W: how many of the last query rows rank; all of a turn that has fewer."""
        return min(super().rows, self.turn_length)

    @property
    def held(self) -> Tensor:
        """``[B, k]``: the tokens of the prompt that the layers after the parked one hold."""
        return self._prefill.held.to(self._device)

    def _follow(self, device: torch.device) -> None:
        super()._follow(device)
        self._valid = None if self._valid is None else self._valid.to(device)
        for alone in self._alone:
            alone._follow(device)

    def take_up(self, layer: int) -> TakenUp | None:
        """Which tokens of the prompt continue with the turn's behind the parked layer.

        From then on the state of the prefill counts them among those that later layers hold.

        Returns:
            None if there are none.

        Raises:
            RuntimeError: the layer was not observed just before, or is asked a second time.
        """
        self._advance(layer, "take_up")
        self.release()
        if layer != self.parked:
            return None
        index = self._of_rows(layer) if self._alone else self.method.take_up(self, layer)
        if index is not None:
            self.taken = self._taken(index, self.length, self.turn_length, self._valid)
            self._prefill.hold(self.taken.all_held())
        return self.taken

    def _of_rows(self, layer: int) -> Tensor | None:
        """``[B, r]``: what each row takes up by itself; a turn of one token takes up nothing."""
        none = self.held[0, :0]
        rows = []
        for alone in self._alone:
            taken = alone.take_up(layer) if alone.turn_length > 1 else None
            padding = self.prompt_length - alone.prompt_length
            rows.append(none if taken is None else taken.index[0] + padding)
        most = max(map(len, rows))
        filled = [torch.nn.functional.pad(row, (most - len(row), 0), value=-1) for row in rows]
        return torch.stack(filled) if most > 0 else None
