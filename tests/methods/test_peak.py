"""Peak: its ranking against plain PyTorch, across selections, with sinks and padding."""

import dataclasses
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import claa_ops
from claa_ops import prefill
from claa_ops.methods import Peak

LAYERS, HEADS, GROUPS, TOKENS, DIM, WINDOW = 5, 4, 2, 40, 8, 4
METHOD = Peak(keep=12, layer=2, keep_kv=1.0, window=WINDOW, kernel_size=5, num_sinks=0)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    query = 3 * torch.randn(LAYERS, 2, HEADS, TOKENS, DIM)
    key = torch.randn(LAYERS, 2, GROUPS, TOKENS, DIM)
    return query, key


def attention(query, key):
    """[B, H, W, n]: the attention of the window to each token in one layer."""
    key = key.repeat_interleave(HEADS // GROUPS, dim=1)
    return (query[:, :, -WINDOW:] @ key.transpose(2, 3) / DIM**0.5).softmax(-1)


def pooled(peaks, kernel=5):
    context = peaks[..., :-WINDOW]
    return F.avg_pool1d(context[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]


def observed(method, query, key, layers, **options):
    length = key.shape[3]
    state = prefill.begin(method, num_layers=LAYERS, prompt_length=length, **options)
    for layer in range(layers):
        state.observe(layer, query[layer], key[layer])
        state.compress(layer, key[layer], key[layer])
        state.select(layer)
    return state


def test_importance_is_the_peak_over_layers_heads_and_window(tensors):
    query, key = tensors
    state = observed(METHOD, query, key, 3)
    every = torch.stack([attention(query[layer], key[layer]) for layer in range(3)])
    expected = pooled(every.amax(dim=(0, 2, 3)))
    torch.testing.assert_close(state.importance, expected)
    best = expected.topk(12 - WINDOW).indices.sort().values
    window = torch.arange(TOKENS - WINDOW, TOKENS).expand(2, -1)
    assert state.positions.tolist() == torch.cat([best, window], dim=1).tolist()


@pytest.mark.parametrize(
    "settings, peaks, scores",
    [
        ({"keep_kv": 1.0}, 3, 0),  # whole caches: nothing but the ranking is needed
        ({"keep_kv": 10}, 3, 3),  # as many entries as tokens continue
        ({"keep_kv": 10, "first_full": 2}, 3, 1),  # whole caches in layers 0 and 1
        ({"keep_kv": 6}, 3, 5),  # fewer: each cache is compressed, but no selection is to come
    ],
)
def test_nothing_is_computed_that_nothing_reads(tensors, monkeypatch, settings, peaks, scores):
    counted = [Mock(wraps=op) for op in (claa_ops.peak_attention, claa_ops.score_tokens)]
    monkeypatch.setattr("claa_ops.methods.peak.peak_attention", counted[0])
    monkeypatch.setattr("claa_ops.selection.layer.score_tokens", counted[1])
    query, key = tensors
    method = dataclasses.replace(METHOD, keep=10, **settings)
    state = observed(method, query, key, 3)
    for layer in (3, 4):
        seen = key[layer, :, :, :10]
        state.observe(layer, query[layer, :, :, :10], seen)
        state.compress(layer, seen, seen)
    assert [op.call_count for op in counted] == [peaks, scores]


def test_a_single_head_of_a_single_layer_is_enough(tensors):
    # One query of one head looks token 17 up in layer 0; nothing else does, before or after.
    query, key = (torch.zeros_like(tensor) for tensor in tensors)
    key[0, :, 0, 17, 0] = 10.0
    query[0, :, 1, -2, 0] = 10.0
    state = observed(METHOD, query, key, 3)
    assert state.importance.argmax(dim=1).tolist() == [15, 15]  # the run of 5 around it, tied
    for token in range(15, 20):
        assert (state.positions == token).any(dim=1).all()


def test_peaks_are_carried_over_a_selection(tensors):
    query, key = tensors
    staged = dataclasses.replace(METHOD, layer=(1, 3), keep=(20, 12))
    state = observed(staged, query, key, 2)
    first = state.positions
    chosen = first[:, None, :, None].expand(-1, HEADS, -1, DIM)
    kept_query, kept_key = (
        tensor.gather(3, chosen.expand(LAYERS, *chosen.shape)[:, :, : tensor.shape[2]])
        for tensor in tensors
    )
    for layer in (2, 3):
        state.observe(layer, kept_query[layer], kept_key[layer])
        state.compress(layer, kept_key[layer], kept_key[layer])
        state.select(layer)
    before = torch.stack([attention(query[layer], key[layer]) for layer in (0, 1)])
    after = torch.stack([attention(kept_query[layer], kept_key[layer]) for layer in (2, 3)])
    earlier = before.amax(dim=(0, 2)).gather(2, first[:, None].expand(-1, WINDOW, -1))
    expected = pooled(torch.maximum(earlier, after.amax(dim=(0, 2))).amax(dim=1))
    torch.testing.assert_close(state.importance, expected)
    best = expected.topk(12 - WINDOW).indices.sort().values
    assert state.positions[:, : 12 - WINDOW].tolist() == first.gather(1, best).tolist()


def test_caches_are_compressed_without_a_selection(tensors):
    query, key = tensors
    method = dataclasses.replace(METHOD, keep=1.0, keep_kv=10)
    state = prefill.begin(method, num_layers=LAYERS, prompt_length=TOKENS)
    for layer in range(LAYERS):
        state.observe(layer, query[layer], key[layer])
        assert state.compress(layer, key[layer], key[layer])[0].shape[2] == 10
        assert state.select(layer) is None


def test_sinks_are_kept(tensors):
    query, key = tensors
    state = observed(dataclasses.replace(METHOD, num_sinks=3), query, key, 3)
    assert state.positions[:, :3].tolist() == [[0, 1, 2]] * 2
    assert Peak().num_sinks == 4


def test_a_padded_row_ranks_as_it_does_alone(tensors):
    query, key = tensors
    padded = observed(METHOD, query, key, 3, start=torch.tensor([0, 7]))
    alone = observed(METHOD, query[:, 1:, :, 7:], key[:, 1:, :, 7:], 3)
    torch.testing.assert_close(padded.importance[1:, 7:], alone.importance)
    assert (padded.positions[1] - 7).tolist() == alone.positions[0].tolist()


def test_a_prompt_of_the_window_alone_is_kept_whole(tensors):
    query, key = tensors
    state = observed(METHOD, query[..., -WINDOW:, :], key[..., -WINDOW:, :], 3)
    assert state.positions is None
