"""Prompts of several lengths, one behind the other: each is prefilled as it is alone."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from claa_ops.methods import CLAA, METHODS, Coarse, FullKV, Hops, Method, Peak, make_method
from claa_ops.prefill import begin, begin_packed

LAYERS, HEADS, GROUPS, DIM, WIDTH = 6, 4, 2, 8, 12


def method_of(name: str, keep: float | int = 0.4) -> Method:
    return make_method(name, num_layers=LAYERS, keep=keep)


# Those that a loop serves which neither prepares a ranking nor goes back.
SERVED = [
    name
    for name in METHODS
    if not (method_of(name).two_pass or method_of(name).needs_ranking or method_of(name).may_park)
]


def layers_of(lengths: list[int], seed: int) -> list[dict[str, Tensor]]:
    """What each layer would see of whole prompts, packed."""
    generator, tokens = torch.Generator().manual_seed(seed), sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        {
            "query": normal(tokens, HEADS, DIM),
            "key": normal(tokens, GROUPS, DIM),
            "value": normal(tokens, GROUPS, DIM),
            "hidden": normal(tokens, WIDTH),
        }
        for _ in range(LAYERS)
    ]


def alone(method: Method, layers: list[dict[str, Tensor]], own: slice) -> list[tuple]:
    """Of each layer what is cached and what continues, of one prompt by itself."""
    state = begin(method, num_layers=LAYERS, prompt_length=own.stop - own.start)
    positions = torch.arange(own.stop - own.start)
    found = []
    for layer, seen in enumerate(layers):
        of_prompt = {name: x[own][positions].contiguous() for name, x in seen.items()}
        heads = {n: x.transpose(0, 1)[None].contiguous() for n, x in of_prompt.items()}
        heads["hidden"] = of_prompt["hidden"][None]
        state.observe(
            layer, heads["query"], heads["key"], value=heads["value"], hidden=heads["hidden"]
        )
        kept = state.compress(layer, heads["key"], heads["value"])
        index = state.select(layer)
        if index is not None:
            positions = positions[index[0]]
        found.append((*(x[0].transpose(0, 1) for x in kept), positions))
    return found


def check(methods: list[Method], lengths: list[int], seed: int, *, packed: object = None) -> None:
    layers = layers_of(lengths, seed)
    state = begin_packed(packed or methods, num_layers=LAYERS, prompt_lengths=lengths)
    limits = state.limits
    expected = [
        alone(method, layers, slice(*own))
        for method, own in zip(methods, pairwise(limits), strict=True)
    ]
    place = torch.arange(sum(lengths))  # of the tokens that are left among all
    for layer, seen in enumerate(layers):
        now = {name: x[place] for name, x in seen.items()}
        state.observe(layer, now.pop("query"), now.pop("key"), **now)
        key, value, kept = state.compress(layer, seen["key"][place], seen["value"][place])
        index = state.select(layer)
        place = place if index is None else place[index]
        wanted = [each[layer] for each in expected]
        assert torch.equal(key, torch.cat([each[0] for each in wanted]))
        assert torch.equal(value, torch.cat([each[1] for each in wanted]))
        assert kept == [len(each[0]) for each in wanted]
        assert torch.equal(state.positions, torch.cat([each[2] for each in wanted]))
        assert state.lengths == [len(each[2]) for each in wanted]


@pytest.mark.parametrize("name", SERVED)
@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    keep=st.sampled_from([0.2, 0.5, 30, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_each_prompt_keeps_what_it_keeps_alone(name, lengths, keep, seed):
    method = method_of(name, keep)
    check([method] * len(lengths), lengths, seed, packed=method)


def test_prompts_may_have_methods_of_their_own():
    """With other rates, other selection layers, other rankings; and none."""
    methods = [
        CLAA(layer=3, keep=0.2),
        Peak(layer=1, keep=0.5, keep_kv=0.3),
        FullKV(),
        Hops(layer=2, keep=30, keep_least=25),
        CLAA(layer=(1, 4), keep=(0.6, 0.2)),
    ]
    check(methods, [80, 33, 50, 64, 71], seed=3)


def test_a_logsumexp_is_that_of_variable_length_attention():
    lengths, seen = [40, 25], layers_of([40, 25], seed=5)[0]
    lse = torch.cat(
        [
            (
                torch.einsum("thd,nhd->htn", query, key.repeat_interleave(HEADS // GROUPS, 1))
                * DIM**-0.5
            )
            .masked_fill(torch.ones(len(key), len(key)).triu(1).bool(), -torch.inf)
            .logsumexp(2)
            for query, key in zip(
                seen["query"].split(lengths), seen["key"].split(lengths), strict=True
            )
        ],
        dim=1,
    )
    method = CLAA(layer=0, keep=9, first_full=0)
    kept = []
    for given_lse in (None, lse):
        state = begin_packed(method, num_layers=LAYERS, prompt_lengths=lengths)
        state.observe(0, seen["query"], seen["key"], lse=given_lse)
        kept.append(state.select(0))
    assert torch.equal(*kept)


@pytest.mark.parametrize("name", ["query", "key", "value", "hidden", "lse"])
def test_refuses_what_does_not_have_the_tokens(name):
    state = begin_packed(CLAA(layer=2), num_layers=LAYERS, prompt_lengths=[7, 4])
    seen = layers_of([7, 4], seed=0)[0] | {"lse": torch.zeros(HEADS, 11)}
    seen[name] = seen[name][:, :10] if name == "lse" else seen[name][:10]
    shape = rf"\[{', '.join(map(str, seen[name].shape))}\]"
    message = f"^observe: {name} of layer 0 must have the 11 tokens .*, got shape {shape}$"
    with pytest.raises(ValueError, match=message):
        state.observe(0, seen.pop("query"), seen.pop("key"), **seen)


@pytest.mark.parametrize(
    ("method", "lengths", "message"),
    [
        (CLAA(), [], "begin_packed: there must be a prompt, got none"),
        ([CLAA()], [5, 6], "begin_packed: method must be one, or .* each of the 2 prompts, got 1"),
        (CLAA(), [5, 0], "begin: prompt_length must be at least 1, got 0"),
        (Coarse(), [5, 6], "begin_packed: the method must leave behind .*, got Coarse, which may"),
        (method_of("oracle"), [5], "begin: Oracle needs a ranking"),
        (method_of("gemfilter"), [5], "begin: the method must prefill once, got GemFilter"),
    ],
)
def test_refuses(method, lengths, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        begin_packed(method, num_layers=LAYERS, prompt_lengths=lengths)


def test_refuses_what_is_no_method():
    with pytest.raises(TypeError, match="^begin: method must be a claa_ops.methods.Method"):
        begin_packed(["claa"], num_layers=LAYERS, prompt_lengths=[5])
