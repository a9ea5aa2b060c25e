from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from claa_ops.methods.pruning import Keep, Pruning
from claa_ops.ops.select_topk import select_topk
from claa_ops.selection.budget import Budget, smaller
from claa_ops.selection.padding import gather_kept
from claa_ops.selection.state import PrefillState


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
        revive: what one selection layer dropped can be taken up at the next one, where it competes
            by its last ranking with the tokens that are there. It then runs through the layers
            between the two, and from there on with the others. How many do is read by the host.
        second_look: see :class:`Pruning`; for a single selection layer, without ``revive``.
        window, kernel_size, pool_mode: see :class:`Method`; by default one query and no pooling.

    The original keeps the hidden states of pruned tokens in an auxiliary cache, and each decoding
    step may take some of them up again. Here the later stages of the prefill may (``revive``), or
    the later turns of a conversation (``second_look``); every decoding step attends to all that is
    held.

    Raises:
        ValueError: a setting is out of its range.

    Source: LazyLLM (arXiv 2407.14057), which has no public code: what ranks the tokens, that fewer
    and fewer continue to deeper layers, and that dropped ones can come back. Not stated there, and
    ours: after which layers, and how many. Departures: when they come back, as above; budgets are
    of the whole prompt, where the original takes a percentile of the tokens that a layer sees.

    Example:
        >>> LazyLLM(keep=0.1).at_depth(32).layer
        (7, 15, 23)
        >>> method = LazyLLM(keep=(0.5, 0.2), layer=(9, 20))
    """

    keep_kv: Keep | None = 1.0
    revive: bool = field(default=False, kw_only=True)
    window: int = field(default=1, kw_only=True)
    kernel_size: int = field(default=1, kw_only=True)

    _steps: tuple[Budget, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_steps", tuple(_steps(self._keeps[-1], 3)))
        self.require(isinstance(self.revive, bool), "revive", "True or False")
        if self.revive:
            whole = isinstance(self.keep_kv, float) and self.keep_kv == 1.0
            self.require(whole, "keep_kv", "1.0 with revive")
            self.require(not self.equal_cache, "equal_cache", "False with revive")
            self.require(not self.second_look, "second_look", "False with revive")
            self.require(not self.in_layer, "in_layer", "False with revive")
            self.require(self.mass is None, "mass", "None with revive")

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

    # Revival.

    def begin(self, state: PrefillState) -> None:
        """Refuse protected tokens with ``revive``."""
        super().begin(state)
        if self.revive and state.protect is not None:
            raise ValueError("LazyLLM: protect must be None with revive, got a mask")

    @property
    def looks_again(self) -> bool:
        """Whether dropped tokens may be taken up."""
        return self.revive or self.second_look

    @property
    def differs_by_row(self) -> bool:
        """With ``revive``: one prompt may take up more than another."""
        # Not by super(), whose property is always true to torch.compile.
        return self.revive or self.mass is not None

    def parks(self, state: PrefillState, layer: int) -> bool:
        """With ``revive``, behind every selection layer that another one follows."""
        if not self.revive:
            return super().parks(state, layer)
        return layer < max(self.stages(state.num_layers))

    def _drops(self, state: PrefillState, stage: int) -> bool:
        """With ``revive`` also where others may take the places of some."""
        parked = self.revive and state.parked is not None
        return parked or super()._drops(state, stage)

    def take_up(self, state: PrefillState, layer: int) -> Tensor | None:
        """What the selection layer before this one dropped, if it is among the best by now."""
        if not self.revive:
            return super().take_up(state, layer)
        if layer not in self.stages(state.num_layers) or not self._drops(state, layer):
            return None
        state.notes["ranking"] = ranking = self._last_ranking(state)
        state.notes["ranked"] = layer
        length, start, positions = state.seen_when_parked
        most, counts = min(self._tokens(state.sizes, layer), length), None
        if start is not None and state.row_sizes is not None:
            counts = smaller(self._tokens(state.row_sizes, layer), length - start)
            most = int(counts.max())
        of_parked = ranking if positions is None else gather_kept(ranking, positions)
        best = select_topk(
            of_parked[:, : length - self.window],
            most,
            window=self.window,
            num_sinks=self.num_sinks,
            start=start,
            counts=counts,
        )
        if positions is not None:
            best = positions.gather(1, best.clamp_min(0)).masked_fill(best < 0, -1)
        revived = state.missing() & state.among_prompt(best)
        counts = revived.sum(dim=1)
        most = int(counts.max())
        return select_topk(revived.float(), most, counts=counts) if most > 0 else None

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """As in Pruning; with ``revive`` of what joined too."""
        stages = self.stages(state.num_layers)
        if self.revive and layer in stages and self._drops(state, layer):
            if state.notes.get("ranked") != layer:
                state.notes["ranking"] = self._last_ranking(state)
            ranking = state.notes["ranking"]
            if state.positions is not None:
                ranking = gather_kept(ranking, state.positions)
            state.update_ranking(ranking[:, : state.length - self.window])
        return super().select(state, layer)

    def _last_ranking(self, state: PrefillState) -> Tensor:
        """``[B, N]``: each token of the prompt by the last layer that ranked it."""
        assert state.importance is not None  # a layer that selects was ranked
        latest = pad(state.importance, (0, self.window))
        if state.positions is None:
            return latest
        before = pad(state.notes["ranking"], (1, 0))  # padding goes before the prompt
        return before.scatter(1, 1 + state.positions, latest)[:, 1:]


def _steps(last: Budget, stages: int) -> list[Budget]:
    """Budgets of stages that end in ``last``: before it twice, three times it, at most all."""
    counts = [last.count * (stages - stage) for stage in range(stages)]
    return [
        Budget(min(count, last.per) if last.per else count, last.per, last.least)
        for count in counts
    ]
