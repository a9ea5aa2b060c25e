"""The cells of a grid: each method with each layer, rate and schedule that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from claa_ops.evaluate.parse import Budget, Schedule
from claa_ops.evaluate.spec import Keep, Layer, MethodSpec, plain, plain_settings
from claa_ops.methods import Method


@dataclass(frozen=True)
class Cell:
    """One way to prefill.

    Attributes:
        label: the method as the user put it, the name that the tables show.
        layer: the selection layers; None for a method without any.
        keep: the rates or numbers of tokens; None for a method without any.
        method: the method with these settings.
    """

    label: str
    layer: Layer
    keep: Keep
    method: Method

    @classmethod
    def of(cls, label: str, method: Method) -> Cell:
        """The cell of a method."""
        return cls(label, getattr(method, "layer", None), getattr(method, "keep", None), method)

    def key(self) -> dict[str, Any]:
        """All that the results of the cell depend on, besides model and prompt."""
        return {
            "label": self.label,
            "layer": plain(self.layer),
            "keep": plain(self.keep),
            "method": type(self.method).__name__,
            "settings": plain_settings(self.method),
        }


def make_cells(
    specs: Sequence[MethodSpec],
    num_layers: int,
    layers: Sequence[int] = (),
    keeps: Sequence[Budget] = (),
    schedules: Sequence[Schedule] = (),
    keep_kv: Budget | None = None,
) -> list[Cell]:
    """Full prefill, then every method with every layer, rate and schedule that it takes.

    Without layers or rates the methods' own defaults for the depth stand. ``keep_kv`` is for the
    methods that have a budget for their caches apart, unless their specification states it.

    Args:
        specs: the methods.
        num_layers: the depth of the model.
        layers: selection layers.
        keeps: rates or numbers of tokens.
        schedules: selections in stages.
        keep_kv: the budget of the caches; that of the tokens if not given.

    Raises:
        InputError: a layer is outside the model, or a method does not take its settings.

    Example:
        >>> cells = make_cells([MethodSpec.parse("claa")], 30, layers=[8, 20], keeps=[0.1])
        >>> [(cell.label, cell.layer) for cell in cells]
        [('full', None), ('claa', 8), ('claa', 20)]
    """
    cells = {"full": Cell.of("full", MethodSpec.parse("full").make(num_layers))}
    for spec in specs:
        if keep_kv is not None and spec.has("keep_kv") and spec.bytes_of is None:
            spec = spec.with_settings(keep_kv=keep_kv)
        stages: list[tuple[Layer, Keep]] = [
            (layer, keep)
            for layer in (layers if layers and spec.has("layer") else [None])
            for keep in (keeps if keeps and spec.has("keep") else [None])
        ]
        if spec.has_stages:
            stages.extend(schedules)
        for layer, keep in stages:
            cell = Cell.of(spec.label, spec.make(num_layers, layer, keep))
            cells.setdefault(f"{cell.label} {cell.layer} {cell.keep}", cell)
    full = cells.pop("full")
    return [full, *(cell for cell in cells.values() if cell.label != "full")]
