"""Strides do not change a bit: a broadcast, sliced or transposed tensor gives what its copy gives.

Between the items of a view its memory holds NaN, which must not be read.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import claa_ops
from support.inputs import assert_same_bits, normal, queries_and_keys
from support.model_calls import UPDATED

# On Hopper groups of up to 64 query rows are scored by one kernel, larger ones by another.
WINDOWS = [1, 2, 8, 9, 16, 33, 64, 65, 72, 100, 128]
SCORES = ["score_window", "score_tokens", "score_layer"]
MOST_CONTEXT = {"cpu": 200, "cuda": 5000}

CASES = [pytest.param(op, window, id=f"{op}-w{window}") for op in SCORES for window in WINDOWS]
CASES += [pytest.param(op, 9, id=op) for op in claa_ops.__all__ if op not in SCORES]


class Layout(NamedTuple):
    """How a tensor lies in memory; its last dimension is contiguous."""

    order: tuple[int, ...]  # of the other dimensions, the outermost first
    steps: tuple[int, ...]  # how far the items of each of them are apart; 0 is one for all
    offset: int  # of the first item, in each dimension

    def of(self, x: Tensor) -> Tensor:
        """A view with the values of x, except where it is broadcast."""
        shape = x.shape
        for dim, step in enumerate(self.steps):
            x = x[(slice(None),) * dim + (slice(None, None if step else 1),)]
        steps = [max(1, step) for step in (*self.steps, 1)]
        sizes = [self.offset + n * step for n, step in zip(x.shape, steps, strict=True)]
        order = (*self.order, x.dim() - 1)
        unread = float("nan") if x.is_floating_point() else -7
        memory = torch.full([sizes[dim] for dim in order], unread, dtype=x.dtype, device=x.device)
        back = [order.index(dim) for dim in range(x.dim())]
        view = memory.permute(back)[tuple(slice(self.offset, None, step) for step in steps)]
        return view.copy_(x).expand(shape)


def layouts(rank: int, least_step: int = 0) -> st.SearchStrategy[Layout]:
    step = st.sampled_from([step for step in (0, 1, 1, 3) if step >= least_step])
    return st.builds(
        Layout,
        st.permutations(range(rank - 1)).map(tuple),
        st.tuples(*[step] * (rank - 1)),
        st.sampled_from([0, 1, 8]),
    )


def run(op: str, arguments: dict) -> tuple[Tensor, ...]:
    """The results, including what is updated in place."""
    out = getattr(claa_ops, op)(**arguments)
    updated = tuple(arguments.values())[: UPDATED.get(op, 0)]
    if out is None:
        return updated
    return (*out, *updated) if isinstance(out, tuple) else (out, *updated)


def takes_the_same_kernel(query: Tensor, key: Tensor) -> bool:
    """Whether the kernel for packed tensors takes these too, and so adds in the same order.

    On a GPU tensor cores need rows at multiples of 16 bytes; and where a row or the heads of a
    group are broadcast, Hopper's kernels leave the work to the portable one.
    """
    if not (suits_tensor_cores(query) and suits_tensor_cores(key)):
        return False
    if query.device.type == "cpu" or query.dtype == torch.float32:
        return True
    group = query.shape[1] // key.shape[1]
    return not (query.stride(2) == 0 or key.stride(2) == 0 or (query.stride(1) == 0 and group > 1))


def suits_tensor_cores(x: Tensor) -> bool:
    """Whether packed or not makes no difference to the kernel that takes it."""
    if x.device.type == "cpu" or x.dtype == torch.float32:
        return True
    return x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])


def assert_is_as_packed(op: str, arguments: dict) -> None:
    packed = {
        name: x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }
    is_exact = True
    if {
        "query",
        "key_pages",
    } <= arguments.keys():  # where any dimension is broadcast another kernel may take them
        is_exact = arguments["query"].device.type == "cpu"
    elif "query" in arguments:
        is_exact = takes_the_same_kernel(arguments["query"], arguments["key"])
    elif "states" in arguments:
        is_exact = suits_tensor_cores(arguments["states"])
    for strided, expected in zip(run(op, arguments), run(op, packed), strict=True):
        if is_exact:
            assert_same_bits(strided, expected)
        else:
            torch.testing.assert_close(strided, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lse_given", [False, True], ids=["measured", "lse"])
@pytest.mark.parametrize("heads", [4, 8])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("op", SCORES)
def test_one_query_head_for_all(op, window, heads, lse_given, dtype, device):
    """A query head of stride 0, with a key head for each."""
    context = MOST_CONTEXT[device]
    sizes = (1, heads, heads, window, context + window, 128)
    query, key = queries_and_keys(*sizes, device=device, dtype=dtype)
    arguments = {"query": query[:, :1].expand_as(query), "key": key}
    if op == "score_layer":
        arguments["running"] = torch.zeros(1, context, device=device)
    if lse_given:
        arguments["lse"] = normal(1, 1, window, device=device).expand(1, heads, window) + 8
    assert_is_as_packed(op, arguments)


def packed_arguments(
    batch: int, context: int, kept: int, random: Callable[..., Tensor]
) -> dict[str, dict]:
    """Of the ops on packed prompts and on pages: each request keeps ``kept`` of its tokens."""
    block, dim, kv_heads = 4, 40, 2
    blocks = -(-context // block)
    table = random(batch * blocks).argsort().view(batch, blocks) + 1
    pages = random(batch * blocks + 1, block, dim)
    heads = random(batch * blocks + 1, block, kv_heads, dim)
    starts = torch.arange(batch + 1, device=table.device) * kept
    index = random(batch, context).argsort(-1)[:, :kept].sort(-1).values.flatten()
    out = random(batch * kept, dim)
    lengths = torch.full_like(starts[1:], context)
    slots = random(batch * blocks * block).argsort()[: len(index)]
    return {
        "select_topk_packed": {
            "index": index.int(),
            "scores": random(batch, context),
            "lengths": lengths,
            "starts": starts,
        },
        "gather_rows": {"out": out, "x": random(context, dim), "index": index},
        "store_pages": {"pages": pages, "x": random(len(index), dim), "slots": slots},
        "gather_pages": {
            "out": out,
            "pages": pages,
            "block_table": table,
            "starts": starts,
            "index": index,
        },
        "kept_metadata": {
            "seq_lens": lengths.int(),
            "slots": torch.zeros_like(table[:, 0]),
            "logical_seq_lens": lengths + 1,
            "prompts": lengths,
            "kept": torch.full_like(lengths, kept - 1),
            "block_table": table,
            "block_size": block,
        },
        "compact_pages": {
            "key_pages": heads,
            "value_pages": heads[..., :24],
            "block_table": table,
            "starts": starts,
            "index": index.expand(kv_heads, -1),
        },
    }


@pytest.mark.parametrize(("op", "window"), CASES)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    dim=st.sampled_from([40, 64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_any_layout_of_any_argument(
    op, window, batch, kv_heads, group, dim, dtype, seed, data, device
):
    context = data.draw(st.integers(1, MOST_CONTEXT[device]), label="context")
    kept = data.draw(st.integers(1, context), label="kept")
    total, heads = context + window, kv_heads * group
    index_shape = data.draw(st.sampled_from([(batch, kept), (batch, kv_heads, kept)]))

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return normal(*shape, device=device, dtype=dtype, seed=seed + len(shape) * shape[0])

    def positions(*shape: int) -> Tensor:
        return random(*shape).mul(1e3).long().remainder(context + 1) - 1

    query = random(batch, heads, window, dim, dtype=dtype)
    key = random(batch, kv_heads, total, dim, dtype=dtype)
    scores = {"query": query, "key": key, "lse": random(batch, heads, window) + 8}
    if data.draw(st.booleans(), label="measured"):
        del scores["lse"]
    blocks = -(-total // 16)
    paged = {
        "query": random(batch, window, heads, dim, dtype=dtype),
        "key_pages": random(batch * blocks, 16, kv_heads, dim, dtype=dtype),
        "block_table": torch.arange(batch * blocks, device=device).int().view(batch, blocks),
        "lengths": torch.full((batch,), total, device=device).int(),
    }
    pooling = {"pool_mode": data.draw(st.sampled_from(["avg", "max"]))}
    arguments = {
        "score_window": scores,
        "score_tokens": scores | pooling,
        "score_layer": {"running": random(batch, context)} | scores | pooling,
        "pool_heads": {"scores": random(batch, heads, context), "num_kv_heads": kv_heads} | pooling,
        "aggregate_scores": {
            "running": random(batch, context),
            "scores": random(batch, kv_heads, context),
        },
        "select_topk": {"scores": random(batch, kv_heads, context), "k": kept},
        "gather_kv": {
            "key": key,
            "value": random(batch, kv_heads, total, dim),
            "index": positions(*index_shape),
        },
        "gather_tokens": {"x": random(batch, context, dim), "index": positions(batch, kept)},
        "peak_attention": {
            "query": query,
            "key": key,
            "running": random(batch, window, total).sigmoid() / 100,
        },
        "score_layer_paged": {"running": random(batch, context)} | paged | pooling,
        "peak_attention_paged": {"running": random(batch, window, total).sigmoid() / 100} | paged,
        # One hop: a later one has other seeds if rounding changes which of two scores is larger.
        "hop_tokens": {"scores": random(batch, context), "states": key, "hops": 1},
        "rank_variance": {"scores": random(window, batch, context), "k": kept},
        **packed_arguments(batch, context, kept, random),
    }[op]
    for number, (name, x) in enumerate(arguments.items()):
        if isinstance(x, Tensor) and name != "out":  # which is contiguous
            updated = number < UPDATED.get(op, 0)
            # States that are all the same are all their mean: only rounding gives them directions.
            # And requests that share their pages would move each other's rows.
            is_whole = updated or name in ("states", "block_table")
            layout = data.draw(layouts(x.dim(), least_step=int(is_whole)), label=name)
            arguments[name] = layout.of(x)
    assert_is_as_packed(op, arguments)
