"""The layers of a method in a model in which only some layers have attention."""

import pytest

from claa_ops.methods import CLAA, FastKV, FullKV, LazyLLM, Peak, PyramidInfer, UniPrefill

EVERY_FOURTH = range(3, 48, 4)  # 3, 7, ..., 47


@pytest.mark.parametrize(
    ("method", "counted", "after"),
    [
        (CLAA(layer=15), 3, {3: 15}),
        (CLAA(layer=18), 3, {3: 18}),
        (CLAA(layer=46), 10, {10: 46}),
        (CLAA(), 5, {5: 23}),  # 23 of 48 has attention
        (Peak(), 2, {2: 12}),  # 12 has none: ranked up to 11
        (FastKV(keep=(0.5, 0.2), layer=(8, 30)), (1, 6), {1: 8, 6: 30}),
        (LazyLLM(keep=0.1), (2, 5, 8), {2: 11, 5: 23, 8: 35}),
    ],
)
def test_a_layer_is_counted_among_those_with_attention(method, counted, after):
    moved, places = method.among(EVERY_FOURTH, 48)
    assert moved.layer == counted
    assert places == {**dict(enumerate(EVERY_FOURTH)), **after}
    moved.check(len(EVERY_FOURTH))


@pytest.mark.parametrize("method", [FullKV(), PyramidInfer(), CLAA(layer=2), Peak()])
def test_where_all_layers_have_attention_nothing_is_moved(method):
    moved, places = method.among(range(8), 8)
    assert moved is method
    assert places == {layer: layer for layer in range(8)}


def test_a_default_moves_to_where_it_can_be():
    for attending, layer in (((4, 5), 4), ((0, 5), 2), ((0, 1), 0)):  # it is 2 of 6
        moved, places = CLAA().among(attending, 6)
        assert (moved.layer, places[0]) == (0, layer)
    moved, places = UniPrefill().among((2, 6, 7), 8)  # of 8 layers after 1, 2, 3, 4, 5 and 6
    assert moved.layer == (0, 1)
    assert places == {0: 5, 1: 6, 2: 7}


@pytest.mark.parametrize("method", [CLAA(layer=0), CLAA(layer=2), UniPrefill(layer=(4, 5))])
def test_a_layer_that_cannot_be_is_refused(method):
    with pytest.raises(ValueError, match="counted among the layers that have attention: 3, 7, 11"):
        method.among(EVERY_FOURTH, 48)
