"""The model path on a GPU: SDPA's back ends and their logsumexp, compiled and captured prefill."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CompileConfig

import claa_ops
from claa_ops.huggingface import logsumexp
from claa_ops.huggingface.logsumexp import attention_and_logsumexp
from claa_ops.huggingface.rows import attention_of_rows
from claa_ops.huggingface.static import StaticClaaCache
from claa_ops.methods import CLAA
from claa_ops.prefill import ClaaCache, PrefillState, attach
from support.tiny_models import build, generate, prompt
from support.window_cases import log_sum_exp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

METHOD = CLAA(keep=0.4, layer=1, last_n=2, first_full=1)
WITH_LSE = [
    pytest.param(SDPBackend.FLASH_ATTENTION, id="flash"),
    pytest.param(SDPBackend.CUDNN_ATTENTION, id="cudnn"),
]
WITHOUT_LSE = [
    pytest.param(SDPBackend.EFFICIENT_ATTENTION, id="efficient"),
    pytest.param(SDPBackend.MATH, id="math"),
]
# Efficient attention takes no groups of heads.
HEADS = {SDPBackend.EFFICIENT_ATTENTION: 4}


def model_for(backend: SDPBackend | None = None, dtype: torch.dtype = torch.bfloat16):
    """A tiny model with heads that every back end serves."""
    settings = {"head_dim": 64, "num_key_value_heads": HEADS.get(backend, 2)}
    return build("llama", **settings).to("cuda", dtype)


def on_gpu(*lengths: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = prompt(*lengths, seed=seed)
    return ids.cuda(), mask.cuda()


@torch.no_grad()
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_protected_tokens_are_kept_wherever_their_mask_is(where):
    ids, mask = on_gpu(200, 150)
    protect = torch.zeros(2, 200, dtype=torch.bool, device=where)
    protect[0, 20:80] = protect[1, 150:160] = True
    prefilled = claa_ops.prefill.prefill(model_for(), ids, METHOD, mask, protect=protect)
    kept = prefilled.positions
    for row, share in enumerate([60 + 140 * 2 // 5, 10 + 140 * 2 // 5]):
        assert int((kept[row] >= 0).sum()) == share
        assert torch.isin(protect[row].nonzero()[:, 0].cuda(), kept[row]).all()


@pytest.fixture
def observed(monkeypatch):
    """What the attention shows to the method: (query, key, lse) of each layer."""
    seen = []
    observe = PrefillState.observe

    def spy(state, layer, query, key, *, lse=None, **options):
        seen.append((query, key, lse))
        return observe(state, layer, query, key, lse=lse, **options)

    monkeypatch.setattr(PrefillState, "observe", spy)
    return seen


@pytest.mark.parametrize("backend", WITH_LSE)
@pytest.mark.parametrize("dim", [8, 64, 80, 128])
def test_it_is_the_attention_of_sdpa_and_its_logsumexp(dim, backend):
    query, key, value = (
        torch.randn(2, 300, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (6, 2, 2)
    )
    with sdpa_kernel(backend):
        output, lse = attention_and_logsumexp(query, key, value, 0.2)
        plain = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.2, enable_gqa=True
        )
    assert torch.equal(output, plain)
    torch.testing.assert_close(lse, log_sum_exp(query, key, scale=0.2), atol=1e-4, rtol=1e-5)


def test_no_logsumexp_where_it_costs_more_than_it_saves(monkeypatch):
    monkeypatch.setattr(logsumexp, "CUDNN_TOKENS", 299)
    query = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        assert attention_and_logsumexp(query, query, query) is None
        assert attention_and_logsumexp(*[query[:, :, :299]] * 3) is not None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert attention_and_logsumexp(query, query, query) is not None


@pytest.mark.parametrize("backend", WITHOUT_LSE)
def test_other_back_ends_are_left_to_sdpa(backend):
    query = torch.randn(1, 2, 30, 64, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(backend):
        assert attention_and_logsumexp(query, query, query) is None
    assert attention_and_logsumexp(query.float(), query.float(), query.float()) is None
    assert attention_and_logsumexp(query[..., :60], query[..., :60], query[..., :60]) is None


@torch.no_grad()
@pytest.mark.parametrize("backend", WITH_LSE + WITHOUT_LSE)
def test_keeping_everything_is_the_plain_model(backend, observed):
    """Bit for bit: the logsumexp comes from the kernel that the plain model runs."""
    ids, _ = on_gpu(200)
    model, attached = model_for(backend), attach(model_for(backend))
    observed.clear()
    with sdpa_kernel(backend):
        plain = model(ids).logits
        cache = ClaaCache(model.config, CLAA(keep=1.0, layer=1))
        assert torch.equal(attached(ids, past_key_values=cache).logits, plain)
    assert len(observed) == 4
    for query, key, lse in observed:
        if backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
            assert lse is None
        else:
            expected = log_sum_exp(query, key)
            torch.testing.assert_close(lse, expected, atol=1e-3, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backend", WITH_LSE)
def test_scores_with_the_logsumexp_are_the_scores_without(backend, observed):
    ids, _ = on_gpu(200)
    model = attach(model_for())
    observed.clear()
    cache = ClaaCache(model.config, METHOD, keep_scores=True)
    with sdpa_kernel(backend):
        model(ids, past_key_values=cache)
    for layer, scores in cache.state.scores.items():
        query, key, lse = observed[layer]
        assert lse is not None
        without = claa_ops.score_tokens(query[:, :, -METHOD.window :], key).amax(dim=1)
        torch.testing.assert_close(scores, without, atol=1e-5, rtol=1e-3)
    assert cache.lengths == [200, 80, 80, 80]


@torch.no_grad()
def test_a_padded_row_is_the_row_alone(observed):
    """A mask goes to SDPA as it is, without a logsumexp."""
    ids, mask = on_gpu(200, 130)
    model = attach(model_for(dtype=torch.float32))
    observed.clear()
    method = CLAA(keep=60, layer=1, last_n=2, first_full=1)
    _, logits = generate(model, ids, ClaaCache(model.config, method), mask)
    assert all(lse is None for _, _, lse in observed)
    _, alone = generate(model, ids[1:, -130:], ClaaCache(model.config, method))
    torch.testing.assert_close(logits[1:], alone, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_prefill_is_one_compiled_graph():
    torch.compiler.reset()
    model = attach(model_for(dtype=torch.float32))
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    ids, _ = on_gpu(200)
    caches = [ClaaCache(model.config, METHOD) for _ in range(2)]
    logits = compiled(ids, past_key_values=caches[0], logits_to_keep=1).logits
    expected = model(ids, past_key_values=caches[1], logits_to_keep=1).logits
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(caches[0].state.positions, caches[1].state.positions)
    assert caches[0].lengths == caches[1].lengths


@torch.no_grad()
@pytest.mark.parametrize("backend", WITH_LSE)
@pytest.mark.parametrize("in_layer", [False, True])
def test_a_captured_prefill_replays_on_other_prompts(backend, in_layer, observed):
    model = attach(model_for())
    method = replace(METHOD, in_layer=in_layer)

    def prefill(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = ClaaCache(model.config, method)
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        kept = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        return logits, cache.state.positions, *kept

    ids, _ = on_gpu(200)
    with sdpa_kernel(backend):
        prefill(ids)
        graph = torch.cuda.CUDAGraph()
        observed.clear()
        with torch.cuda.graph(graph):
            outputs = prefill(ids)
        assert [lse is None for _, _, lse in observed] == [False, in_layer, False, False]
        for seed in (1, 2):
            other, _ = on_gpu(200, seed=seed)
            ids.copy_(other)
            graph.replay()
            for actual, expected in zip(outputs, prefill(other), strict=True):
                assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_attention_of_rows_is_the_causal_attention_at_those_rows(padded, dtype):
    """FlexAttention, at several lengths, against float64."""
    for tokens, kept in ((3000, 500), (2048, 256), (4100, 130), (1000, 40), (200, 80), (300, 120)):
        query, key, value = (
            torch.randn(2, heads, tokens, 64, device="cuda", dtype=dtype) for heads in (6, 2, 2)
        )
        begins = (0, tokens // 4 if padded else 0)
        first = torch.tensor(begins, device="cuda") if padded else None
        index = torch.stack(
            [(torch.randperm(tokens - each)[:kept] + each).sort()[0] for each in begins]
        )
        index = index.cuda()
        if padded:
            index[1, :9] = -1
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril()[None, None]
        if first is not None:
            seen = torch.arange(tokens, device="cuda") >= first[:, None, None, None]
            mask = mask & seen | torch.eye(tokens, dtype=torch.bool, device="cuda")
        whole = F.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), mask, scale=0.2, enable_gqa=True
        )
        places = index.clamp_min(0)[:, None, :, None].expand(-1, 6, -1, 64)
        some = attention_of_rows(query.gather(2, places), key, value, index, first, 0.2)
        assert some.isfinite().all() and some.dtype == dtype
        error = (some - whole.gather(2, places)) * (index >= 0)[:, None, :, None]
        assert error.abs().max() < (3e-2 if dtype == torch.bfloat16 else 1e-2)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(250,), (250, 190)], ids=["one", "padded"])
def test_a_selection_within_a_layer_is_the_one_after_it(lengths):
    ids, mask = on_gpu(*lengths)
    model = attach(model_for(dtype=torch.float32))
    within = replace(METHOD, in_layer=True)
    (tokens, logits), (found, others) = (
        generate(model, ids, ClaaCache(model.config, method), mask) for method in (METHOD, within)
    )
    assert torch.equal(found, tokens)
    torch.testing.assert_close(others, logits, atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_a_selection_within_a_layer_compiles_into_one_graph():
    torch.compiler.reset()
    model = attach(model_for(dtype=torch.float32))
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    ids, _ = on_gpu(250)
    method = replace(METHOD, in_layer=True)
    caches = [ClaaCache(model.config, method) for _ in range(2)]
    logits = compiled(ids, past_key_values=caches[0], logits_to_keep=1).logits
    expected = model(ids, past_key_values=caches[1], logits_to_keep=1).logits
    torch.testing.assert_close(logits, expected, atol=1e-2, rtol=1e-2)
    assert torch.equal(caches[0].state.positions, caches[1].state.positions)
    assert caches[0].lengths == caches[1].lengths


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(200,), (200, 130)], ids=["one", "padded"])
def test_generate_compiles_static_decoding(lengths):
    torch.compiler.reset()
    model = attach(model_for(dtype=torch.float32))
    ids, mask = on_gpu(*lengths)
    tokens, logits = generate(model, ids, ClaaCache(model.config, METHOD), mask, steps=6)
    cache = ClaaCache(model.config, METHOD)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    model(ids, attention_mask=mask, position_ids=position, past_key_values=cache)
    ids = torch.cat([ids, tokens[:, :1]], dim=1)
    static_tokens, static_logits = generate(
        model,
        ids,
        StaticClaaCache(cache, max_new_tokens=6),
        torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
        steps=5,
        compile_config=CompileConfig(fullgraph=True, mode="reduce-overhead"),
    )
    assert torch.equal(static_tokens, tokens[:, 1:])
    torch.testing.assert_close(static_logits, logits[:, 1:], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_decoding_step_can_be_captured():
    """One graph, replayed for each token: the static cache counts on the device."""
    model = attach(model_for(dtype=torch.float32))
    ids, _ = on_gpu(200)
    tokens, _ = generate(model, ids, ClaaCache(model.config, METHOD), steps=8)
    cache = ClaaCache(model.config, METHOD)
    model(ids, past_key_values=cache)
    static = StaticClaaCache(cache, max_new_tokens=9)
    token, position = tokens[:, :1].clone(), torch.tensor([[200]], device="cuda")
    length, offset = static.get_mask_sizes(1, 0)
    column = torch.arange(offset, offset + length, device="cuda")

    def step() -> None:
        logits = model(
            token,
            attention_mask=(column <= position)[None, None],
            position_ids=position,
            past_key_values=static,
        ).logits
        token.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    step()
    decoded = [token.clone()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(6):
        graph.replay()
        decoded.append(token.clone())
    assert torch.equal(torch.cat(decoded, dim=1), tokens[:, 1:])
