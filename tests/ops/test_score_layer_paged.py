"""score_layer_paged: score_layer of prompts of any lengths, with keys in pages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import claa_ops
from claa_ops import reference
from support.fakes import assert_refuses
from support.inputs import (
    FLOATS,
    assert_no_further,
    assert_same_bits,
    assert_same_bits_on_any_run,
    normal,
)
from support.pages import (
    LAYOUTS,
    OUT_OF_RANGE,
    as_dense,
    in_pages,
    keys_of_lengths,
    rejections,
    valid_call,
)

score_layer_paged = claa_ops.score_layer_paged

MODES = ["avg", "max"]
SIZES = [16, 32, 64, 128, 256]
E4M3 = torch.float8_e4m3fn


def queries(prompts: int, window: int, heads: int, dim: int, *, device: str, **kind) -> Tensor:
    return normal(prompts, window, heads, dim, device=device, **kind)


def running_for(lengths: list[int], window: int, *, device: str, more: int = 0) -> Tensor:
    """Some entries above all scores, some among them, some below; room for `more` tokens."""
    most = max(1, max(lengths) - window + more)
    return normal(len(lengths), most, device=device, seed=9) / 50


def assert_is_each_prompt_alone(
    running: Tensor, query: Tensor, keys: list[Tensor], paged: tuple, *, exact: bool, **options
) -> None:
    """In the columns of each context what score_layer gives; all others are untouched."""
    expected = running.clone()
    for row, (key, row_query) in enumerate(zip(keys, query, strict=True)):
        context = len(key) - query.shape[1]
        if context > 0:
            claa_ops.score_layer(
                expected[row : row + 1, :context],
                row_query.transpose(0, 1)[None],
                as_dense(key),
                **options,
            )
    assert score_layer_paged(running, query, *paged, **options) is None
    if exact:
        assert_same_bits(running, expected)
    else:
        torch.testing.assert_close(running, expected, rtol=1e-5, atol=1e-6)


def edges(window: int, size: int) -> list[int]:
    """Lengths at which something begins or ends."""
    near = [0, 1, window - 1, window, window + 1, window + 2]
    return near + [size - 1, size, size + 1, 3 * size, 5 * size + window, 700 + size]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_is_each_prompt_alone(dtype, size, layout, device):
    lengths = edges(8, size)
    query = queries(len(lengths), 8, 8, 64, device=device, dtype=dtype)
    keys = keys_of_lengths(lengths, 2, 64, device=device, dtype=dtype, seed=1)
    paged = in_pages(keys, size, layout=layout, capacity=2000)
    running = running_for(lengths, 8, device=device, more=100)
    assert_is_each_prompt_alone(running, query, keys, paged, exact=True)


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize(
    "shape",  # heads, kv_heads, window, dim
    [
        pytest.param((32, 8, 8, 128), id="llama-8b"),
        pytest.param((9, 3, 8, 64), id="smollm2"),
        pytest.param((4, 1, 16, 256), id="64-query-rows"),
        pytest.param((8, 2, 64, 128), id="256-query-rows"),
        pytest.param((8, 2, 9, 80), id="padding-rows"),
        pytest.param((6, 2, 5, 33), id="unaligned"),
    ],
)
def test_long_prompts(shape, pool_mode, device):
    """Enough keys for several ranges of a block and for more than one head of it."""
    heads, kv_heads, window, dim = shape
    lengths = [9000, 0, 333, 20_011, 4096]
    query = queries(5, window, heads, dim, device=device, dtype=torch.bfloat16)
    keys = keys_of_lengths(lengths, kv_heads, dim, device=device, dtype=torch.bfloat16, seed=1)
    exact = device == "cpu" or (window * heads // kv_heads <= 64 and dim % 8 == 0)
    for size in (16, 64):
        running = running_for(lengths, window, device=device) / 100
        paged = in_pages(keys, size)
        assert_is_each_prompt_alone(running, query, keys, paged, exact=exact, pool_mode=pool_mode)


@pytest.mark.parametrize("prompts", [1, 33, 300])
def test_many_prompts(prompts, device):
    """More than a warp has lanes, and more than one launch takes."""
    lengths = [(37 * r) % 211 for r in range(prompts - 1)] + [1500]
    query = queries(prompts, 8, 8, 128, device=device, dtype=torch.bfloat16)
    keys = keys_of_lengths(lengths, 2, 128, device=device, dtype=torch.bfloat16, seed=1)
    running = running_for(lengths, 8, device=device)
    assert_is_each_prompt_alone(running, query, keys, in_pages(keys, 16), exact=True)


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("kernel_size", [1, 3, 17, 35, 49, 65, 201, 257])
def test_any_kernel_size(kernel_size, pool_mode, device):
    lengths = [5, 300, 1333]
    query = queries(3, 6, 4, 64, device=device, dtype=torch.float16)
    keys = keys_of_lengths(lengths, 2, 64, device=device, dtype=torch.float16, seed=1)
    running = running_for(lengths, 6, device=device)
    assert_is_each_prompt_alone(
        running,
        query,
        keys,
        in_pages(keys, 16),
        exact=True,
        kernel_size=kernel_size,
        pool_mode=pool_mode,
    )


OPTIONS = [
    pytest.param({"scale": 0.3}, id="scale"),
    pytest.param({"scale": -0.1}, id="negative-scale"),
    pytest.param({"softcap": 1.5}, id="softcap"),
    pytest.param({"sink_logits": [-2.0, 0.0, 5.0, -torch.inf]}, id="sink-logits"),
    pytest.param({"scale": 0.4, "softcap": 3.0, "sink_logits": [1.0, 0.0, 5.0, 9.0]}, id="all"),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, dtype, device):
    lengths = [700, 9, 8, 64]
    options = {
        name: torch.tensor(value, device=device) if isinstance(value, list) else value
        for name, value in options.items()
    }
    query = queries(4, 8, 4, 40, device=device, dtype=dtype)
    keys = keys_of_lengths(lengths, 2, 40, device=device, dtype=dtype, seed=1)
    running = running_for(lengths, 8, device=device)
    paged = in_pages(keys, 32)
    assert_is_each_prompt_alone(running, query, keys, paged, exact=True, **options)


def double(x: object) -> object:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("key_dtype", [None, E4M3], ids=["same", "e4m3"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_reference(dtype, key_dtype, device):
    """Against float64, at most twice the error of eager PyTorch; e4m3 keys with their factor."""
    lengths = [500, 0, 77, 1030]
    query = queries(4, 8, 8, 128, device=device, dtype=dtype)
    keys = keys_of_lengths(lengths, 2, 128, device=device, dtype=key_dtype or dtype, seed=1)
    paged = in_pages(keys, 16)
    options = {"k_scale": torch.tensor([0.5], device=device)} if key_dtype else {}
    actual, eager = (running_for(lengths, 8, device=device) for _ in range(2))
    exact = eager.double()
    score_layer_paged(actual, query, *paged, **options)
    reference.score_layer_paged(eager, query, *paged, **options)
    exact_pages = paged.key_pages if key_dtype else paged.key_pages.double()
    reference.score_layer_paged(exact, query.double(), exact_pages, *paged[1:], **options)
    assert_no_further(actual, eager, exact)


@pytest.mark.parametrize("dim", [64, 128, 40, 33])
@pytest.mark.parametrize("dtype", FLOATS)
def test_e4m3_keys_are_the_keys_they_stand_for(dtype, dim, device):
    """Every number, subnormal ones too, with and without a factor."""
    numbers = torch.arange(256, dtype=torch.uint8, device=device)
    numbers = numbers[(numbers & 0x7F) != 0x7F].repeat(300 * 2 * dim // 254 + 1)
    keys = [numbers[: n * 2 * dim].view(n, 2, dim).contiguous().view(E4M3) for n in (300, 12)]
    query = queries(2, 8, 4, dim, device=device, dtype=dtype) / 100
    narrow, wide = (torch.zeros(2, 292, device=device) for _ in range(2))
    for k_scale in (None, torch.tensor(0.25, device=device)):
        score_layer_paged(narrow, query, *in_pages(keys, 16), k_scale=k_scale)
        same = in_pages([key.to(dtype) for key in keys], 16)
        scale = dim**-0.5 * (1.0 if k_scale is None else 0.25)
        score_layer_paged(wide, query, *same, scale=scale)
        torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=1e-6)
        assert wide[:, :4].gt(0).all()


def test_rows_of_a_larger_table(device):
    """The prompts that end in a step are some of the engine's requests, in any order."""
    lengths = [40, 300, 0, 90]
    keys = keys_of_lengths(lengths, 2, 64, device=device, dtype=torch.bfloat16, seed=1)
    key_pages, table, all_lengths = in_pages(keys, 16)
    query = queries(4, 8, 4, 64, device=device, dtype=torch.bfloat16)
    rows = torch.tensor([3, 1], dtype=torch.int32, device=device)
    running = torch.zeros(2, 292, device=device)
    score_layer_paged(
        running, query[rows], key_pages, table, all_lengths[rows.long()].contiguous(), rows=rows
    )
    expected = torch.zeros(4, 292, device=device)
    score_layer_paged(expected, query, key_pages, table, all_lengths)
    assert_same_bits(running, expected[rows])


