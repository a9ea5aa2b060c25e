"""Laws that every kernel keeps on its device, whatever it computes."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import claa_ops
from support.inputs import assert_same_bits, normal
from support.model_calls import MAKERS, PACKED, Call, Maker

BATCH = 3
# Enough for several blocks, chunks and clusters on a GPU, and for several tiles on the CPU.
CONTEXTS = {"cpu": [523, 2003], "cuda": [5003, 40_009]}

each_call = pytest.mark.parametrize("make", MAKERS)


@pytest.fixture(params=[0, 1], ids=["short", "long"])
def context(request: pytest.FixtureRequest, device: str) -> int:
    return CONTEXTS[device][request.param]


@pytest.fixture
def cuda(device: str) -> str:
    if device != "cuda":
        pytest.skip("needs a GPU")
    return device


def assert_all_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


@pytest.fixture
def poison() -> Iterator[Callable[[bool], None]]:
    """New memory holds NaN, or the largest integer: outputs and scratch memory."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory

    def switch(on: bool) -> None:
        torch.use_deterministic_algorithms(on)
        torch.utils.deterministic.fill_uninitialized_memory = on

    yield switch
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@each_call
def test_every_element_is_written_and_no_other_is_read(make: Maker, context, poison, device):
    call = make(2, context, device, 0)
    expected = call()
    poison(True)
    assert all(torch.empty(9, device=device).isnan())
    for actual, output in zip(call(), expected, strict=True):
        assert torch.equal(actual, output)  # a NaN is equal to nothing


@each_call
def test_a_second_run_gives_the_same_bits(make: Maker, context, device):
    call = make(2, context, device, 0)
    expected = call()
    for _ in range(4):
        assert_all_same_bits(call(), expected)


MAKER = {param.id: param.values[0] for param in MAKERS}


@pytest.mark.parametrize(
    "name", ["select_topk", "select_topk-heads", "select_topk_packed", "compact_pages"]
)
@pytest.mark.parametrize("tokens", [20_011, 100_003, 300_007])
def test_a_second_run_over_rows_of_any_length_gives_the_same_bits(name, tokens, cuda):
    """Small and large clusters, and blocks that synchronise through device memory."""
    call = MAKER[name](2, tokens, cuda, 0)
    expected = call()
    for _ in range(4):
        assert_all_same_bits(call(), expected)


def row_of(x: object, batch: int, row: int) -> object:
    """One row of the batch, whose size is that of no other dimension."""
    if isinstance(x, Tensor) and batch in x.shape:
        return x.narrow(x.shape.index(batch), row, 1)
    return x


@pytest.mark.parametrize("make", [p for p in MAKERS if p.id.split("-")[0] not in PACKED])
def test_each_row_of_a_batch_is_the_row_alone(make: Maker, context, device):
    batch = 4
    call = make(batch, context, device, 0)
    together = call()
    for row in range(batch):
        alone = Call(
            call.op,
            tuple(row_of(x, batch, row) for x in call.args),
            {name: row_of(x, batch, row) for name, x in call.options.items()},
        )
        assert_all_same_bits(alone(), tuple(row_of(x, batch, row) for x in together))


@each_call
def test_a_captured_graph_replays_on_new_inputs(make: Maker, context, cuda):
    call = make(BATCH, context, cuda, 0)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for seed in (1, 2):
        other = make(BATCH, context, cuda, seed)
        for mine, new in zip(call.tensors(), other.tensors(), strict=True):
            mine.copy_(new)
        for output in outputs:
            output.fill_(-7)
        graph.replay()
        assert_all_same_bits(outputs, other())


