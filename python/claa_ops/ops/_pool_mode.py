"""Pooling modes are ints in C++: the stable ABI leaks ``str`` arguments before torch 2.14."""

from typing import Literal

PoolMode = Literal["avg", "max"]
_MODES = {"avg": 0, "max": 1}


def pool_mode_code(pool_mode: PoolMode) -> int:
    if pool_mode not in _MODES:
        raise ValueError(f"pool_mode must be one of {', '.join(_MODES)}; got {pool_mode!r}")
    return _MODES[pool_mode]
