"""A prefill over random queries and keys by the functional API, with all that it keeps."""

import dataclasses

import torch

from claa_ops import prefill
from claa_ops.ops.gather_kv import gather_kv
from claa_ops.ops.gather_tokens import gather_tokens

LAYERS, HEADS, GROUPS, DIM = 6, 4, 2, 4


@dataclasses.dataclass
class Trace:
    state: prefill.PrefillState
    seen: list[int]
    held: list[torch.Tensor]  # of each layer: which tokens of the prompt each head caches
    selected: dict[int, torch.Tensor]


def trace(method, length, padding=0, groups=GROUPS):
    """A prefill over random queries and keys, [B = 2]; the second row is padded."""
    generator = torch.Generator().manual_seed(length)
    query, key = (
        torch.randn(LAYERS, 2, heads, length, DIM, generator=generator) for heads in (HEADS, groups)
    )
    ranking = torch.rand(2, length, generator=generator)
    return trace_over(method, query, key, ranking, torch.tensor([0, padding]) if padding else None)


def trace_over(method, query, key, ranking, start, protect=None):
    """A prefill over these queries and keys of each layer."""
    _, batch, groups, length, _ = key.shape
    state = prefill.begin(
        method,
        num_layers=LAYERS,
        prompt_length=length,
        start=start,
        ranking=ranking,
        protect=protect,
    )
    result = Trace(state, [], [], {})
    positions = torch.arange(length).expand(batch, -1)
    layer, parked = 0, positions
    while layer < LAYERS:
        rows = [
            gather_kv(x, x, positions[:, None].expand(-1, x.shape[1], -1).contiguous())[0]
            for x in (query[layer], key[layer])
        ]
        state.observe(layer, *rows, value=rows[1])
        place = (1 + positions)[:, None, :, None].expand(-1, groups, -1, -1)  # padding gives 0
        result.seen.append(state.length)
        result.held.append(state.compress(layer, place, place)[0][..., 0] - 1)
        if (taken := state.take_up(layer)) is not None:
            positions = taken.all_held()
            for between in range(state.parked + 1, layer + 1):
                result.held[between] = positions[:, None].expand(-1, groups, -1)
        if layer < LAYERS - 1 and (index := state.select(layer)) is not None:
            result.selected[layer] = index
            if state.parked == layer:
                parked = positions
            if state.layer < layer:
                layer, positions = state.layer, parked
                del result.seen[layer + 1 :], result.held[layer + 1 :]
            positions = gather_tokens((1 + positions)[..., None].contiguous(), index)[..., 0] - 1
        layer += 1
    return result
