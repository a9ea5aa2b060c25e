"""python -m bench.coarse: a part of the prompt goes ahead and says what of the whole is needed.

The layers that rank well are run on every second token, or on another part of the prompt. What
they say of it, averaged over neighbours, selects from the whole prompt behind the early layer at
which the part was taken. Writes lines of the form of ``bench.quality``, for
``bench.quality_report``; ``bench.signals`` has other signals.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.quality import CHOSEN, WHOLE
from bench.signals import KERNEL, SINK, WINDOW, Laboratory, Trial, by_ranking, main, ranking_of
from claa_ops.huggingface.work import count_work
from claa_ops.methods import CLAA, Peak
from claa_ops.ops.pool_heads import pool_heads
from claa_ops.prefill import PrefillState
from claa_ops.selection.method import Preparation
from claa_ops.selection.work import Work

# Chosen on development prompts: the part, the layer behind which it is taken, the layer that ranks
# it, and the rates at which the prefill then resumes.
PASSES = (
    ("every 2nd token", 2, 7, (0.1,)),
    ("every 2nd token", 2, 8, (0.1, 0.15)),
    ("every 2nd token", 4, 8, (0.1,)),
)


class _OnPart:
    """Has a staged method select by ``state.ranking`` first, and note what it then ranks."""

    needs_ranking = True

    def rank(self, state: PrefillState, layer: int) -> Any:
        first = layer == min(self._stages)  # type: ignore[attr-defined]
        return state.ranking if first else super().rank(state, layer)  # type: ignore[misc]

    def select(self, state: PrefillState, layer: int) -> Any:
        if layer == max(self._stages):  # type: ignore[attr-defined]
            state.notes["ranked"] = state.importance, state.positions
        return super().select(state, layer)  # type: ignore[misc]


@dataclass(frozen=True)
class CLAAOnPart(_OnPart, CLAA):
    """CLAA on a part of the prompt."""


@dataclass(frozen=True)
class PeakOnPart(_OnPart, Peak):
    """Peak on a part of the prompt."""


def coarse_pass(
    laboratory: Laboratory, name: str, part: Tensor, share: float, layer: int, late: int, kind: Any
) -> Trial:
    """A part of the prompt, the best ``share`` of ``part`` ``[B, M]``, goes ahead to a late layer.

    What that layer says of the part, averaged over neighbours, is the ranking of the whole prompt.
    The prefill resumes behind the layer at which the part was taken; the pass counts as work.
    """
    settings: dict[str, Any] = {"last_n": 3} if kind is CLAAOnPart else {"kernel_size": 1}
    settings |= {"num_sinks": SINK, "window": WINDOW, **WHOLE}
    # How much the late layer would select does not matter, but it must select.
    method = kind(keep=(share, 0.05), layer=(layer, late), **settings)
    state = laboratory.run(method, Preparation(part, Work())).state
    ranked, positions = state.notes["ranked"]
    ranking = torch.zeros_like(part).scatter(1, positions[:, :-WINDOW], ranked)
    ranking = pool_heads(ranking[:, None], 1, kernel_size=KERNEL)[:, 0]
    stages = [state.lengths[: last + 1] for last in (layer, late)]
    before, ahead = (count_work(laboratory.model, lengths).linear for lengths in stages)
    label = f"coarse: {name}, {kind.__bases__[1].__name__} at layer {late}"
    return by_ranking(label, layer, ranking, Work(linear=ahead - before))


def runs(laboratory: Laboratory) -> Iterator[Trial]:
    """Runs of tokens at even distances go ahead, to early layers and to late ones."""
    place = torch.arange(laboratory.ids.shape[1] - WINDOW, device=laboratory.ids.device)
    kinds = ((1, 2), (1, 3), (8, 2), (16, 2), (24, 2), (8, 3), (16, 3))
    for layer, (tokens, every) in product((0, 2), kinds):
        part = (place // tokens % every == 0).float().expand(len(laboratory.ids), -1)
        name, share = f"runs of {tokens}, 1 of {every}", {2: 0.5, 3: 0.34}[every]
        for late in (7, 8, 12):
            yield coarse_pass(laboratory, name, part, share, layer, late, PeakOnPart)
        for late in (18, 20):
            yield coarse_pass(laboratory, name, part, share, layer, late, CLAAOnPart)


def of_parts(laboratory: Laboratory) -> Iterator[Trial]:
    """Coarse passes to the first good layers, of parts that an early layer helps to choose."""
    for layer, late in product((2, 3, 4, 5), (7, 8)):
        for name, (part, share) in parts(laboratory, layer).items():
            yield coarse_pass(laboratory, name, part, share, layer, late, PeakOnPart)


def parts(laboratory: Laboratory, layer: int) -> dict[str, tuple[Tensor, float]]:
    """Parts of the prompt by name: a ranking ``[B, M]``, and the share of its best tokens."""
    best = ranking_of(laboratory.shared, laboratory.column("peak", layer), layer)
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
        trial = coarse_pass(laboratory, name, part, share, layer, late, PeakOnPart)
        yield trial._replace(label=f"{trial.label}, chosen", keeps=keeps)
    for layer, keep in CHOSEN["peak"]:
        method = laboratory.column("peak", layer, keep=keep)
        yield Trial("peak, chosen", method, keeps=(None,))


if __name__ == "__main__":
    main(__doc__.splitlines()[0], {"runs": runs, "parts": of_parts, "chosen": chosen})
