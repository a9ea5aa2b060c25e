"""The arithmetic of cache groups, against vLLM's own where it is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from claa_ops.vllm.groups import Groups, HiddenPages, layers_near

COUNTS = [(a, b) for a in range(1, 26) for b in range(1, 26)]


def deal(specs: dict[str, Any]) -> list[Any]:
    """The groups to which vLLM deals layers."""
    try:
        import vllm.v1.core.kv_cache_planning as owner
    except ImportError:  # before 0.33
        import vllm.v1.core.kv_cache_utils as owner
    return owner._get_kv_cache_groups_uniform_page_size(specs)


def test_groups_are_those_of_vllm():
    pytest.importorskip("vllm.version", reason="vLLM is not in this environment: make test-vllm")
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from claa_ops.selection import Budget
    from claa_ops.vllm.spec import HiddenSpec, KeptAttentionSpec

    full = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    kept = KeptAttentionSpec.of(full, Budget(1, 10), 8)
    for front, back in COUNTS:
        groups = Groups(front, back)
        hidden = HiddenSpec.of(full, width=512, layers=groups.size, window=8)
        specs = {f"front.{i}": full for i in range(front)}
        specs |= {f"back.{i}": kept for i in range(back)}
        specs |= {f"hidden.{i}": hidden for i in range(groups.size)}
        dealt = deal(specs)
        of = [type(group.kv_cache_spec) for group in dealt]
        assert of.count(FullAttentionSpec) == groups.front_groups
        assert of.count(KeptAttentionSpec) == groups.back_groups
        assert of.count(HiddenSpec) == 1  # hidden states are neither split nor padded
        assert max(len(group.layer_names) for group in dealt) == groups.size


def test_groups_with_compressed_caches_are_those_of_vllm():
    pytest.importorskip("vllm.version", reason="vLLM is not in this environment: make test-vllm")
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from claa_ops.selection import Budget
    from claa_ops.vllm.spec import CompressedAttentionSpec, HiddenSpec, KeptAttentionSpec

    full = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    budget = Budget(1, 10)
    some = CompressedAttentionSpec.of(full, budget, 8, 0, budget)
    kept = KeptAttentionSpec.of(full, budget, 8)
    for whole, compressed, back in [(0, 8, 24), (4, 12, 16), (4, 5, 7), (1, 4, 3), (3, 20, 9)]:
        groups = Groups(whole + compressed, back, compressed)
        hidden = HiddenSpec.of(full, width=512, layers=groups.size, window=8)
        specs = {f"whole.{i}": full for i in range(whole)}
        specs |= {f"some.{i}": some for i in range(compressed)}
        specs |= {f"back.{i}": kept for i in range(back)}
        specs |= {f"hidden.{i}": hidden for i in range(groups.size)}
        dealt = deal(specs)
        of = [type(group.kv_cache_spec) for group in dealt]
        assert of.count(CompressedAttentionSpec) == groups.compressed_groups
        assert of.count(FullAttentionSpec) == groups.front_groups - groups.compressed_groups
        assert of.count(KeptAttentionSpec) == groups.back_groups
        assert of.count(HiddenSpec) == 1


def test_compressed_caches_hold_their_share():
    groups = Groups(8, 24, compressed=8)
    assert groups.pages(0.1, 0.2) == pytest.approx(8 * 0.2 + 24 * 0.1)
    assert groups.waste(0.1, 0.2) == pytest.approx(0)
    assert groups.gain(0.1, 0.1) == pytest.approx(10)
    deferred = Groups(16, 16, compressed=12)  # 4 | 4 4 4 | 4 4 4 4
    assert (deferred.size, deferred.padding) == (4, 0)
    assert deferred.pages(0.1, 0.2) == pytest.approx(4 + 12 * 0.2 + 16 * 0.1)
    near = dict(layers_near(7, num_layers=32, keep=0.1, reach=1, keep_kv=0.2, first_full=4))
    assert near[7] == Groups(8, 24, compressed=4)


def test_padding_is_what_no_layer_has():
    assert [Groups(16, 16).padding, Groups(10, 20).padding] == [0, 0]
    assert Groups(9, 21).padding == 6  # 9 | 7 7 7
    assert Groups(21, 9).padding == 6
    assert Groups(12, 13).padding == 1  # of 13 each


def test_waste_and_gain_are_shares_of_the_pages_held():
    groups = Groups(8, 24)
    assert groups.waste(0.1) == pytest.approx(0)
    assert groups.gain(0.1) == pytest.approx(32 / (8 + 2.4))
    padded = Groups(9, 21)
    assert padded.pages(0.1) == pytest.approx(9 + 27 * 0.1)
    assert padded.waste(0.1) == pytest.approx(1 - (9 + 21 * 0.1) / (9 + 27 * 0.1))


@given(layer=st.integers(0, 38), reach=st.integers(0, 6), keep=st.sampled_from([0.05, 0.2, 1.0]))
def test_layers_near_are_all_and_the_least_waste_is_first(layer, reach, keep):
    near = layers_near(layer, num_layers=40, keep=keep, reach=reach)
    assert sorted(at for at, _ in near) == list(
        range(max(0, layer - reach), min(38, layer + reach) + 1)
    )
    assert all(groups == Groups(at + 1, 39 - at) for at, groups in near)
    wastes = [groups.waste(keep) for _, groups in near]
    assert wastes == sorted(wastes)


@given(
    width=st.integers(1, 600).map(lambda n: 16 * n),
    layers=st.integers(1, 40),
    block_size=st.sampled_from([16, 32, 64, 128]),
    heads=st.integers(1, 8),
    dim=st.sampled_from([64, 80, 128]),
)
def test_hidden_states_fit_and_fill_the_pages(width, layers, block_size, heads, dim):
    entry = 2 * heads * dim
    if width > layers * block_size * entry:
        with pytest.raises(ValueError, match="a block must hold the"):
            HiddenPages.fit(width=width, layers=layers, block_size=block_size, entry=entry)
        return
    pages = HiddenPages.fit(width=width, layers=layers, block_size=block_size, entry=entry)
    assert pages.columns * layers >= width
    assert pages.tokens * pages.columns == block_size * entry  # no byte of a page is left over
    assert pages.tokens % block_size == 0 or block_size % pages.tokens == 0
    assert pages.columns % 2 == 0  # vLLM takes a slice for a key and a value


@pytest.mark.parametrize(("front", "back"), [(0, 4), (4, 0)])
def test_groups_refuse_a_model_without_one_half(front, back):
    with pytest.raises(ValueError, match=f"got {front} before and {back} after"):
        Groups(front, back)


@pytest.mark.parametrize("layer", [-1, 31])
def test_layers_near_refuses_a_layer_that_cannot_select(layer):
    with pytest.raises(ValueError, match=rf"layer must be in \[0, 30\], got {layer}"):
        layers_near(layer, num_layers=32, keep=0.1)