@each_call
def test_waits_for_the_op_that_writes_its_inputs(make: Maker, context, cuda):
    """Launches overlap: a kernel is set up while the one before it still runs."""
    call = make(BATCH, context, cuda, 0)
    expected = call()

    def copied(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        rows = x.reshape(1, -1, x.shape[-1] if x.dim() > 1 else 1)
        return claa_ops.gather_tokens(rows, every_row[:, : rows.shape[1]]).view(x.shape)

    every_row = torch.arange(max(x.numel() for x in call.tensors()), device=cuda)[None]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        options = {name: copied(x) for name, x in call.options.items()}
        copy = Call(call.op, tuple(map(copied, call.args)), options)
        outputs = copy()
    for _ in range(3):
        for x in copy.tensors():
            x.zero_()
        graph.replay()
        assert_all_same_bits(outputs, expected)


@each_call
def test_streams_do_not_interfere(make: Maker, context, cuda):
    """The same op on two streams at once, each with inputs of its own."""
    calls = [make(BATCH, context, cuda, seed) for seed in (0, 1)]
    expected = [call() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results = []
    for _ in range(6):
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(call())
    torch.cuda.synchronize()
    for number, result in enumerate(results):
        assert_all_same_bits(result, expected[number % 2])


@each_call
def test_runs_where_its_tensors_are(make: Maker, context, cuda):
    """On the second GPU, while the first one is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = (make(2, context, f"cuda:{number}", 0)() for number in (0, 1))
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in second)
    assert_all_same_bits(tuple(x.to("cuda:0") for x in second), first)


@each_call
def test_a_refusal_is_the_same_on_both_devices_and_leaves_no_trace(make: Maker, cuda):
    messages = []
    for place in ("cpu", cuda):
        call = make(2, 100, place, 0)
        expected = call()
        for bad in (call.args[0].flatten()[0], call.args[0].to(torch.complex128)):
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            with pytest.raises(RuntimeError, match=f"^{call.op}: ") as refusal:
                getattr(claa_ops, call.op)(bad, *call.args[1:], **call.options)
            # An output is allocated before anything is launched.
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
            messages.append(str(refusal.value))
        assert_all_same_bits(call(), expected)
    assert messages[: len(messages) // 2] == messages[len(messages) // 2 :]


def test_an_index_out_of_range_is_a_device_assertion(cuda):
    """As in torch.gather. It destroys the CUDA context, so it runs in a process of its own."""
    script = (
        "import torch, claa_ops\n"
        "x = torch.zeros(1, 4, 8, device='cuda')\n"
        "claa_ops.gather_tokens(x, torch.tensor([[4]], device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode != 0
    assert "device-side assert" in result.stderr


# Beyond 2^31 elements, where 32-bit offsets would wrap. About 9 GB each.

BEYOND = 2**31


def noise(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda").normal_()


@pytest.mark.parametrize("op", ["score_window", "score_tokens", "peak_attention"])
def test_scores_of_more_keys_than_32_bits_count(op, cuda):
    """The last row of a batch, whose keys lie beyond the limit, is the row alone."""
    query = normal(3, 8, 8, 128, device=cuda, dtype=torch.bfloat16)
    key = noise(3, 8, 2**20, 128, dtype=torch.bfloat16)
    assert key.numel() > BEYOND and key[:2].numel() >= BEYOND
    together = getattr(claa_ops, op)(query, key)
    assert_same_bits(together[2:], getattr(claa_ops, op)(query[2:], key[2:].clone()))


def test_one_head_of_more_keys_than_32_bits_count(cuda):
    """Heads interleaved in memory: offsets within one head pass the limit."""
    query = normal(1, 9, 8, 128, device=cuda, dtype=torch.bfloat16)
    memory = noise(1, 2**21, 9, 128, dtype=torch.bfloat16)
    key = memory.transpose(1, 2)
    assert key.stride(2) * key.shape[2] > BEYOND
    scores = claa_ops.score_tokens(query, key)
    alone = claa_ops.score_tokens(query[:, 8:], memory[:, :, 8:].clone().transpose(1, 2))
    assert_same_bits(scores[:, 8:], alone)
    kept = torch.tensor([[0, 2**21 - 1, 2**20]], device=cuda)
    rows, _ = claa_ops.gather_kv(key, key, kept)
    assert torch.equal(rows, key[:, :, kept[0]])


def test_gathers_from_more_items_than_32_bits_count(cuda):
    x = torch.randint(256, (1, 2**20, 2049), dtype=torch.uint8, device=cuda)
    assert x.numel() > BEYOND
    kept = torch.tensor([[0, 2**20 - 1, 2**19 + 1]], device=cuda)
    assert torch.equal(claa_ops.gather_tokens(x, kept), x[:, kept[0]])


def test_scores_of_more_tokens_than_32_bits_count(cuda):
    """Rows 1024 and up lie beyond the limit."""
    scores = noise(1026, 2**21, dtype=torch.float32)
    assert scores[:1025].numel() > BEYOND
    last = scores[1025:].clone()
    kept = claa_ops.select_topk(scores, 1000)
    assert torch.equal(kept[1025:], claa_ops.select_topk(last, 1000))
    running = claa_ops.aggregate_scores(scores[:, :1000], scores[:, -1000:])
    assert torch.equal(running, torch.maximum(scores[:, :1000], scores[:, -1000:]))
    pooled = claa_ops.pool_heads(scores[None], 513)
    assert_same_bits(pooled[:, 512:], claa_ops.pool_heads(scores[None, 1024:].clone(), 1))