def test_padding_rows_may_hold_anything(device):
    """A row of a padded batch: length 0, no pages, NaN queries, NaN in running."""
    keys = keys_of_lengths([60, 0], 2, 64, device=device, dtype=torch.float16, seed=1)
    query = queries(2, 8, 4, 64, device=device, dtype=torch.float16)
    query[1] = torch.nan
    running = torch.tensor([[0.0], [torch.nan]], device=device).repeat(1, 100)
    score_layer_paged(running, query, *in_pages(keys, 16))
    assert running[0, :52].gt(0).all() and running[0, 52:].eq(0).all()
    assert running[1].isnan().all()


def test_no_prompts_no_pages_no_room(device):
    query = queries(2, 8, 4, 16, device=device)
    paged = in_pages(keys_of_lengths([0, 0], 2, 16, device=device, dtype=torch.float32, seed=1), 16)
    running = torch.ones(2, 5, device=device)
    empty = paged.key_pages[:0], paged.block_table[:, :0], paged.lengths
    for tensors in (paged, empty):
        score_layer_paged(running, query, *tensors)
        score_layer_paged(running[:, :0], query, *tensors)
    score_layer_paged(running[:0], query[:0], paged.key_pages, *(x[:0] for x in paged[1:]))
    assert running.eq(1).all()


