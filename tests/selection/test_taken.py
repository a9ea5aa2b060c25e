"""Going back, and taking up again, by hand in a plain torch decoder."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from claa_ops import gather_kv, gather_tokens
from claa_ops.methods import CLAA, Coarse, FullKV, LazyLLM, Method, Peak, Pruning
from claa_ops.selection import PrefillState, TakenUp, begin
from selection.test_state import DIM, HEADS, KV_HEADS, LAYERS, WIDTH, Decoder, project


class Conversation:
    """A decoder in whose layer loop stands all that a method may ask for."""

    def __init__(self, model: Decoder, method: Method) -> None:
        self.model, self.method = model, method
        self.cache: list[tuple[Tensor, Tensor] | None] = [None] * LAYERS
        self.starts: list[Tensor | None] = [None] * LAYERS  # of each cache: what is no padding
        self.inputs: list[Tensor | None] = [None] * LAYERS  # of each layer, what it saw last
        self.seen = 0

    def prefill(self, hidden: Tensor, start: Tensor | None = None) -> Tensor:
        tokens = hidden.shape[1]
        self.angle, self.seen = angles(0, tokens), tokens
        self.state = state = begin(
            self.method, num_layers=LAYERS, prompt_length=tokens, start=start
        )
        layer, angle = 0, self.angle
        while layer < LAYERS:
            self.inputs[layer] = hidden
            self.cache[layer] = None
            hidden, query, key, value = self.block(
                layer, hidden, angle, causal(hidden, state.start)
            )
            state.observe(layer, query, key)
            self.cache[layer] = state.compress(layer, key, value)
            self.starts[layer] = state.cache_start
            taken = state.take_up(layer)
            if taken is not None:
                hidden = self.join(taken, hidden, layer)
                angle = gather_tokens(self.angle, state.positions)
            index = state.select(layer)
            if state.parked == layer:
                self.parked = hidden
            if state.layer < layer:
                layer, hidden = state.layer, self.parked
            if index is not None:
                hidden = gather_tokens(hidden, index)
                angle = gather_tokens(self.angle, state.positions)
            layer += 1
        return hidden

    def join(self, taken: TakenUp, hidden: Tensor, layer: int) -> Tensor:
        joining = gather_tokens(self.parked, taken.among_parked)
        angle = gather_tokens(self.angle, taken.index)
        for between in range(self.state.parked + 1, layer + 1):
            joining, *_ = self.block(between, joining, angle, taken.visible(), taken)
            self.starts[between] = self.state.start
        return gather_tokens(torch.cat([hidden, joining], dim=1), taken.order())

    def turn(self, hidden: Tensor) -> Tensor:
        new = hidden.shape[1]
        angle = angles(self.seen, self.seen + new).expand(hidden.shape[0], -1, -1)
        turn = self.state.turn(self.seen, new)
        self.seen += new
        taken = None
        for layer in range(LAYERS):
            self.inputs[layer] = hidden
            if taken is None:
                visible = self.visible(layer, new)
            else:
                visible, self.starts[layer] = taken.visible(), self.state.start
            hidden, query, *_ = self.block(layer, hidden, angle, visible, taken)
            if turn is None or layer > turn.parked:
                continue
            turn.observe(layer, query, self.cache[layer][0])
            taken = turn.take_up(layer)
            if taken is not None:
                joining = gather_tokens(self.parked, taken.among_parked)
                hidden = torch.cat([joining, hidden], dim=1)
                angle = torch.cat([gather_tokens(self.angle, taken.index), angle], dim=1)
        return hidden[:, -new:]

    def visible(self, layer: int, new: int) -> Tensor:
        """To what a turn attends in a layer that takes nothing up."""
        held, start = self.cache[layer][0].shape[2], self.starts[layer]
        visible = torch.ones(1, new, held + new, dtype=torch.bool).tril(held)
        if start is None:
            return visible
        return visible & (torch.arange(held + new) >= start[:, None, None])

    def block(
        self,
        layer: int,
        hidden: Tensor,
        angle: Tensor,
        visible: Tensor,
        taken: TakenUp | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A layer over the new tokens and what its cache holds, which takes them in."""
        query, key, value = project(hidden, self.model.qkv[layer], angle)
        if (before := self.cache[layer]) is not None:
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        self.cache[layer] = key, value
        if taken is not None:
            self.cache[layer] = gather_kv(key, value, taken.order())
        keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
        logits = (query @ keys.transpose(2, 3) / DIM**0.5).masked_fill(
            ~visible[:, None], -torch.inf
        )
        attended = (logits.softmax(-1) @ values).transpose(1, 2).flatten(2)
        return hidden + attended @ self.model.output[layer], query, key, value


