"""What one layer of a prefill saw: whatever a ranking may be a function of."""

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
    """A view of one layer, made by :meth:`PrefillState.observe`; nothing is computed unasked.

    An engine that keeps its keys in another form, in pages or packed, can hand a method a
    subclass of this.

    Args:
        state: the prefill.
        index: the layer, from 0.
        query: ``[B, H, n, D]`` or the last rows of it, after the rotary embedding.
        key: ``[B, G, n, D]``, likewise.
        value: ``[B, G, n, Dv]``, if the caller shows them.
        hidden: ``[B, n, C]``, the layer's input, if the caller shows it.
        lse: ``[B, H, n]`` or the last rows of it, float32: the attention's logsumexp, if known.
        attention: ``scale, sliding_window, softcap, sink_logits``, what the layer's attention
            uses, as :func:`claa_ops.score_window` takes them.

    Attributes:
        state: the prefill.
        index: the layer, from 0.
        key: ``[B, G, n, D]``.
        start: ``[B]`` or None: the first of the n tokens of each row that is not padding.
        attention: as above.
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
        **attention: Any,
    ) -> None:
        self.state = state
        self.index = index
        self.key = key.detach()  # a ranking has no gradient; what it is made of may
        self.start = state.start
        self.attention = attention
        self._query, self._value, self._hidden, self._lse = query, value, hidden, lse
        self._window_scores: Tensor | None = None
        self._scores: Tensor | None = None

    @property
    def rows(self) -> int:
        """W: how many queries, the last ones, the method reads."""
        return self.state.method.rows(self.state)

    @property
    def context(self) -> int:
        """M: how many tokens come before the last W; 0 if there are none."""
        return max(0, self.key.shape[2] - self.rows)

    @property
    def query(self) -> Tensor:
        """``[B, H, W, D]``: the last W queries; fewer if the layer sees fewer tokens."""
        rows = self.rows
        if self._query.shape[2] < min(rows, self.key.shape[2]):
            raise ValueError(
                f"observe: query of layer {self.index} must have the last {rows} rows, which "
                f"{type(self.state.method).__name__} reads, got {self._query.shape[2]}"
            )
        return self._query[:, :, -rows:].detach()

    @property
    def lse(self) -> Tensor | None:
        """``[B, H, W]``, float32: the logsumexp of the last W queries; None if it is not known."""
        return None if self._lse is None else self._lse[:, :, -self.rows :].detach()

    @property
    def value(self) -> Tensor:
        """``[B, G, n, Dv]``."""
        return self._shown("value", self._value)

    @property
    def hidden(self) -> Tensor:
        """``[B, n, C]``: the layer's input, for a method that says ``reads_hidden``."""
        return self._shown("hidden", self._hidden)

    def _shown(self, name: str, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            raise RuntimeError(
                f"{type(self.state.method).__name__}: {name} of layer {self.index} must be shown "
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
        """The maximum of a ranking of earlier layers and ``window_scores``, over their heads.

        Args:
            running: ``[B, M]``, float32, which may be updated in place; None for no earlier one.

        Returns:
            ``[B, M]``, float32. Where the scores are not known yet this computes them as well, in
            the same pass over the keys (:func:`claa_ops.score_layer`).
        """
        if running is None:  # scores are not negative
            shape = self.key.shape[0], self.context
            running = torch.zeros(shape, dtype=torch.float32, device=self.key.device)
        if self._window_scores is not None:
            return aggregate_scores(running, self._window_scores)
        self._window_scores = score_layer(running, self.query, self.key, **self._scoring())
        return running

    def reduce(self, scores: Tensor, how: Literal["max", "sum"]) -> Tensor:
        """Scores in which heads have been merged, merged with those of the other heads.

        A tensor-parallel model has its heads on several devices; ``begin`` takes the function
        that reduces over them. Without one these are all heads.
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
