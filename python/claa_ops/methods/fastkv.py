from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from claa_ops.methods.pruning import Pruning
from claa_ops.selection.budget import Budget, Size, Sizes


@dataclass(frozen=True)
class FastKV(Pruning):
    """Token-selective propagation: the selection layer's own scores, summed over all heads.

    Every layer's cache keeps, for each key/value head, the tokens that the layer itself scores
    best. Both budget modes of the public code are served: numbers of tokens (``constant``), and
    rates (``proportional``).

    Args:
        keep, layer, keep_kv, first_full, num_sinks, equal_cache: see :class:`Pruning`.
        rates_of: what a rate ``keep_kv`` is a rate of: ``"prompt"``, the whole prompt at every
            layer, or ``"layer"``, the tokens that the layer sees; after the selection it is
            then ``keep_kv / keep``, so that about the same number is kept.
        window, kernel_size, pool_mode: see :class:`Method`.

    Raises:
        ValueError: a setting is out of its range.

    Source: FastKV (arXiv 2502.01068) and its public code (dongwonjo/FastKV, b978769), which
    ships ``keep=0.2, keep_kv=0.1, rates_of="layer", pool_mode="max"``, or ``keep=2048,
    keep_kv=512``, and as its layer 15 of 32, 17 of 36, 19 of 40. The defaults here, one rate of
    the whole prompt for both and the average pooling of the paper, are those of the comparison
    with CLAA (arXiv 2602.16054). Departures: scores stay in float32, kept tokens are in
    ascending order, rates are exact fractions and never below the window, padding is not scored.

    Example:
        >>> method = FastKV(keep=0.2, keep_kv=0.1, layer=15, pool_mode="max")
        >>> constant = FastKV(keep=2048, keep_kv=512)
    """

    rates_of: Literal["prompt", "layer"] = "prompt"

    _keep_kv_after: Budget = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rates_of in ("prompt", "layer"), "rates_of", "'prompt' or 'layer'")
        if self.rates_of == "layer":
            rates = bool(self._keep_kv.per and self._keeps[0].per and len(self._keeps) == 1)
            self.require(rates, "rates_of", "'prompt' unless keep and keep_kv are single rates")
            object.__setattr__(self, "_keep_kv_after", self._keep_kv.within(self._keeps[0]))

    def capacity(self, sizes: Sizes[Size], layer: int) -> Size:
        """How many entries the cache of this layer may keep."""
        if self.rates_of == "prompt" or self.equal_cache:
            return super().capacity(sizes, layer)
        last = max(self.stages(sizes.num_layers))
        budget = self._keep_kv if layer <= last else self._keep_kv_after
        return budget.tokens(sizes.seen, self.window)
