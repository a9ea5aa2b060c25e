"""Tensor parallelism: heads are on several devices, which must all keep the same tokens."""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_tp_group

from claa_ops.selection import begin
from claa_ops.selection.parallel import Reduce, reduce_over
from claa_ops.vllm.settings import Settings


def reduction(settings: Settings, model_config: Any) -> Reduce | None:
    """What merges the scores of the heads of all devices; None if there is one device.

    Raises:
        ValueError: the method, or the number of heads, cannot be served on several devices.
    """
    group = get_tp_group()
    reduce = reduce_over(group.device_group)
    if reduce is None:
        return None
    heads = model_config.get_total_num_kv_heads()
    if heads < group.world_size:
        raise ValueError(
            f"claa: tensor parallelism must be over at most {heads} devices, one for each "
            f"key/value head, got {group.world_size}"
        )
    # A method that cannot have its heads on several devices says so here.
    begin(settings.method, num_layers=settings.num_layers, prompt_length=1, reduce=reduce)
    return reduce
