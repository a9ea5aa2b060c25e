"""A selection within its layer: the same answers, and nothing computed of what is dropped."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from claa_ops.huggingface import rows
from claa_ops.huggingface.replay import RecordedPrefill
from claa_ops.huggingface.rows import attention_of_rows, block_mask
from claa_ops.huggingface.work import count_work
from claa_ops.methods import CLAA, METHODS, FastKV, Hops, LazyLLM, Peak, Pruning, make_method
from claa_ops.prefill import ClaaCache, attach, prefill
from support import hand_loop
from support.families import MULTIMODAL, SERVED, build_family, missing
from support.tiny_models import SLIDING_WINDOW, build, generate, prompt

LENGTH = 80
CASES = [
    CLAA(keep=0.4, layer=1, last_n=2, first_full=1, in_layer=True),
    CLAA(keep=24, keep_kv=16, layer=0, first_full=0, in_layer=True),
    FastKV(keep=(0.6, 0.3), layer=(0, 2), num_sinks=2, in_layer=True),
    LazyLLM(keep=0.2, in_layer=True),
    Peak(keep=20, layer=2, in_layer=True),
]


@pytest.fixture(scope="module")
def model():
    return attach(build("llama"))


def size(logits):
    return logits.abs().max().item()


def assert_same(model, method, lengths, layers):
    """The method answers as it does with a selection after these layers."""
    ids, mask = prompt(*lengths)
    caches = [ClaaCache(model.config, each) for each in (replace(method, in_layer=False), method)]
    (tokens, logits), (found, within) = (
        generate(model, ids, cache, mask, steps=4) for cache in caches
    )
    assert [*caches[0].within] == [] and [*caches[1].within] == layers
    assert torch.equal(found, tokens)
    assert size(within - logits) <= 1e-5 * size(logits)
    assert caches[1].lengths == caches[0].lengths
    assert torch.equal(caches[1].state.positions, caches[0].state.positions)
    assert caches[1].state.lengths == caches[0].state.lengths


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(LENGTH,), (LENGTH, 55)], ids=["alone", "padded"])
@pytest.mark.parametrize("method", CASES, ids=lambda method: type(method).__name__)
def test_it_is_the_selection_after_the_layer(method, lengths, attention):
    model = attach(build("llama", attention))
    assert_same(model, method, lengths, list(method.selection_layers(4)))


IN_TURN = [name for name, kind in METHODS.items() if issubclass(kind, Pruning)]


@pytest.mark.parametrize(
    "name", [name for name in IN_TURN if name not in ("asl", "coarse", "oracle")]
)
def test_so_it_is_with_every_method_that_prunes(name, model):
    """But for ASL and Coarse, which refuse it, and the oracle, whose answer comes beforehand."""
    method = make_method(name, num_layers=4, keep=0.3, keep_least=0, in_layer=True)
    assert_same(model, method, (LENGTH, 55), [*method.selection_layers(4)])


@pytest.mark.parametrize(
    ("family", "layers"), [("qwen3_next", [1]), ("lfm2", [1]), ("falcon_h1", [])]
)
def test_a_layer_with_a_recurrence_is_not_selected_within(family, layers):
    """Layer 1 of the first two has attention alone; each of the third has both."""
    reason = missing(family, transformers.__version__)
    if reason is not None:
        pytest.skip(reason)
    method = Peak(keep=20, layer=1, in_layer=True)
    assert_same(attach(build_family(family)), method, (LENGTH, 55), layers)


def test_so_it_is_with_hidden_states(model):
    settings = {"keep": 20, "layer": 1, "least": 5, "num_seeds": 4, "in_layer": True}
    assert_same(model, Hops(states="hidden", **settings), (LENGTH, 55), [1])


@pytest.mark.parametrize("family", [*SERVED, *MULTIMODAL])
def test_so_it_is_in_every_family(family):
    reason = missing(family, transformers.__version__)
    if reason is not None:
        pytest.skip(reason)
    method = CLAA(keep=24, keep_kv=16, layer=1, last_n=2, first_full=0, in_layer=True)
    assert_same(attach(build_family(family)), method, (60, 41, 18), [1])


@pytest.mark.parametrize(
    ("family", "layer", "settings"),
    [("llama", 2, {}), ("llama", 0, {}), ("mistral", 1, {"sliding_window": SLIDING_WINDOW})],
)
def test_it_is_a_layer_by_hand(family, layer, settings):
    """In float64 and plain loops, of the kept tokens alone in the layer that selects."""
    model = attach(build(family))
    method = CLAA(keep=24, keep_kv=16, layer=layer, last_n=2, first_full=1, in_layer=True)
    ids, _ = prompt(60)
    by_hand = hand_loop.Settings(
        kept=24, capacity=16, layer=layer, last_n=2, first_full=1, in_layer=True, **settings
    )
    expected = hand_loop.generate(model, ids[0].tolist(), 4, by_hand)
    cache = ClaaCache(model.config, method)
    tokens, logits = generate(model, ids, cache, steps=4)
    assert cache.state.positions[0].tolist() == expected.positions
    assert tokens[0].tolist() == expected.tokens
    torch.testing.assert_close(
        logits[0].double(), torch.stack(expected.logits), atol=1e-3, rtol=1e-3
    )


def test_what_goes_through_a_module(model):
    """Of 80 tokens 20 continue, after layer 1."""
    seen = {}
    block = model.model.layers[1]
    modules = {"q": block.self_attn.q_proj, "v": block.self_attn.v_proj}
    modules |= {"o": block.self_attn.o_proj, "mlp": block.mlp, "next": model.model.layers[2].mlp}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].shape[1])
        )
        for name, module in modules.items()
    ]
    method = Peak(keep=20, layer=1, in_layer=True)
    with torch.no_grad():
        model(prompt(LENGTH)[0], past_key_values=ClaaCache(model.config, method))
    for handle in handles:
        handle.remove()
    assert seen == {"q": [80, 20], "v": [80, 20], "o": [20], "mlp": [20], "next": [20]}


def test_work_is_what_is_computed(model):
    ids, _ = prompt(LENGTH)
    method = Peak(keep=20, layer=1, in_layer=True)
    counter = FlopCounterMode(display=False)
    with counter:
        work = prefill(model, ids, method).work
    flops = counter.get_flop_counts()["Global"]
    products = sum(flops.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert 2 * (work.linear + work.head) == products
    after = prefill(model, ids, replace(method, in_layer=False))
    pairs = LENGTH * (LENGTH + 1) // 2 - int((after.positions + 1).sum())
    assert after.work.attention - work.attention == 2 * (4 * 8) * pairs > 0


def test_a_prompt_of_which_all_is_kept_is_the_plain_model(model):
    ids, _ = prompt(LENGTH)
    plain = generate(model, ids, steps=4)[1]
    cache = ClaaCache(model.config, CLAA(keep=1.0, layer=1, in_layer=True))
    assert torch.equal(generate(model, ids, cache, steps=4)[1], plain)
    assert not cache.within


@dataclass(frozen=True)
class Waiting(CLAA):
    """Looks in layers 1 and 2, and selects in the second."""

    def selects_within(self, state, layer):
        return layer in (1, 2)


def test_a_method_that_looks_in_vain_runs_the_whole_layer(model):
    ids, mask = prompt(LENGTH, 60)
    settings = {"keep": 0.3, "layer": 2, "last_n": 2, "first_full": 1}
    caches = [ClaaCache(model.config, kind(**settings)) for kind in (CLAA, Waiting)]
    logits, within = (generate(model, ids, cache, mask, steps=4)[1] for cache in caches)
    assert size(within - logits) <= 1e-5 * size(logits)
    assert caches[1].lengths == caches[0].lengths
    assert caches[1].within[1] is None and caches[1].within[2].shape == (2, 24)
    # Where nothing was selected, queries, keys and values are made twice.
    alone = prefill(model, ids[:1], Waiting(**settings))
    counter = FlopCounterMode(display=False)
    with counter:
        work = prefill(model, ids[:1], Waiting(**settings)).work
    flops = counter.get_flop_counts()["Global"]
    products = sum(flops.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert alone.work == work and 2 * (work.linear + work.head) == products


@dataclass(frozen=True)
class Impatient(Peak):
    """Would select within its layer, although it parks the hidden states behind it."""

    def selects_within(self, state, layer):
        return True


def test_a_method_that_parks_selects_after_its_layer(model):
    ids, mask = prompt(LENGTH, 60)
    settings = {"keep": 20, "layer": 1, "second_look": True}
    caches = [ClaaCache(model.config, kind(**settings)) for kind in (Peak, Impatient)]
    logits, others = (generate(model, ids, cache, mask, steps=4)[1] for cache in caches)
    assert torch.equal(logits, others)
    assert not caches[1].within and caches[1].parked.hidden.shape[1] == LENGTH


def test_hidden_states_and_a_later_turn(model):
    method = Peak(keep=20, layer=1, in_layer=True)
    ids, _ = prompt(LENGTH)
    cache = ClaaCache(model.config, method)
    with torch.no_grad():
        output = model(ids, past_key_values=cache, output_hidden_states=True)
        again = ClaaCache(model.config, replace(method, in_layer=False))
        expected = model(ids, past_key_values=again, output_hidden_states=True)
        turn = [model(ids[:, :9], past_key_values=each).logits for each in (cache, again)]
    assert [each.shape[1] for each in output.hidden_states][-2:] == [20, 20]
    for found, other in zip(output.hidden_states[-2:], expected.hidden_states[-2:], strict=True):
        torch.testing.assert_close(found, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*turn, atol=1e-4, rtol=1e-4)
    assert cache.look is None


@pytest.mark.parametrize("lengths", [(50,), (50, 41)], ids=["alone", "padded"])
def test_a_recorded_prefill_computes_it_as_a_whole(model, lengths):
    ids, mask = prompt(*lengths)
    recorded = RecordedPrefill(model, ids, mask)
    method = CLAA(keep=0.4, layer=1, last_n=2, first_full=1, in_layer=True)
    expected = prefill(model, ids, method, mask)
    found = recorded.run(method)
    assert torch.equal(found.logits, expected.logits)
    assert found.work == expected.work
    for row, tokens in enumerate(lengths):
        alone = prefill(model, ids[row : row + 1, -tokens:], method).work
        full = count_work(model, [tokens] * len(found.costs))
        share = (alone.linear + alone.attention) / (full.linear + full.attention)
        assert found.operation_shares()[row] == pytest.approx(share, rel=1e-12)
        assert found.work_shares()[row] == pytest.approx(alone.linear / full.linear, rel=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_it_compiles_into_one_graph_without_what_is_dropped(padded):
    torch.compiler.reset()
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def collect(graph, example):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    model = attach(build("llama", num_hidden_layers=3))
    compiled = torch.compile(
        model, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=collect)
    )
    ids, mask = prompt(60, 35) if padded else prompt(60)
    mask = mask if padded else None
    method = Peak(keep=20, layer=1, in_layer=True)
    caches = [ClaaCache(model.config, method) for _ in range(2)]
    logits, expected = (
        call(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits
        for call, cache in zip((compiled, model), caches, strict=True)
    )
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert caches[0].lengths == caches[1].lengths
    assert torch.equal(caches[0].state.positions, caches[1].state.positions)
    (graph,) = graphs
    products = [node for node in graph.graph.nodes if ".mm." in str(node.target)]  # no bmm
    tokens = [node.args[0].meta["val"].shape[0] // len(ids) for node in products]
    # Layer 0 has seven products of all; layer 1 makes queries, keys and values of all, and of
    # what is kept the query, the output and the MLP.
    assert tokens == [60] * 7 + [60] * 3 + [20] * 5 + [20] * 7 + [1]


def test_one_graph_serves_all_lengths():
    torch.compiler.reset()
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph

    model = attach(build("llama", num_hidden_layers=3))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for length in (60, 61, 130):
        caches = [ClaaCache(model.config, CASES[0]) for _ in range(2)]
        with torch.no_grad():
            logits, expected = (
                call(prompt(length)[0], past_key_values=cache).logits
                for call, cache in zip((compiled, model), caches, strict=True)
            )
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert len(graphs) == 1


def test_the_setting_is_true_or_false():
    with pytest.raises(ValueError, match="Peak: in_layer must be True or False, got 1"):
        Peak(in_layer=1)


# Attention of some rows.


def some_rows(tokens, kept, start, padding=0, heads=(4, 2)):
    """Query of all, key, value, index [B, k], of two rows."""
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (
        torch.randn(2, h, tokens, 16, generator=generator) for h in (heads[0], heads[1], heads[1])
    )
    first = [0, 0] if start is None else start.tolist()
    index = torch.stack(
        [(torch.randperm(tokens - f, generator=generator)[:kept] + f).sort()[0] for f in first]
    )
    index[0, :padding] = -1
    return query, key, value, index


ROWS = [
    (300, 60, None, 0),
    (300, 300, None, 0),
    (1000, 130, None, 0),
    (1000, 300, (0, 400), 0),
    (1000, 300, (130, 400), 150),
    (500, 5, (0, 490), 0),
]


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize(("tokens", "kept", "start", "padding"), ROWS)
def test_rows_are_rows_of_the_causal_attention(tokens, kept, start, padding, in_parts, monkeypatch):
    if in_parts:
        monkeypatch.setattr(rows, "_MASKED", 2 * tokens * 7)
    start = None if start is None else torch.tensor(start)
    query, key, value, index = some_rows(tokens, kept, start, padding)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    if start is not None:
        seen = torch.arange(tokens) >= start[:, None, None, None]
        mask = mask & seen | torch.eye(tokens, dtype=torch.bool)
    whole = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), mask, scale=0.3, enable_gqa=True
    )
    places = index.clamp_min(0)[:, None, :, None].expand(-1, 4, -1, 16)
    some = attention_of_rows(query.gather(2, places), key, value, index, start, 0.3)
    valid = (index >= 0)[:, None, :, None]
    assert some.isfinite().all()
    error = (some - whole.gather(2, places)) * valid
    assert error.abs().max() < 1e-5

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow like this, on the CPU
        flexible = flex_attention(
            query.gather(2, places),
            key,
            value,
            block_mask=block_mask(index, tokens, start),
            scale=0.3,
            enable_gqa=True,
        )
    assert flexible.isfinite().all()
    error = (flexible - whole.gather(2, places)) * valid
    assert error.abs().max() < 1e-5


@torch.no_grad()
def test_flex_attention_is_compiled_for_more_kinds_of_calls_than_torch_allows_by_itself():
    """For each dtype, head dimension and number of prompts anew."""
    torch.compiler.reset()
    index = torch.arange(0, 200, 3)[None]
    with torch._dynamo.config.patch(recompile_limit=1):
        for dim in (16, 32):
            query, key, value = torch.randn(3, 1, 2, 200, dim)
            mask = block_mask(index, 200, None)
            some = rows.flexible(query[:, :, ::3], key, value, mask, None).transpose(1, 2)
            whole = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            torch.testing.assert_close(some, whole[:, :, ::3], atol=1e-5, rtol=1e-5)


@pytest.fixture
def flexible(monkeypatch):
    """FlexAttention as on a GPU, but not compiled, which takes long."""

    def attend(*tensors, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return flex_attention(*tensors, **settings)

    monkeypatch.setattr(rows, "flex_fits", lambda *tensors: True)
    monkeypatch.setattr(rows, "_compiled", lambda: attend)


def test_flex_attention_is_an_op_that_torch_can_trace(monkeypatch):
    def attend(query, key, value, mask, scale):
        return query.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    monkeypatch.setattr(rows, "flexible", attend)
    query, key, value, index = some_rows(300, 60, torch.tensor([0, 70]))
    query = query[:, :, :60].transpose(1, 2).contiguous().transpose(1, 2)
    for start, scale in ((None, None), (torch.tensor([0, 70]), 0.3)):
        given = query, key, value, index, start, scale
        torch.library.opcheck(
            torch.ops.claa_attention.rows.default, given, test_utils="test_faketensor"
        )


@torch.no_grad()
def test_a_compiled_model_has_flex_attention_in_its_graph(flexible):
    """And still writes to its cache what it writes without."""
    torch.compiler.reset()
    model, graphs = attach(build("llama", num_hidden_layers=3)), []

    def collect(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=collect)
    method = Peak(keep=20, layer=1, in_layer=True)
    caches = [ClaaCache(model.config, method) for _ in range(2)]
    logits, expected = (
        call(prompt(LENGTH)[0], past_key_values=cache, logits_to_keep=1).logits
        for call, cache in zip((compiled, model), caches, strict=True)
    )
    assert sum("claa_attention.rows" in target for target in graphs[0]) == len(graphs) == 1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert caches[0].lengths == caches[1].lengths


@pytest.mark.parametrize(("tokens", "kept", "start", "padding"), ROWS)
def test_the_blocks_are_those_that_rows_see(tokens, kept, start, padding):
    start = None if start is None else torch.tensor(start)
    *_, index = some_rows(tokens, kept, start, padding)
    visible = torch.arange(tokens) <= index[:, :, None]
    if start is not None:
        visible &= torch.arange(tokens) >= start[:, None, None]
    mask = block_mask(index, tokens, start)
    for row in range(2):
        for block in range(-(-kept // 128)):
            partial, whole = (
                set(indices[row, 0, block, : counts[row, 0, block]].tolist())
                for counts, indices in (
                    (mask.kv_num_blocks, mask.kv_indices),
                    (mask.full_kv_num_blocks, mask.full_kv_indices),
                )
            )
            seen = [
                part.float().mean().item()
                for part in visible[row, block * 128 : block * 128 + 128].split(128, dim=1)
            ]
            assert not partial & whole
            assert all(seen[each] == 1 for each in whole)
            assert {each for each, share in enumerate(seen) if share} <= partial | whole
            # One block of padding is harmless; more would be waste.
            assert len([each for each in partial if not seen[each]]) <= 1