def test_nan_stays(device):
    """A NaN key of one prompt, in one head."""
    keys = keys_of_lengths([90, 90], 2, 64, device=device, dtype=torch.bfloat16, seed=1)
    keys[1][20, 1, 3] = torch.nan
    query = queries(2, 8, 4, 64, device=device, dtype=torch.bfloat16)
    running = torch.zeros(2, 82, device=device)
    score_layer_paged(running, query, *in_pages(keys, 16))
    assert running[1].isnan().all() and not running[0].isnan().any()


def test_runs_and_threads_agree_bit_for_bit(device):
    lengths = [2100, 1, 900]
    query = queries(3, 8, 6, 64, device=device)
    keys = keys_of_lengths(lengths, 3, 64, device=device, dtype=torch.float32, seed=1)
    paged = in_pages(keys, 16)

    def call() -> Tensor:
        running = running_for(lengths, 8, device=device)
        score_layer_paged(running, query, *paged)
        return running

    assert_same_bits_on_any_run(call)


@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    window=st.integers(1, 12),
    dim=st.sampled_from([8, 40, 64, 128]),
    size=st.sampled_from(SIZES),
    layout=st.sampled_from([param.values[0] for param in LAYOUTS]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    more=st.integers(0, 100),
    seed=st.integers(0, 2**16),
)
def test_any_lengths_in_any_pages(
    lengths, kv_heads, group, window, dim, size, layout, dtype, more, seed, device
):
    """Neither other prompts, nor pages, nor the room for longer ones change a bit."""
    query = queries(len(lengths), window, kv_heads * group, dim, device=device, dtype=dtype)
    keys = keys_of_lengths(lengths, kv_heads, dim, device=device, dtype=dtype, seed=seed)
    paged = in_pages(keys, size, layout=layout, capacity=max(lengths) + more, seed=seed)
    running = running_for(lengths, window, device=device, more=more)
    assert_is_each_prompt_alone(running, query, keys, paged, exact=True)


