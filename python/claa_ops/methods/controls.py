"""Control methods, without which no comparison of methods says anything."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from claa_ops.methods.fastkv import FastKV
from claa_ops.methods.pruning import Pruning
from claa_ops.selection.budget import is_count
from claa_ops.selection.layer import Layer
from claa_ops.selection.padding import gather_kept

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Random(Pruning):
    """Random tokens and the window, in the selection and every cache: shows what ranking is worth.

    Args:
        keep, layer, keep_kv, first_full, num_sinks, equal_cache, window: see :class:`Pruning`;
            ``kernel_size`` and ``pool_mode`` are unused.
        seed: the seed of the draw, which depends on nothing else: it counts tokens from the end
            of the prompt, so that padding does not change it, and the rows of a batch share it.
            Give each prompt of an evaluation its own seed.

    Raises:
        ValueError: a setting is out of its range.

    Source: the customary control; as a method of training, Random-LTD (arXiv 2211.11586).

    Example:
        >>> method = Random(keep=0.2, seed=7)
    """

    seed: int = 0

    can_look_again: ClassVar[bool] = False  # a draw knows no question

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_count(self.seed, 0), "seed", "an integer of at least 0")

    def for_prompt(self, key: str) -> Self:
        """The same method with a seed of its own for each key."""
        return replace(self, seed=zlib.crc32(f"{self.seed} {key}".encode()))

    def score(self, layer: Layer) -> Tensor:
        """Random numbers: one for each token, the same in all layers, heads and rows."""
        state, key = layer.state, layer.key
        numbers = state.notes.get("numbers")
        if numbers is None:
            context = max(0, state.prompt_length - self.window)
            generator = torch.Generator().manual_seed(self.seed)
            numbers = torch.rand(context, generator=generator).flip(0).to(key.device)
            state.notes["numbers"] = numbers
        scores = numbers.expand(key.shape[0], -1)
        if state.positions is not None:
            scores = gather_kept(scores, state.positions[:, : key.shape[2] - self.window])
        return scores[:, None].expand(-1, key.shape[1], -1)


@dataclass(frozen=True)
class SinksRandom(Random):
    """The first tokens of the prompt, random ones, and the window.

    Many heads attend to the first tokens whatever they say, and a model that loses them fails
    for that reason alone. The difference from :class:`Random` is what these tokens are worth.

    Args:
        num_sinks: how many first tokens are kept; the other settings are those of :class:`Random`.

    Source: the attention sinks of StreamingLLM (arXiv 2309.17453), as a control.

    Example:
        >>> method = SinksRandom(keep=0.2, num_sinks=4)
    """

    num_sinks: int = 4


@dataclass(frozen=True)
class FastKVDeferral(FastKV):
    """FastKV that leaves the caches of the first layers whole, as CLAA does.

    A comparison of CLAA with FastKV itself measures mostly that deferral, and a cache that is 2.1
    times as large at 10 %; the score is the only difference between this and ``CLAA``.

    Args:
        first_full: how many first layers keep their whole caches; the other settings are those
            of :class:`FastKV`.

    Source: the ablation ``n_agg=1`` of CLAA's public code, with FastKV's sum over heads.

    Example:
        >>> method = FastKVDeferral(keep=0.1)
    """

    first_full: int = 4
