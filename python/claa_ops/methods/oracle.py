from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from claa_ops.methods.pruning import Pruning
from claa_ops.selection.answer import Reader, pool
from claa_ops.selection.budget import is_count
from claa_ops.selection.layer import Layer
from claa_ops.selection.method import Preparation
from claa_ops.selection.padding import gather_kept


@dataclass(frozen=True)
class Oracle(Pruning):
    """Pruning by the Answer-Informed Oracle: what a perfect ranking would be worth.

    Before the prefill the model answers with its full cache, and the attention of the answer to
    the prompt ranks the tokens; then that ranking alone decides, in the selection and, for all
    heads alike, in every layer's cache. It saves no work; it is what others are compared with.
    It is no strict upper bound: other rankings win now and then.

    Args:
        keep, layer, keep_kv, first_full, num_sinks, equal_cache, window: see :class:`Pruning`.
        max_new_tokens: the length at which the answer is cut off.
        kernel_size: neighbouring tokens over which the ranking is averaged; 1 for none.

    Raises:
        ValueError: a setting is out of its range.

    Source: CLAA (arXiv 2602.16054) and its public code (BradMcDanel/kv-exps, 90e13b1), which
    stores rankings made beforehand. Departures: after a selection the ranking is gathered at
    the kept tokens (the public code takes its first entries); the softmax stays in float32.

    Example:
        >>> method = Oracle(keep=0.1, layer=7, max_new_tokens=32)
    """

    max_new_tokens: int = 64
    kernel_size: int = field(default=13, kw_only=True)

    can_look_again: ClassVar[bool] = False  # the answer was to the prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_count(self.max_new_tokens, 1), "max_new_tokens", "a positive integer")
        self.require(self.pool_mode == "avg", "pool_mode", "'avg'")

    @property
    def needs_ranking(self) -> bool:
        """True: the attention of the answer."""
        return True

    def prepare(
        self, reader: Reader, input_ids: Tensor, attention_mask: Tensor | None
    ) -> Preparation:
        """Answer, and rank the prompt by the answer's attention."""
        answer = reader.answer(input_ids, self.max_new_tokens, attention_mask)
        return Preparation(pool(answer.peak(), self.kernel_size), answer.work)

    def score(self, layer: Layer) -> Tensor:
        """The ranking of the tokens that this layer sees, without the window."""
        ranking = layer.state.ranking
        assert ranking is not None  # begin refuses a prefill that lacks one
        if layer.state.positions is not None:
            ranking = gather_kept(ranking, layer.state.positions)
        return ranking[:, None, : layer.context].expand(-1, layer.key.shape[1], -1)

    def rank(self, layer: Layer, before: Tensor | None) -> Tensor:
        """The ranking, once for each head."""
        return layer.scores.sum(dim=1)
