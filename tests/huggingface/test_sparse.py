"""Block-sparse attention of the layers that see the whole prompt, by hand and in models."""

import warnings
from dataclasses import replace
from math import sqrt

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from claa_ops.huggingface import attention, sparse
from claa_ops.huggingface.replay import RecordedPrefill
from claa_ops.huggingface.sparse import block_sparse_attention, choose_blocks, pairs_seen
from claa_ops.huggingface.work import count_work
from claa_ops.methods import CLAA, Hops, Peak
from claa_ops.prefill import ClaaCache, attach, prefill
from claa_ops.selection.budget import Budget
from support.tiny_models import build, generate, prompt

BLOCK = 8
SHARE = Budget.of(0.25)


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (sparse, attention):
        monkeypatch.setattr(module, "BLOCK", BLOCK)


def inputs(batch, tokens, heads=(4, 2)):
    generator = torch.Generator().manual_seed(tokens)
    return (
        torch.randn(batch, h, tokens, 16, generator=generator)
        for h in (heads[0], heads[1], heads[1])
    )


def by_hand(query, key, value, share, scale, block):
    """One prompt, [H, n, D], in plain loops and float64: output [H, n, D], and pairs of a head."""
    heads, tokens, _ = query.shape
    query, key, value = (x.double() for x in (query, key, value))
    # Blocks are counted from the end, so the first one may be short.
    ends = list(range(tokens, 0, -block))[::-1]
    blocks = [range(max(0, end - block), end) for end in ends]
    output, pairs = torch.zeros(heads, tokens, value.shape[2], dtype=torch.float64), 0
    for head in range(heads):
        keys, values = (x[head // (heads // key.shape[0])] for x in (key, value))
        for own, rows in enumerate(blocks):
            mean = query[head, list(rows)].mean(0)
            products = [float(keys[list(b)].mean(0) @ mean) for b in blocks[: own + 1]]
            always = {0, own, max(0, own - 1)}
            ranked = sorted(set(range(own + 1)) - always, key=lambda j: -products[j])
            number = own + 1
            count = number if number <= 4 else max(4, number * share.count // share.per)
            last = own == len(blocks) - 1
            seen = always | set(ranked if last else ranked[: count - len(always)])
            for row in rows:
                places = [p for j in sorted(seen) for p in blocks[j] if p <= row]
                logits = keys[places] @ query[head, row] * scale
                output[head, row] = logits.softmax(0) @ values[places]
                pairs += len(places)
    return output, pairs // heads


@pytest.mark.parametrize("tokens", [BLOCK * 12, BLOCK * 12 + 3, BLOCK * 5 - 1, 3])
def test_it_is_block_sparse_attention_by_hand(tokens, small_blocks):
    query, key, value = inputs(1, tokens)
    found = block_sparse_attention(query, key, value, SHARE)
    expected, pairs = by_hand(query[0], key[0], value[0], SHARE, 1 / sqrt(16), BLOCK)
    assert (found[0] - expected).abs().max() < 1e-5
    assert pairs_seen(tokens, SHARE) == pairs


def test_a_padded_row_is_the_row_alone(small_blocks):
    tokens, starts = 101, [0, 37, 96, 100]
    query, key, value = inputs(4, tokens)
    found = block_sparse_attention(query, key, value, SHARE, torch.tensor(starts), 0.3)
    assert found.isfinite().all()
    for row, start in enumerate(starts):
        alone = (x[row : row + 1, :, start:] for x in (query, key, value))
        expected = block_sparse_attention(*alone, SHARE, scale=0.3)
        assert (found[row, :, start:] - expected[0]).abs().max() < 1e-5


@pytest.mark.parametrize(("tokens", "start"), [(1500, None), (1536, None), (1500, (0, 700))])
def test_flex_attention_gets_the_same_blocks(tokens, start, monkeypatch):
    """On the CPU it makes all products, and hides what its lists of blocks do not have."""

    def flexible(query, key, value, block_mask, scale):
        tokens = block_mask.seq_lengths[0]
        dense = block_mask.to_dense().bool().repeat_interleave(128, 2).repeat_interleave(128, 3)
        inner = block_mask.mask_mod
        numbers = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        whole = torch.zeros_like(block_mask.to_dense().bool())
        listed = torch.arange(whole.shape[3]) < numbers[0][..., None]
        whole.scatter_(3, numbers[1].long(), listed)
        place = torch.arange(tokens)
        rows, columns = place[:, None], place
        # Whole blocks are those of which every pair is seen.
        for batch in range(query.shape[0]):
            pairs = inner(torch.tensor(batch), None, rows, columns)
            of_blocks = pairs.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).all(3).all(1)
            assert (of_blocks | ~whole[batch]).all()

        def seen(batch, head, row, column):
            return dense[batch, head, row, column] & inner(batch, head, row, column)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = flex_attention(
                query,
                key,
                value,
                block_mask=_masked(block_mask, seen),
                scale=scale,
                enable_gqa=True,
            )
        return output.transpose(1, 2).contiguous()

    def _masked(block_mask, seen):
        return type(block_mask).from_kv_blocks(
            block_mask.kv_num_blocks,
            block_mask.kv_indices,
            block_mask.full_kv_num_blocks,
            block_mask.full_kv_indices,
            mask_mod=seen,
            seq_lengths=block_mask.seq_lengths,
        )

    start = None if start is None else torch.tensor(start)
    query, key, value = inputs(2, tokens)
    expected = block_sparse_attention(query, key, value, SHARE, start)
    monkeypatch.setattr(sparse, "flex_fits", lambda *tensors: True)
    monkeypatch.setattr(sparse, "flexible", flexible)
    found = block_sparse_attention(query, key, value, SHARE, start)
    valid = torch.ones(2, 1, tokens, 1, dtype=torch.bool)
    if start is not None:
        valid = (torch.arange(tokens) >= start[:, None])[:, None, :, None]
    assert found.isfinite().all()
    assert ((found - expected) * valid).abs().max() < 1e-5


def test_it_is_an_op_that_torch_can_trace(monkeypatch):
    def attend(query, key, value, mask, scale):
        return query.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    monkeypatch.setattr(sparse, "flexible", attend)
    query, key, value = inputs(2, 700)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    for start in (None, torch.tensor([0, 70])):
        given = query, key, value, 1, 8, start, None
        torch.library.opcheck(
            torch.ops.claa_attention.blocks.default, given, test_utils="test_faketensor"
        )


def test_the_blocks_that_are_always_seen_and_how_many(small_blocks):
    query, key, _ = inputs(2, BLOCK * 20)
    start = torch.tensor([0, BLOCK * 3 + 2])
    chosen = choose_blocks(query, key, SHARE, start)
    for row, first in enumerate((0, 3)):
        for own in range(20):
            seen = chosen[row, :, own]
            assert not seen[:, own + 1 :].any() and not seen[:, :first].any()
            if own < first:
                continue
            assert seen[:, [first, own, max(first, own - 1)]].all()
            number = own - first + 1
            expected = number if own == 19 else min(number, max(4, number // 4))
            assert (seen.sum(1) == expected).all()


# In a model.


@pytest.fixture(scope="module")
def model():
    return attach(build("llama"))


LENGTH = BLOCK * 14 + 3


@pytest.mark.parametrize(
    "method",
    [
        CLAA(keep=1.0, layer=1),
        Peak(keep=30, layer=2),
        Hops(keep=30, layer=1, least=9, num_seeds=4, in_layer=True),
    ],
    ids=["all kept", "peak", "hops in layer"],
)
def test_a_prefill_whose_blocks_are_all_seen_is_exact(model, method, small_blocks, monkeypatch):
    ids, mask = prompt(LENGTH, 70)
    exact = generate(model, ids, ClaaCache(model.config, method), mask, steps=4)[1]
    method = replace(method, attention_share=0.25)
    cache = ClaaCache(model.config, method)
    sparse_logits = generate(model, ids, cache, mask, steps=4)[1]
    last = 4 if method.keep == 1.0 else method.layer + 1 - method.in_layer
    assert [*cache.sparse] == [*range(last)]
    assert (sparse_logits - exact).abs().max() > 1e-3 * exact.abs().max()
    monkeypatch.setattr(sparse, "LEAST", 99)
    every = generate(model, ids, ClaaCache(model.config, method), mask, steps=4)[1]
    assert (every - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("attention_name", ["sdpa", "eager"])
def test_a_padded_row_of_a_batch_is_the_row_alone(attention_name, small_blocks):
    model = attach(build("llama", attention_name))
    method = Peak(keep=0.3, layer=1, attention_share=0.25)
    lengths = (LENGTH, 90, 61)
    ids, mask = prompt(*lengths)
    batch = generate(model, ids, ClaaCache(model.config, method), mask, steps=4)[1]
    for row, length in enumerate(lengths):
        cache = ClaaCache(model.config, method)
        alone = generate(model, ids[row : row + 1, -length:], cache, steps=4)[1]
        assert cache.sparse
        torch.testing.assert_close(batch[row], alone[0], atol=1e-3, rtol=1e-3)


def test_work_counts_the_pairs_that_are_seen(model, small_blocks):
    ids, _ = prompt(LENGTH)
    method = Peak(keep=30, layer=1)
    exact = prefill(model, ids, method).work
    work = prefill(model, ids, replace(method, attention_share=0.25)).work
    assert work.linear == exact.linear
    whole = LENGTH * (LENGTH + 1) // 2
    fewer = 2 * (whole - pairs_seen(LENGTH, SHARE))  # in two layers
    assert exact.attention - work.attention == 2 * (4 * 8) * fewer > 0
    shares = {layer: SHARE for layer in range(4)}
    every = count_work(model, [LENGTH] * 4, sparse=shares).attention
    assert every == 4 * 2 * (4 * 8) * pairs_seen(LENGTH, SHARE)


def test_short_prompts_and_windows_stay_exact(small_blocks):
    method = CLAA(keep=1.0, layer=1, attention_share=0.25)
    model = attach(build("llama"))
    for length, layers in ((BLOCK * 4, []), (BLOCK * 4 + 1, [0, 1, 2, 3])):
        cache = ClaaCache(model.config, method)
        with torch.no_grad():
            model(prompt(length)[0], past_key_values=cache)
        assert [*cache.sparse] == layers
    alternating = attach(build("gemma3_text"))
    cache = ClaaCache(alternating.config, method)
    with torch.no_grad():
        alternating(prompt(LENGTH)[0], past_key_values=cache)
    assert [*cache.sparse] == [1, 3]  # those with full attention


def test_a_recorded_prefill_computes_it_as_a_whole(model, small_blocks):
    ids, mask = prompt(LENGTH, 70)
    method = Peak(keep=0.3, layer=1, attention_share=0.25)
    expected = prefill(model, ids, method, mask)
    found = RecordedPrefill(model, ids, mask).run(method)
    assert torch.equal(found.logits, expected.logits)


@torch.no_grad()
def test_it_is_one_compiled_graph(model, small_blocks):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    method = Peak(keep=30, layer=1, in_layer=True, attention_share=0.25)
    caches = [ClaaCache(model.config, method) for _ in range(2)]
    ids, _ = prompt(LENGTH)
    logits, expected = (
        call(ids, past_key_values=cache, logits_to_keep=1).logits
        for call, cache in zip((compiled, model), caches, strict=True)
    )
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert caches[0].sparse == caches[1].sparse == {0: SHARE}


@pytest.mark.parametrize("share", [0, 1.5, -0.1, True, "all"])
def test_the_share_is_a_rate(share):
    with pytest.raises(ValueError, match=r"Peak: attention_share must be a rate in \(0, 1\], got"):
        Peak(attention_share=share)