def angles(first: int, end: int) -> Tensor:
    """[1, n, DIM / 2]."""
    return (torch.arange(first, end)[:, None] * 0.3 ** torch.arange(DIM // 2))[None]


def causal(hidden: Tensor, start: Tensor | None) -> Tensor:
    tokens = hidden.shape[1]
    visible = torch.ones(1, tokens, tokens, dtype=torch.bool).tril()
    if start is None:
        return visible
    visible = visible & (torch.arange(tokens) >= start[:, None, None])
    return visible | torch.eye(tokens, dtype=torch.bool)  # padding sees itself: no NaN


@dataclass(frozen=True)
class Given(Pruning):
    """Keeps tokens that are given, and whole caches."""

    keep_kv: float = 1.0
    tokens: tuple[int, ...] = ()

    def select(self, state: PrefillState, layer: int) -> Tensor | None:
        return torch.tensor([self.tokens]) if layer == self.layer else None


@torch.no_grad()
def test_of_a_part_that_ran_ahead_its_choice_alone_remains():
    model, hidden = Decoder(), torch.randn(1, 50, WIDTH)
    method = Coarse(keep=20, keep_kv=1.0, layer=0, ahead=2, window=8)
    coarse = Conversation(model, method)
    output = coarse.prefill(hidden)
    assert coarse.state.lengths == [50, 20, 20, 20]
    # Sinks, every second token and the window: 4 of 42 are sinks, of which 2 are odd.
    assert coarse.state.ahead == [(1, [21 + 2 + 8] * 2)]
    chosen = tuple(coarse.state.positions[0].tolist())
    given = Conversation(model, Given(layer=0, tokens=chosen))
    assert torch.equal(given.prefill(hidden), output)
    for (key, value), (other_key, other_value) in zip(coarse.cache, given.cache, strict=True):
        assert torch.equal(key, other_key) and torch.equal(value, other_value)
    assert chosen != tuple(range(30, 50))
    every = Conversation(model, replace(method, every=1))
    every.prefill(hidden)
    assert every.state.ahead == [(1, [50] * 2)]


@torch.no_grad()
def test_a_turn_that_takes_up_everything_before_the_last_layer_is_full_prefill():
    model, hidden = Decoder(), torch.randn(2, 50, WIDTH)
    turns = [torch.randn(2, tokens, WIDTH) for tokens in (9, 5, 3)]
    method = Peak(keep=0.4, layer=LAYERS - 2, window=6, second_look=True)
    talks = [Conversation(model, method) for method in (FullKV(), method)]
    full, pruned = ([talk.prefill(hidden), *map(talk.turn, turns)] for talk in talks)
    for turn, held in ((1, 40), (2, 50), (3, 50)):
        same = torch.allclose(full[turn], pruned[turn], atol=1e-4)
        assert same == (held == 50), turn
    assert [key.shape[2] for key, _ in talks[1].cache] == [67] * LAYERS
    torch.testing.assert_close(talks[0].cache[-1], talks[1].cache[-1], atol=1e-4, rtol=1e-4)


@dataclass(frozen=True)
class TakesAll(CLAA):
    """Takes up at one layer all that an earlier one dropped."""

    at: int = 0
    looks_again = True

    def parks(self, state: PrefillState, layer: int) -> bool:
        return True

    def take_up(self, state: PrefillState, layer: int) -> Tensor | None:
        missing = state.missing()
        if layer != self.at or not missing.any():
            return None
        return missing.nonzero()[:, 1].view(missing.shape[0], -1)


@torch.no_grad()
def test_what_is_taken_up_in_the_next_layer_leaves_it_as_in_full_prefill():
    """It sees all that came before it, of which the layer has the keys of full prefill."""
    model, hidden = Decoder(), torch.randn(1, 50, WIDTH)
    method = TakesAll(keep=20, keep_kv=1.0, layer=1, at=2)
    talk, full = Conversation(model, method), Conversation(model, FullKV())
    talk.prefill(hidden), full.prefill(hidden)
    torch.testing.assert_close(talk.cache[2], full.cache[2], atol=1e-4, rtol=1e-4)
    dropped = Conversation(model, replace(method, at=9))
    dropped.prefill(hidden)
    taken = torch.ones(50, dtype=torch.bool)
    taken[dropped.state.positions[0]] = False
    torch.testing.assert_close(talk.inputs[3][:, taken], full.inputs[3][:, taken])
    assert not torch.allclose(talk.inputs[3][:, ~taken], full.inputs[3][:, ~taken], atol=1e-3)
    assert talk.state.lengths == [50, 50, 50, 50] and dropped.state.lengths == [50, 50, 20, 20]


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [
        Coarse(keep=0.4, layer=0, ahead=2, window=8),
        LazyLLM(keep=(0.6, 0.5, 0.4), layer=(0, 1, 2), revive=True),
        Peak(keep=0.3, layer=1, window=6, second_look=True),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_padded_row_is_the_row_alone(method):
    model, hidden, start = Decoder(), torch.randn(3, 50, WIDTH), torch.tensor([0, 17, 38])
    turns = [torch.randn(3, tokens, WIDTH) for tokens in (7, 3)]
    together = Conversation(model, method)
    outputs = [together.prefill(hidden, start), *map(together.turn, turns)]
    for row, padding in enumerate(start.tolist()):
        alone = Conversation(model, method)
        expected = [alone.prefill(hidden[row : row + 1, padding:])]
        expected += [alone.turn(turn[row : row + 1]) for turn in turns]
        for actual, own in zip(outputs, expected, strict=True):
            torch.testing.assert_close(actual[row, -own.shape[1] :], own[0], atol=1e-4, rtol=1e-4)
