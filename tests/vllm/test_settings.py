"""What ``additional_config["claa"]`` may say, and what is refused in one sentence."""

import pytest

from claa_ops.methods import CLAA, FastKV, Hops, Peak
from claa_ops.vllm.settings import parse


@pytest.mark.parametrize(
    ("given", "method", "layer", "observed"),
    [
        ({"method": "claa", "layer": 4}, CLAA, 4, (1, 2, 3, 4)),
        ({"method": "claa", "layer": 1}, CLAA, 1, (0, 1)),
        ({"method": "peak", "layer": 2, "keep": 64}, Peak, 2, (0, 1, 2)),
        ({"method": "fastkv"}, FastKV, 3, (3,)),
        ({"method": "hops", "layer": 1, "keep": 0.2}, Hops, 1, (0, 1)),
        ({"method": "claa_ops.methods:Peak"}, Peak, 2, (0, 1, 2)),
    ],
)
def test_a_method_by_name_and_the_layers_it_ranks_by(given, method, layer, observed):
    found = parse(given, 8)
    assert type(found.method) is method
    assert (found.layer, found.observed) == (layer, observed)


def test_what_is_kept_is_what_the_method_keeps():
    found = parse({"method": "peak", "keep": 0.1, "window": 16}, 8)
    lengths = [1, 15, 16, 17, 160, 161, 1000, 4321]
    assert [found.kept(length) for length in lengths] == [1, 15, 16, 16, 16, 16, 100, 432]


@pytest.mark.parametrize(
    ("given", "layers", "cached"),
    [
        ({"method": "peak", "keep": 0.1}, [], 1000),
        ({"method": "peak", "keep": 0.1, "keep_kv": 1.0}, [], 1000),
        ({"method": "peak", "keep": 0.1, "keep_kv": None}, [0, 1, 2], 100),
        ({"method": "claa", "layer": 5, "keep": 0.1, "keep_kv": 0.2}, [4, 5], 200),
        ({"method": "claa", "layer": 3, "keep": 0.1, "keep_kv": 0.2}, [], 1000),
        ({"method": "fastkv", "keep": 64, "keep_kv": 96}, [0, 1, 2, 3], 96),
    ],
)
def test_which_caches_are_compressed_and_to_how_much(given, layers, cached):
    found = parse(given, 8)
    assert list(found.compressed) == layers
    assert found.cached(1000, found.kept(1000)) == cached
    # A request that keeps more has as much in its caches, one that keeps all has all.
    assert found.cached(1000, 700) == max(cached, 700)
    assert found.cached(1000, 1000) == 1000


def test_a_number_of_entries_leaves_shorter_prompts_alone():
    found = parse({"method": "fastkv", "keep": 64, "keep_kv": 96}, 8)
    assert [found.kept(length) for length in (95, 96, 97)] == [95, 64, 64]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, 'must name a method, such as {"method": "peak"}, got None'),
        ({"keep": 0.1}, "must name a method"),
        ({"method": "peek"}, "did you mean 'peak'"),
        ({"method": "peak", "kep": 0.1}, "a setting must be one of"),
        ({"method": "peak", "keep": 1.5}, r"keep must be a rate in \(0, 1\] or a number of tokens"),
        ({"method": "peak", "layer": 7}, r"layer must be in \[0, 6\]"),
        ({"method": "claa", "layer": [2, 4], "keep": [0.4, 0.2]}, "layer must be a single layer"),
        ({"method": "claa", "keep_kv": 0.05}, "keep_kv must be 1.0, or at least keep .* got 0.05"),
        ({"method": "claa", "keep": 0.2, "keep_kv": 256}, "like it a rate or a number.* got 256"),
        ({"method": "peak", "keep_kv": 0.2, "equal_cache": True}, "equal_cache must be False in"),
        (
            {"method": "fastkv", "keep": 0.2, "rates_of": "layer"},
            "rates_of must be 'prompt' in vLLM, .* got 'layer'",
        ),
        ({"method": "peak", "mass": 0.9}, "mass must be None in vLLM"),
        ({"method": "peak", "second_look": True}, "second_look must be False in vLLM"),
        ({"method": "peak", "in_layer": True}, "in_layer must be False in vLLM"),
        ({"method": "peak", "attention_share": 0.5}, "attention_share must be 1 in vLLM"),
        ({"method": "hops", "states": "hidden"}, "by queries, keys and values, got Hops"),
        ({"method": "peak", "protect": "sytem"}, "protect must name any of system, .* got 'sytem'"),
        ({"method": "peak", "protect": 3}, "protect must name any of system, tools, .* got 3"),
        ({"method": "peak", "protect": ["system", 3]}, "protect must name any of system, tools"),
        ({"method": "gemfilter"}, "must drop tokens after a layer"),
        ({"method": "asl"}, "must select once, after a layer that is known at the start, got ASL"),
        ({"method": "lazyllm", "layer": 3, "keep": 0.2}, "must select once"),
        ({"method": "coarse", "keep": 0.2}, "must select once"),
        ({"method": "oracle"}, "must rank in one pass"),
        ({"method": "full"}, "must drop tokens after a layer"),
    ],
)
def test_the_rest_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parse(given, 8)
