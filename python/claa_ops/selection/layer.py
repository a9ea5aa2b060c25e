"""What one layer of a prefill saw, for methods to rank tokens by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from claa_ops.ops.aggregate_scores import aggregate_scores
from claa_ops.ops.score_layer import score_layer
from claa_ops.ops.score_tokens import score_tokens

if TYPE_CHECKING:
    from claa_ops.selection.state import PrefillState


class Layer:
    """A lazy view of one layer, made by :meth:`PrefillState.observe`: it computes what is read.

    An engine that stores its keys in another form, in pages or packed, can hand a subclass of
    this to ``PrefillState.see``.

    Args:
        state: the prefill.
        index: the layer, from 0.
        query: ``[B, H, n, D]`` or its last rows, after the rotary embedding.
        key: ``[B, G, n, D]``, likewise.
        value: ``[B, G, n, Dv]``, if the caller passes it.
        hidden: ``[B, n, C]``, the layer's input, if the caller passes it.
        lse: ``[B, H, n]`` or its last rows, float32: the attention's logsumexp, if known.
        scale, sliding_window, softcap, sink_logits: of the layer's attention, as
            :func:`claa_ops.score_window` takes them.

    Attributes:
        state: the prefill.
        index: the layer, from 0.
        start: ``[B]`` or None: the first of the n tokens of each row that is not padding.
        attention: ``scale``, ``sliding_window``, ``softcap`` and ``sink_logits`` by their names.
    """

    def __init__(
        self,
        state: PrefillState,
        index: int,
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
        self.state = state
        self.index = index
        self.start = state.start
        self.attention: dict[str, Any] = {
            "scale": scale,
            "sliding_window": sliding_window,
            "softcap": softcap,
            "sink_logits": None if sink_logits is None else sink_logits.detach(),
        }
        self._key = key.detach()  # a ranking has no gradient, even if its inputs do
        self._query, self._value, self._hidden, self._lse = query, value, hidden, lse
        self._window_scores: Tensor | None = None
        self._scores: Tensor | None = None

    def of_row(self, state: PrefillState, row: int, tokens: Tensor) -> Layer:
        """What the layer saw of some ``tokens``, ``[n]``, bool, of one row of the batch.

        Without hidden states and logsumexp.
        """
        key, query, value = self._key[row, :, tokens], self._query[row], self._value
        return Layer(
            state,
            self.index,
            query[:, tokens[-query.shape[1] :]][None],
            key[None],
            value=None if value is None else value[row, :, tokens][None],
            **self.attention,
        )

    @property
    def rows(self) -> int:
        """W: how many of the last query rows the method reads."""
        return self.state.rows

    @property
    def context(self) -> int:
        """M: how many tokens come before the last W; 0 if there are none."""
        return max(0, self.key.shape[2] - self.rows)

    @property
    def key(self) -> Tensor:
        """``[B, G, n, D]``."""
        return self._key

    @property
    def query(self) -> Tensor:
        """``[B, H, W, D]``: the last W query rows; fewer if the layer sees fewer tokens."""
        rows = self.rows
        if self._query.shape[2] < min(rows, self.key.shape[2]):
            raise ValueError(
                f"observe: query of layer {self.index} must have the last {rows} rows, which "
                f"{type(self.state.method).__name__} reads, got {self._query.shape[2]}"
            )
        return self._query[:, :, -rows:].detach()

    @property
    def lse(self) -> Tensor | None:
        """``[B, H, W]``, float32: the logsumexp of the last W query rows; None if unknown."""
        return None if self._lse is None else self._lse[:, :, -self.rows :].detach()

    @property
    def value(self) -> Tensor:
        """``[B, G, n, Dv]``."""
        return self._shown("value", self._value)

    @property
    def hidden(self) -> Tensor:
        """``[B, n, C]``: the layer's input, for methods with ``reads_hidden``."""
        return self._shown("hidden", self._hidden)

    def _shown(self, name: str, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            raise RuntimeError(
                f"{type(self.state.method).__name__}: {name} of layer {self.index} must be passed "
                f"to observe, got none"
            )
        return tensor.detach()

    @property
    def scores(self) -> Tensor:
        """``[B, G, M]``, float32: the method's scores of this layer, computed once."""
        if self._scores is None:
            self._scores = self.state.method.score(self)
        return self._scores

    @property
    def window_scores(self) -> Tensor:
        """``[B, G, M]``, float32: :func:`claa_ops.score_tokens`, computed once."""
        if self._window_scores is None:
            self._window_scores = score_tokens(self.query, self.key, **self._scoring())
        return self._window_scores

    def running_max(self, running: Tensor | None) -> Tensor:
        """The maximum of ``running`` and of this layer's ``window_scores`` over the heads.

        Args:
            running: ``[B, M]``, float32: the maximum over earlier layers, which may be updated in
                place; None if there is none.

        Returns:
            ``[B, M]``, float32. If ``window_scores`` was not read before, this computes it in the
            same pass over the keys (:func:`claa_ops.score_layer`).
        """
        if running is None:  # scores are never negative, so 0 is below all of them
            shape = self.key.shape[0], self.context
            running = torch.zeros(shape, dtype=torch.float32, device=self.key.device)
        if self._window_scores is not None:
            return aggregate_scores(running, self._window_scores)
        self._window_scores = score_layer(running, self.query, self.key, **self._scoring())
        return running

    def reduce(self, scores: Tensor, how: Literal["max", "sum"]) -> Tensor:
        """Merge scores that were reduced over this device's heads with those of other devices.

        A tensor-parallel model has its heads on several devices; :func:`begin` takes the function
        that reduces over them. Without one all heads are here, and the scores stay as they are.
        All devices have to call this in the same layers.
        """
        reduce = self.state.reduce
        return scores if reduce is None else reduce(scores, how)

    def _scoring(self) -> dict[str, Any]:
        method = self.state.method
        return {
            "kernel_size": method.kernel_size,
            "pool_mode": method.pool_mode,
            "lse": self.lse,
            "start": self.start,
            **self.attention,
        }
