from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from claa_ops.methods.pruning import Keep, Pruning
from claa_ops.selection.budget import Budget


@dataclass(frozen=True)
class LazyLLM(Pruning):
    """Progressive pruning: the last token's attention decides, layer after layer, what continues.

    At each selection layer a token is as important as the attention that it receives from the
    prompt's last token, averaged over all heads. Fewer and fewer tokens continue to the deeper
    layers; the last one always does. A layer's cache is what reached it.

    Args:
        keep: tokens that continue after the last selection layer: a rate of the prompt in (0, 1],
            or a number. Twice as many continue after the layer before it, three times as many
            after the one before that, and so on. Or a tuple, as in :class:`Pruning`.
        layer: the selection layer, or several, ascending. None for the last layers of the first,
            second and third quarter of the model.
        keep_kv: tokens that a layer's cache keeps, by that layer's own ranking; all by default.
        first_full, num_sinks, equal_cache: see :class:`Pruning`.
        window, kernel_size, pool_mode: see :class:`Method`; by default one query and no pooling.

    This is the prefill alone. The original keeps the hidden states of pruned tokens in an
    auxiliary cache, and each decoding step may take some of them up again; here a pruned token is
    gone, and every decoding step attends to all that is left.

    Raises:
        ValueError: a setting is out of its range.

    Source: LazyLLM (arXiv 2407.14057), which has no public code: what ranks the tokens, and that
    fewer and fewer continue to deeper layers. Not stated there, and ours: after which layers, and
    how many. Departures: no revival, as above; budgets are of the whole prompt, where the
    original takes a percentile of the tokens that a layer sees.

    Example:
        >>> LazyLLM(keep=0.1).at_depth(32).layer
        (7, 15, 23)
        >>> method = LazyLLM(keep=(0.5, 0.2), layer=(9, 20))
    """

    keep_kv: Keep | None = 1.0
    window: int = field(default=1, kw_only=True)
    kernel_size: int = field(default=1, kw_only=True)

    _steps: tuple[Budget, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_steps", tuple(_steps(self._keeps[-1], 3)))

    def _each(self, name: str) -> list[Any]:
        """The values of ``layer`` or ``keep``; one budget is stretched over several layers."""
        values = super()._each(name)
        budget = Budget.of(self.keep)
        if name == "layer" or budget is None or not isinstance(self.layer, tuple):
            return values
        steps = _steps(budget, len(self.layer))
        return [step.count / step.per if step.per else step.count for step in steps]

    @staticmethod
    def default_layer(num_layers: int) -> tuple[int, ...]:
        """7, 15 and 23 of 32; fewer if the model has too few."""
        return tuple(sorted({max(0, num_layers * quarter // 4 - 1) for quarter in (1, 2, 3)}))

    def stages(self, num_layers: int) -> dict[int, Budget]:
        """The selection layers, ascending, and how many tokens continue after each."""
        if self.layer is not None:
            return super().stages(num_layers)
        layers = self.default_layer(num_layers)
        return dict(zip(layers, self._steps[-len(layers) :], strict=True))


def _steps(last: Budget, stages: int) -> list[Budget]:
    """Budgets of stages that end in ``last``: before it twice, three times it, at most all."""
    counts = [last.count * (stages - stage) for stage in range(stages)]
    return [
        Budget(min(count, last.per) if last.per else count, last.per, last.least)
        for count in counts
    ]
