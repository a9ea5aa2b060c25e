"""Tensor parallelism: heads are on several devices, which must all keep the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Reduce = Callable[[Tensor, Literal["max", "sum"]], Tensor]


def reduce_over(group: ProcessGroup | None) -> Reduce | None:
    """What merges the scores of heads that the processes of a group have among them.

    Args:
        group: the processes; None if this one has all heads.

    Returns:
        The ``reduce`` of :func:`claa_ops.prefill.begin`, one all-reduce; None if there is no other
        process. Its results are the same to the bit in all of them, and so are the tokens that
        are selected by these.

    Example::

        state = begin(method, num_layers=32, prompt_length=n, reduce=reduce_over(dist.group.WORLD))
    """
    if group is None or group.size() == 1:
        return None

    def reduce(scores: Tensor, how: Literal["max", "sum"]) -> Tensor:
        merged = scores.clone(memory_format=torch.contiguous_format)
        op = dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM
        dist.all_reduce(merged, op=op, group=group)
        return merged

    return reduce
