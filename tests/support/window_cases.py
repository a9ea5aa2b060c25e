"""Cases for the two ops that score a window of queries: ``score_window`` and ``score_tokens``."""

import pytest
import torch
from torch import Tensor

from support.inputs import on_device

SHAPES = [  # batch, heads, kv_heads, window, total, dim
    pytest.param((1, 1, 1, 1, 2, 1), id="one-element"),
    pytest.param((2, 6, 2, 5, 203, 80), id="odd-sizes"),
    pytest.param((1, 9, 3, 8, 2047, 64), id="smollm2"),
    pytest.param((1, 32, 8, 8, 4096, 128), id="llama-8b"),
    pytest.param((1, 4, 1, 32, 1025, 128), id="one-kv-head"),
    pytest.param((2, 4, 2, 8, 8, 64), id="window-is-all"),
    pytest.param((0, 4, 2, 8, 64, 64), id="empty-batch"),
    pytest.param((2, 4, 2, 0, 16, 8), id="no-queries"),
]
# More than 64 query rows to a key head; in some, one head's rows lie in both halves of a tile.
WIDE_SHAPES = [
    pytest.param((1, 8, 2, 64, 1600, 128), id="256"),
    pytest.param((2, 8, 2, 33, 700, 64), id="160"),
    pytest.param((2, 6, 2, 37, 650, 80), id="120"),
    pytest.param((1, 1, 1, 200, 900, 256), id="200"),
]
DIMS = [1, 3, 64, 80, 96, 128, 256]
WINDOWS = [1, 2, 3, 7, 16, 31, 33, 64, 128]

# Four rows for every option: plain; padded; a start inside the window; nothing but padding.
OPTION_SHAPE = (4, 6, 2, 9, 700, 40)
START = [0, 137, 696, 700]
SINKS = [-2.0, 0.0, 1.0, 5.0, 9.0, -torch.inf]  # one for each head; -inf is no sink at all

OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"scale": 0.3}, id="scale"),
    pytest.param({"scale": -0.1}, id="negative-scale"),
    pytest.param({"start": START}, id="start"),
    pytest.param({"sliding_window": 1}, id="sees-itself"),
    pytest.param({"sliding_window": 5}, id="sliding-shorter-than-window"),
    pytest.param({"sliding_window": 100}, id="sliding"),
    pytest.param({"sliding_window": 10**6}, id="sliding-longer-than-prompt"),
    pytest.param({"softcap": 1.5}, id="softcap"),
    pytest.param({"sink_logits": SINKS}, id="sink_logits"),
    pytest.param(
        {
            "scale": 0.4,
            "start": START,
            "sliding_window": 500,
            "softcap": 3.0,
            "sink_logits": SINKS,
        },
        id="everything",
    ),
]


def as_tensors(options: dict, device: str) -> dict:
    """The same options, their lists as tensors."""
    return {
        name: torch.tensor(value, device=device) if isinstance(value, list) else value
        for name, value in options.items()
    }


def with_infinite_keys(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of which every 13th has a logit of -infinity for every query."""
    query, key = query.clone(), key.clone()
    query[..., 0] = query[..., 0].abs() + 0.1
    key[:, :, ::13, 0] = -torch.inf
    return query, key


def log_sum_exp(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    start: Tensor | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """The logsumexp that flash attention returns, here from float64: [B, H, W], without sinks."""
    heads, window, dim = query.shape[1:]
    kv_heads, total = key.shape[1:3]
    grouped = query.double().unflatten(1, (kv_heads, heads // kv_heads))
    logits = torch.einsum("bgqwd,bgnd->bgqwn", grouped, key.double()).flatten(1, 2)
    logits *= dim**-0.5 if scale is None else scale
    if softcap:
        logits = softcap * (logits / softcap).tanh()

    key_at = torch.arange(total, device=key.device)
    query_at = torch.arange(total - window, total, device=key.device)[:, None]
    hidden = key_at > query_at
    if sliding_window:
        hidden = hidden | (key_at <= query_at - sliding_window)
    hidden = hidden.expand(len(query), 1, window, total)
    if start is not None:
        hidden = hidden | (key_at < start[:, None, None, None])
    return logits.masked_fill(hidden, -torch.inf).logsumexp(-1).float()


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# What to change in query [2, 8, 4, 64] and key [2, 4, 16, 64], and what the op says to that.
REJECTED = [
    pytest.param(
        {"query": _zeros(2, 3)}, r"query must .*\[B, H, W, D\], got \[2, 3\]", id="query-rank"
    ),
    pytest.param(
        {"key": _zeros(4, 16, 64)}, r"key must .*\[B, G, N, D\], got \[4, 16, 64\]", id="key-rank"
    ),
    pytest.param(
        {"query": _zeros(2, 8, 4, 64, dtype=torch.float64)},
        "query must .*dtype.*, got float64",
        id="query-dtype",
    ),
    pytest.param(
        {"query": _zeros(2, 8, 4, 64, dtype=torch.int32)},
        "query must .*dtype.*, got int32",
        id="query-integer",
    ),
    pytest.param(
        {"query": _zeros(2, 8, 4, 64, dtype=torch.bfloat16)},
        "key must .*dtype bfloat16.*, got float32",
        id="key-dtype",
    ),
    pytest.param({"key": _zeros(3, 4, 16, 64)}, "key must .*2 like query, got 3", id="key-batch"),
    pytest.param({"key": _zeros(2, 4, 16, 32)}, "key must .*64 like query, got 32", id="head-dim"),
    pytest.param({"key": _zeros(2, 3, 16, 64)}, "G must divide H = 8, got 3", id="group"),
    pytest.param({"key": _zeros(2, 0, 16, 64)}, "G must divide H = 8, got 0", id="no-kv-heads"),
    pytest.param(
        {"key": _zeros(2, 4, 3, 64)}, "N must be at least W = 4, got 3", id="short-prompt"
    ),
    pytest.param(
        {"query": _zeros(2, 8, 64, 4).mT},
        r"query must be contiguous.*, got strides \[",
        id="query-strides",
    ),
    pytest.param(
        {"key": _zeros(2, 4, 64, 16).mT},
        r"key must be contiguous.*, got strides \[",
        id="key-strides",
    ),
    pytest.param({"start": _zeros(3).long()}, "start must .*2 like query, got 3", id="start-shape"),
    pytest.param({"start": _zeros(2)}, "start must .*dtype.*, got float32", id="start-dtype"),
    pytest.param({"lse": _zeros(2, 8, 5)}, "lse must .*4 like query, got 5", id="lse-shape"),
    pytest.param({"lse": _zeros(2, 8)}, r"lse must .*, got \[2, 8\]", id="lse-rank"),
    pytest.param(
        {"lse": _zeros(2, 8, 4, dtype=torch.bfloat16)},
        "lse must .*float32, got bfloat16",
        id="lse-dtype",
    ),
    pytest.param(
        {"sink_logits": _zeros(4)}, "sink_logits must .*8 like query, got 4", id="sinks-shape"
    ),
    pytest.param(
        {"sink_logits": _zeros(8, dtype=torch.float16)},
        "sink_logits must .*dtype.*, got float16",
        id="sinks-dtype",
    ),
    pytest.param({"sliding_window": -1}, "sliding_window must .*, got -1", id="sliding-window"),
    pytest.param({"softcap": -1.0}, "softcap must .*, got -1", id="softcap"),
]


def rejected_call(changes: dict, device: str) -> dict:
    """Valid arguments except for ``changes``."""
    call = {"query": _zeros(2, 8, 4, 64), "key": _zeros(2, 4, 16, 64)} | changes
    return on_device(call, device)