def test_a_captured_graph_replays_on_other_lengths(device):
    if device != "cuda":
        pytest.skip("needs a GPU")
    query = queries(3, 8, 8, 128, device=device, dtype=torch.bfloat16)
    paged = in_pages(
        keys_of_lengths([4000] * 3, 2, 128, device=device, dtype=torch.bfloat16, seed=1), 16
    )
    running = torch.zeros(3, 4000, device=device)
    graph = torch.cuda.CUDAGraph()
    score_layer_paged(running, query, *paged)
    with torch.cuda.graph(graph):
        score_layer_paged(running, query, *paged)
    for lengths in ([4000, 17, 0], [8, 9, 3999], [0, 0, 0]):
        paged.lengths.copy_(torch.tensor(lengths))
        running.zero_()
        graph.replay()
        expected = torch.zeros_like(running)
        score_layer_paged(expected, query, *paged)
        assert_same_bits(running, expected)
        assert running.gt(0).sum(1).tolist() == [max(0, n - 8) for n in lengths]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *rejections("W"),
        pytest.param({"kernel_size": 4}, "kernel_size must .*odd.*, got 4", id="even-kernel"),
        pytest.param({"kernel_size": 259}, "kernel_size must .*257, got 259", id="wide-kernel"),
        pytest.param({"softcap": -1.0}, "softcap must .*, got -1", id="softcap"),
        pytest.param(
            {"running": torch.zeros(1, 30)}, "running must have R = 2 .*, got 1", id="running-rows"
        ),
        pytest.param(
            {"running": torch.zeros(2, 30).half()},
            "running must have dtype float32, got float16",
            id="running-dtype",
        ),
        pytest.param(
            {"running": torch.zeros(30, 2).T},
            r"running must be contiguous.*, got strides \[1, 2\]",
            id="running-strides",
        ),
        pytest.param(
            {"sink_logits": torch.zeros(4)}, "sink_logits must .*8 like query, got 4", id="sinks"
        ),
    ],
)
def test_rejects(changes, message, device):
    assert_refuses("score_layer_paged", valid_call(torch.zeros(2, 30), changes, device), message)


def test_rejects_rows_that_overlap(device):
    running = torch.zeros(1, 30, device=device).expand(2, 30)
    message = r"running must .*overlap, got strides \[0, 1\]"
    call = valid_call(torch.zeros(2, 30), {}, device) | {"running": running}
    assert_refuses("score_layer_paged", call, message)


@pytest.mark.parametrize(("changes", "message"), OUT_OF_RANGE)
def test_the_cpu_rejects_what_is_out_of_range(changes, message):
    with pytest.raises(RuntimeError, match=f"^score_layer_paged: {message}"):
        score_layer_paged(**valid_call(torch.zeros(2, 30), changes, "cpu"))


def test_rejects_an_unknown_mode(device):
    with pytest.raises(ValueError, match="pool_mode must be one of avg, max; got 'mean'"):
        score_layer_paged(**valid_call(torch.zeros(2, 30), {"pool_mode": "mean"}, device))
