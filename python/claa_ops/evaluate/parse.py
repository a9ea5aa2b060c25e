"""Text to values: budgets, layers, schedules, lengths and depths, as people write them."""

from __future__ import annotations

import itertools
import math

from claa_ops.huggingface.models import InputError

_HIGHEST_LAYER = 9_999  # no model has as many, and a range is a list

Budget = float | int
Schedule = tuple[tuple[int, ...], tuple[Budget, ...]]  # layers, and the budget after each


def parse_budget(name: str, text: str) -> Budget:
    """Return the rate (``0.1``, ``10%``, ``1``) or the number of tokens (``400``) in ``text``.

    Args:
        name: what the message calls it.
        text: what the user wrote.

    Raises:
        InputError: it is neither.

    Example:
        >>> parse_budget("keep", "10%"), parse_budget("keep", "400")
        (0.1, 400)
    """
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        number = -1.0
    if 0 < number <= 1:
        return number
    if 1 < number < math.inf and text.isdecimal():
        return int(text)
    raise InputError(
        f"{name} must be a rate in (0, 1] such as 0.1, or a number of tokens such as 400, "
        f"got {text}"
    )


def parse_budgets(text: str) -> list[Budget]:
    """Read several budgets: ``0.1,20%,400``."""
    return [parse_budget("keep", part) for part in text.split(",")]


def parse_layers(text: str) -> list[int]:
    """Read layers and ranges of layers.

    Example:
        >>> parse_layers("10,15,20-22")
        [10, 15, 20, 21, 22]
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not _is_layer(first) or (dash and not _is_layer(last)):
            raise InputError(f"layer must be layers such as 10,15,20-22, got {text}")
        between = range(int(first), int(last or first) + 1)
        if int(last or first) > _HIGHEST_LAYER:
            raise InputError(f"layer must be at most {_HIGHEST_LAYER:,}, got {part}")
        if not between:
            raise InputError(f"layer must have ranges that ascend, got {part}")
        layers.extend(between)
    return layers


def parse_schedule(text: str) -> Schedule:
    """Read a selection in stages.

    Example:
        >>> parse_schedule("7:50%,15:20%,23:10%")
        ((7, 15, 23), (0.5, 0.2, 0.1))
    """
    layers, keeps = [], []
    for part in text.split(","):
        layer, colon, keep = part.partition(":")
        if not colon or not _is_layer(layer):
            raise InputError(f"schedule must be LAYER:KEEP,... such as 7:50%,23:10%, got {text}")
        layers.append(int(layer))
        keeps.append(parse_budget("schedule", keep))
    for before, after in itertools.pairwise(keeps):  # rates and numbers cannot be compared
        if type(after) is type(before) and after > before:
            raise InputError(
                f"schedule must keep no more at a stage than at the one before, got {after:g} "
                f"after {before:g}"
            )
    return tuple(layers), tuple(keeps)


def parse_lengths(text: str) -> list[int]:
    """Read positive numbers: ``1000,2000``."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"lengths must be numbers such as 1000,2000, got {text}")
    return [int(part) for part in parts]


def parse_depths(text: str) -> list[float]:
    """Read a number of depths, evenly from the first token to the last, or a list in %.

    Example:
        >>> parse_depths("3"), parse_depths("10%,90%")
        ([0.0, 0.5, 1.0], [0.1, 0.9])
    """
    if text.isdecimal() and int(text) > 0:
        number = int(text)
        return [0.5] if number == 1 else [index / (number - 1) for index in range(number)]
    try:
        depths = [float(part.removesuffix("%")) / 100 for part in text.split(",")]
    except ValueError:
        depths = [-1.0]
    if "%" not in text or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(
            f"depths must be how many, such as 5, or a list such as 0%,50%,100%, got {text}"
        )
    return depths


def _is_layer(text: str) -> bool:
    """Whether the text is a layer of some model: no model has as many as 10,000."""
    return text.isdecimal() and len(text) <= 4
