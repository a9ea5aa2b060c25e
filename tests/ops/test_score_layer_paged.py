"""score_layer_paged: what peak_attention_paged has not. test_paged.py has what both promise."""

import pytest
import torch

import claa_ops
from support.fakes import assert_refuses
from support.inputs import FLOATS, normal
from support.paged_ops import SCORES
from support.pages import OUT_OF_RANGE, in_pages, keys_of_lengths, rejections, valid_call

score_layer_paged = claa_ops.score_layer_paged

MODES = ["avg", "max"]
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize(
    "shape",  # heads, kv_heads, window, dim
    [
        pytest.param((32, 8, 8, 128), id="llama-8b"),
        pytest.param((9, 3, 8, 64), id="smollm2"),
        pytest.param((4, 1, 16, 256), id="64-query-rows"),
        pytest.param((8, 2, 64, 128), id="256-query-rows"),
        pytest.param((8, 2, 9, 80), id="padding-rows"),
        pytest.param((8, 2, 8, 192), id="three-panels"),
        pytest.param((6, 2, 5, 33), id="unaligned"),
    ],
)
def test_long_prompts(shape, pool_mode, device):
    """Enough keys for several ranges of a block and for more than one head of it."""
    heads, kv_heads, window, dim = shape
    lengths = [9000, 0, 333, 20_011, 4096]
    query = normal(5, window, heads, dim, device=device, dtype=torch.bfloat16)
    keys = keys_of_lengths(lengths, kv_heads, dim, device=device, dtype=torch.bfloat16, seed=1)
    exact = device == "cpu" or (window * heads // kv_heads <= 64 and dim % 8 == 0)
    for size in (16, 64):
        running = SCORES.running_for(lengths, window, device=device) / 100
        paged = in_pages(keys, size)
        SCORES.assert_is_each_prompt_alone(
            running, query, keys, paged, exact=exact, pool_mode=pool_mode
        )


@pytest.mark.parametrize("pool_mode", MODES)
@pytest.mark.parametrize("kernel_size", [1, 3, 17, 35, 49, 65, 201, 257])
def test_any_kernel_size(kernel_size, pool_mode, device):
    lengths = [5, 300, 1333]
    query = normal(3, 6, 4, 64, device=device, dtype=torch.float16)
    keys = keys_of_lengths(lengths, 2, 64, device=device, dtype=torch.float16, seed=1)
    running = SCORES.running_for(lengths, 6, device=device)
    SCORES.assert_is_each_prompt_alone(
        running,
        query,
        keys,
        in_pages(keys, 16),
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
    query = normal(4, 8, 4, 40, device=device, dtype=dtype)
    keys = keys_of_lengths(lengths, 2, 40, device=device, dtype=dtype, seed=1)
    running = SCORES.running_for(lengths, 8, device=device)
    paged = in_pages(keys, 32)
    SCORES.assert_is_each_prompt_alone(running, query, keys, paged, **options)


@pytest.mark.parametrize("dim", [64, 128, 40, 33])
@pytest.mark.parametrize("dtype", FLOATS)
def test_e4m3_keys_are_the_keys_they_stand_for(dtype, dim, device):
    """Every number, subnormal ones too, with and without a factor."""
    numbers = torch.arange(256, dtype=torch.uint8, device=device)
    numbers = numbers[(numbers & 0x7F) != 0x7F].repeat(300 * 2 * dim // 254 + 1)
    keys = [numbers[: n * 2 * dim].view(n, 2, dim).contiguous().view(E4M3) for n in (300, 12)]
    query = normal(2, 8, 4, dim, device=device, dtype=dtype) / 100
    narrow, wide = (torch.zeros(2, 292, device=device) for _ in range(2))
    for k_scale in (None, torch.tensor(0.25, device=device)):
        score_layer_paged(narrow, query, *in_pages(keys, 16), k_scale=k_scale)
        same = in_pages([key.to(dtype) for key in keys], 16)
        scale = dim**-0.5 * (1.0 if k_scale is None else 0.25)
        score_layer_paged(wide, query, *same, scale=scale)
        torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=1e-6)
        assert wide[:, :4].gt(0).all()


def test_nan_stays(device):
    """A NaN key of one prompt, in one head."""
    keys = keys_of_lengths([90, 90], 2, 64, device=device, dtype=torch.bfloat16, seed=1)
    keys[1][20, 1, 3] = torch.nan
    query = normal(2, 8, 4, 64, device=device, dtype=torch.bfloat16)
    running = torch.zeros(2, 82, device=device)
    score_layer_paged(running, query, *in_pages(keys, 16))
    assert running[1].isnan().all() and not running[0].isnan().any()


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
    assert_refuses(
        "score_layer_paged", valid_call(torch.zeros(2, 30), changes, device), message, device
    )


def test_rejects_rows_that_overlap(device):
    running = torch.zeros(1, 30, device=device).expand(2, 30)
    message = r"running must .*overlap, got strides \[0, 1\]"
    call = valid_call(torch.zeros(2, 30), {}, device) | {"running": running}
    assert_refuses("score_layer_paged", call, message, device)


@pytest.mark.parametrize(("changes", "message"), OUT_OF_RANGE)
def test_the_cpu_rejects_what_is_out_of_range(changes, message):
    with pytest.raises(RuntimeError, match=f"^score_layer_paged: {message}"):
        score_layer_paged(**valid_call(torch.zeros(2, 30), changes, "cpu"))


def test_rejects_an_unknown_mode(device):
    with pytest.raises(ValueError, match="pool_mode must be one of avg, max; got 'mean'"):
        score_layer_paged(**valid_call(torch.zeros(2, 30), {"pool_mode": "mean"}, device))
