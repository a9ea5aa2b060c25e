"""A part of the prompt runs ahead and says what of the whole is needed.

The layers that rank well are run on every second token, or on another part of the prompt. What
they say of it, averaged over neighbours, selects from the whole prompt after the early layer at
which the part was taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from claa_ops.huggingface.work import count_work
from claa_ops.methods import CLAA, Peak, Pruning
from claa_ops.ops.pool_heads import pool_heads
from claa_ops.selection.layer import Layer
from claa_ops.selection.method import Preparation
from claa_ops.selection.padding import gather_kept
from claa_ops.selection.state import PrefillState
from claa_ops.selection.work import Work
from studies.early_signals.laboratory import (
    KERNEL,
    SINKS,
    WHOLE,
    WINDOW,
    Laboratory,
    Trial,
    Tried,
    ranking_of,
)

# Chosen on development prompts: the part, the layer after which it is taken, the layer that ranks
# it, and the rates at which the prefill then resumes.
PASSES = (
    ("every 2nd token", 2, 7, (0.1,)),
    ("every 2nd token", 2, 8, (0.1, 0.15)),
    ("every 2nd token", 4, 8, (0.1,)),
)
# What they were compared with: Peak's schedules.
SCHEDULES: tuple[tuple[Any, Any], ...] = (
    (7, 0.1),
    (8, 0.1),
    (8, 0.2),
    ((7, 12), (0.25, 0.1)),
    ((2, 7), (0.6, 0.15)),
    ((2, 7), (0.5, 0.1)),
)
# Methods that rank the part. Scores are not pooled here, since neighbours in the part are none.
RANKING = {"Peak": Peak(kernel_size=1), "CLAA": CLAA(last_n=3)}


@dataclass(frozen=True)
class OnPart(Pruning):
    """A method in two stages: the first takes a part of the prompt, the second ranks that.

    Args:
        ranking: how the second stage ranks.
    """

    ranking: Pruning = field(default_factory=Peak, kw_only=True)

    @property
    def needs_ranking(self) -> bool:
        """That of the first stage, which is 1 on the part."""
        return True

    def informs(self, state: PrefillState, layer: int) -> bool:
        """The first stage, and what the second one asks for."""
        first, last = self.selection_layers(state.num_layers)
        return layer == first or (layer <= last and self._asks(layer, last))

    def _asks(self, layer: int, last: int) -> bool:
        return not isinstance(self.ranking, CLAA) or layer > last - self.ranking.last_n

    def rank(self, layer: Layer, before: Tensor | None) -> Tensor:
        """The part at the first stage, after it the ranking."""
        if layer.index == self.selection_layers(layer.state.num_layers)[0]:
            assert layer.state.ranking is not None  # begin has seen to it
            return layer.state.ranking[:, : layer.context]
        return self.ranking.rank(layer, before)

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        """Note at the second stage what it ranked, and how."""
        if layer == self.selection_layers(state.num_layers)[1]:
            state.notes["ranked"] = state.importance, state.positions
        index = super().select(state, layer)
        if index is not None and "peaks" in state.notes:  # Peak's, of the tokens that continue
            state.notes["peaks"] = gather_kept(state.notes["peaks"], index)
        return index


def coarse_pass(
    laboratory: Laboratory, name: str, part: Tensor, share: float, layer: int, late: int, kind: str
) -> Trial:
    """A part of the prompt, the best ``share`` of ``part`` ``[B, M]``, runs ahead to a late layer.

    What that layer says of the part, averaged over neighbours, is the ranking of the whole prompt.
    The prefill resumes after the layer at which the part was taken; the pass counts as work.
    """
    ranked_by = RANKING[kind]
    # How much the late layer would select does not matter, but it must select.
    method = OnPart(
        keep=(share, 0.05),
        layer=(layer, late),
        num_sinks=SINKS,
        window=WINDOW,
        kernel_size=ranked_by.kernel_size,
        ranking=ranked_by,
        **WHOLE,
    )
    beyond = torch.nn.functional.pad(part, (0, laboratory.ids.shape[1] - part.shape[1]))
    state = laboratory.run(method, Preparation(beyond, Work())).state
    ranked, positions = state.notes["ranked"]
    ranking = torch.zeros_like(part).scatter(1, positions[:, :-WINDOW].clamp_min(0), ranked)
    ranking = pool_heads(ranking[:, None], 1, kernel_size=KERNEL)[:, 0]
    stages = [state.lengths[: last + 1] for last in (layer, late)]
    before, ahead = (count_work(laboratory.model, lengths).linear for lengths in stages)
    label = f"coarse: {name} after layer {layer}, {kind} at layer {late}"
    return laboratory.by_ranking(label, layer, ranking, Work(linear=ahead - before))


def runs(laboratory: Laboratory) -> Iterator[Trial]:
    """Runs of tokens at even distances go ahead, to early layers and to late ones."""
    place = torch.arange(laboratory.ids.shape[1] - WINDOW, device=laboratory.ids.device)
    kinds = ((1, 2), (1, 3), (8, 2), (16, 2), (24, 2), (8, 3), (16, 3))
    for layer, (tokens, every) in product((0, 2), kinds):
        part = (place // tokens % every == 0).float().expand(len(laboratory.ids), -1)
        name, share = f"runs of {tokens}, 1 of {every}", {2: 0.5, 3: 0.34}[every]
        for late, kind in ((7, "Peak"), (8, "Peak"), (12, "Peak"), (18, "CLAA"), (20, "CLAA")):
            yield coarse_pass(laboratory, name, part, share, layer, late, kind)


def of_parts(laboratory: Laboratory) -> Iterator[Trial]:
    """Coarse passes to the first good layers, of parts that an early layer helps to choose."""
    for layer, late in product((2, 3, 4, 5), (7, 8)):
        for name, (part, share) in parts(laboratory, layer).items():
            yield coarse_pass(laboratory, name, part, share, layer, late, "Peak")


def parts(laboratory: Laboratory, layer: int) -> dict[str, tuple[Tensor, float]]:
    """Parts of the prompt by name: a ranking ``[B, M]``, and the share of its best tokens."""
    best = ranking_of(laboratory.recorded, laboratory.method("peak", layer), layer)
    place = torch.arange(best.shape[1], device=best.device)
    return {
        "every 2nd token": ((place % 2 == 0).float().expand_as(best), 0.5),
        "every 3rd token and the best": (best.masked_fill(place % 3 == 0, torch.inf), 0.5),
        "every 4th token and the best": (best.masked_fill(place % 4 == 0, torch.inf), 0.4),
        "the best": (best, 0.4),
    }


def chosen(laboratory: Laboratory) -> Iterator[Trial]:
    """The coarse passes that were best on development prompts, and Peak's schedules."""
    for name, layer, late, keeps in PASSES:
        part, share = parts(laboratory, layer)[name]
        trial = coarse_pass(laboratory, name, part, share, layer, late, "Peak")
        yield trial._replace(keeps=keeps)
    for layer, keep in SCHEDULES:
        method = laboratory.method("peak", layer, keep=keep)
        yield Trial(f"peak after {layer}, {keep}", method, keeps=(None,))


TRIED: Tried = {"runs": runs, "parts": of_parts, "chosen": chosen}
