"""Pooling modes cross into C++ as ints: the stable ABI leaks `str` arguments before torch 2.14."""

from typing import Literal

PoolMode = Literal["avg", "max"]
_MODES = {"avg": 0, "max": 1}


def pool_mode_code(mode: PoolMode) -> int:
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}; got {mode!r}")
    return _MODES[mode]
