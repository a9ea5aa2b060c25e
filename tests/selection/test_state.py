"""The functional API, inside a plain torch decoder."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import claa_ops
from claa_ops import prefill
from claa_ops.methods import CLAA, FullKV, Peak

LAYERS, HEADS, KV_HEADS, DIM, WIDTH = 4, 4, 2, 8, 24


class Decoder(nn.Module):
    """A user's own decoder, with the functional API in its layer loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        out = (HEADS + 2 * KV_HEADS) * DIM
        self.qkv = nn.ParameterList(torch.randn(WIDTH, out) * 0.4 for _ in range(LAYERS))
        self.output = nn.ParameterList(torch.randn(HEADS * DIM, WIDTH) / 4 for _ in range(LAYERS))

    def forward(self, hidden: Tensor, method, start: Tensor | None = None):
        tokens = hidden.shape[1]
        angle = torch.arange(tokens)[:, None] * 0.3 ** torch.arange(DIM // 2)
        angle = angle.expand(hidden.shape[0], -1, -1)
        state = prefill.begin(method, num_layers=LAYERS, prompt_length=tokens, start=start)
        cache = []
        for layer in range(LAYERS):
            query, key, value = project(hidden, self.qkv[layer], angle)
            attended = attend(query, key, value, state.start)
            hidden = hidden + attended @ self.output[layer]
            state.observe(layer, query, key)
            cache.append(state.compress(layer, key, value))
            index = state.select(layer)
            if index is not None:
                hidden = claa_ops.gather_tokens(hidden, index)
                angle = claa_ops.gather_tokens(angle, index)
        return hidden, cache, state.positions


def project(hidden: Tensor, weight: Tensor, angle: Tensor):
    hidden = F.rms_norm(hidden, hidden.shape[-1:])
    heads = (hidden @ weight).unflatten(-1, (-1, DIM)).transpose(1, 2)
    query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    return rotate(query, angle), rotate(key, angle), value


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, start: Tensor | None) -> Tensor:
    tokens = query.shape[2]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    if start is not None:
        mask = mask & (torch.arange(tokens) >= start[:, None, None, None])
        mask = mask | torch.eye(tokens, dtype=torch.bool)  # padding sees itself: no NaN
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def by_hand(model: Decoder, hidden: Tensor, method: CLAA, kept: int, capacity: int):
    """The same prefill of one row, with nothing of claa_ops."""
    window, layer = method.window, method.layer
    angle = torch.arange(hidden.shape[1])[:, None] * 0.3 ** torch.arange(DIM // 2)
    angle, ranking, cache = angle[None], [], []
    for i in range(LAYERS):
        query, key, value = project(hidden, model.qkv[i], angle)
        tokens = hidden.shape[1]
        hidden = hidden + attend(query, key, value, None) @ model.output[i]
        logits = query[:, :, -window:] @ key.repeat_interleave(2, dim=1).transpose(2, 3)
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[-window:]
        scores = (logits / DIM**0.5).masked_fill(future, -torch.inf).softmax(-1).sum(2)
        scores = F.avg_pool1d(scores[..., :-window], method.kernel_size, 1, method.kernel_size // 2)
        scores = scores.unflatten(1, (KV_HEADS, -1)).sum(2)
        ranking.append(scores)
        if i >= method.first_full and tokens > capacity:
            heads = [torch.tensor(top(row, capacity, window)) for row in scores[0]]
            key = torch.stack([key[0, g, index] for g, index in enumerate(heads)])[None]
            value = torch.stack([value[0, g, index] for g, index in enumerate(heads)])[None]
        cache.append((key, value))
        if i == layer:
            importance = torch.cat(ranking[-method.last_n :], dim=1).amax(1)
            index = torch.tensor(top(importance[0], kept, window))
            hidden, angle = hidden[:, index], angle[:, index]
            positions = index
    return hidden, cache, positions


def top(scores: Tensor, count: int, window: int) -> list[int]:
    best = scores.topk(count - window).indices.tolist()
    return sorted(best) + list(range(len(scores), len(scores) + window))


METHOD = CLAA(keep=0.4, keep_kv=0.25, layer=1, last_n=2, first_full=1)


@torch.no_grad()
def test_a_plain_decoder_with_four_calls_is_claa_by_hand():
    model, hidden = Decoder(), torch.randn(1, 50, WIDTH)
    output, cache, positions = model(hidden, METHOD)
    expected, expected_cache, expected_positions = by_hand(model, hidden, METHOD, 20, 12)
    assert positions[0].tolist() == expected_positions.tolist()
    torch.testing.assert_close(output, expected)
    for (key, value), (expected_key, expected_value) in zip(cache, expected_cache, strict=True):
        torch.testing.assert_close(key, expected_key)
        torch.testing.assert_close(value, expected_value)
    assert [key.shape[2] for key, _ in cache] == [50, 12, 12, 12]


@torch.no_grad()
@torch.no_grad()
def test_an_engine_may_select_before_the_attention():
    """The state asks for queries and keys alone; the kept tokens attend to all that were there."""
    model, hidden = Decoder(), torch.randn(2, 60, WIDTH)
    expected, cache, positions = model(hidden, METHOD)
    angle = torch.arange(60)[:, None] * 0.3 ** torch.arange(DIM // 2)
    angle = angle.expand(2, -1, -1)
    state = prefill.begin(METHOD, num_layers=LAYERS, prompt_length=60)
    for layer in range(LAYERS):
        query, key, value = project(hidden, model.qkv[layer], angle)
        state.observe(layer, query[:, :, -METHOD.window :], key)
        held = state.compress(layer, key, value)
        assert all(map(torch.equal, held, cache[layer]))
        index = state.select(layer)
        attended = attend(query, key, value, None)
        if index is not None:
            attended = claa_ops.gather_tokens(attended, index)  # an engine computes no others
            hidden = claa_ops.gather_tokens(hidden, index)
            angle = claa_ops.gather_tokens(angle, index)
        hidden = hidden + attended @ model.output[layer]
    torch.testing.assert_close(hidden, expected)
    assert torch.equal(state.positions, positions)


def test_full_kv_changes_nothing():
    model, hidden = Decoder(), torch.randn(2, 30, WIDTH)
    output, cache, positions = model(hidden, FullKV())
    assert torch.equal(output, model(hidden, CLAA(keep=1.0, layer=0))[0])
    assert positions is None and all(key.shape[2] == 30 for key, _ in cache)


@torch.no_grad()
@pytest.mark.parametrize("method", [METHOD, CLAA(keep=20, layer=2, zscore=True, first_full=0)])
def test_a_padded_row_is_the_row_alone(method):
    method = CLAA(**{**settings(method), "keep": 20, "keep_kv": 14})
    model = Decoder()
    hidden, start = torch.randn(3, 50, WIDTH), torch.tensor([0, 17, 38])
    _, cache, positions = model(hidden, method, start)
    for row, padding in enumerate(start.tolist()):
        # Rotation is relative, so the row alone may count from 0.
        _, alone, kept = model(hidden[row : row + 1, padding:], method)
        kept = torch.arange(50 - padding)[None] if kept is None else kept
        valid = positions[row] >= padding
        assert positions[row][valid].tolist() == (kept[0] + padding).tolist()
        for (_, value), (_, value_alone) in zip(cache, alone, strict=True):
            rows = value_alone.shape[2]
            torch.testing.assert_close(value[row, :, -rows:], value_alone[0])


def settings(method: CLAA) -> dict:
    names = ("layer", "last_n", "first_full", "window", "kernel_size", "pool_mode", "zscore")
    return {name: getattr(method, name) for name in names}


@torch.no_grad()
def test_state_follows_the_selection():
    model, hidden = Decoder(), torch.randn(2, 50, WIDTH)
    start = torch.tensor([0, 35])
    state = prefill.begin(
        CLAA(keep=20, layer=1), num_layers=LAYERS, prompt_length=50, start=start, keep_scores=True
    )
    angle = torch.zeros(2, 50, DIM // 2)
    for layer in (0, 1):
        query, key, _ = project(hidden, model.qkv[layer], angle)
        state.observe(layer, query, key)
    index = state.select(1)
    assert torch.equal(state.positions, index) and state.length == 20
    assert state.start.tolist() == [0, 5]  # 15 real tokens, so 5 of padding remain
    assert (index[1, :5] < 35).all() and (index[1, 5:] == torch.arange(35, 50)).all()
    assert sorted(state.scores) == [0, 1] and state.scores[0].shape == (2, 42)
    torch.testing.assert_close(state.importance, torch.maximum(state.scores[0], state.scores[1]))


def test_window_rows_and_their_logsumexp_are_enough():
    query, key = torch.randn(1, HEADS, 50, DIM), torch.randn(1, KV_HEADS, 50, DIM)
    logits = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) / DIM**0.5
    future = torch.ones(50, 50, dtype=torch.bool).triu(1)
    lse = logits.masked_fill(future, -torch.inf).logsumexp(-1)
    importance = []
    for rows, given in ((50, None), (8, None), (8, lse), (50, lse[:, :, -8:])):
        state = prefill.begin(CLAA(keep=0.5, layer=0), num_layers=2, prompt_length=50)
        state.observe(0, query[:, :, -rows:], key, lse=given)
        importance.append(state.importance)
    assert torch.equal(importance[0], importance[1])
    torch.testing.assert_close(importance[2], importance[0])
    assert torch.equal(importance[2], importance[3])


def test_attention_settings_reach_the_scores():
    query, key = torch.randn(1, HEADS, 50, DIM), torch.randn(1, KV_HEADS, 50, DIM)
    attention = {"scale": 0.5, "sliding_window": 20, "softcap": 2.0}
    attention["sink_logits"] = torch.randn(HEADS)
    state = prefill.begin(CLAA(keep=0.5, layer=0), num_layers=2, prompt_length=50)
    state.observe(0, query, key, **attention)
    scores = claa_ops.score_tokens(query[:, :, -8:], key, **attention)
    assert torch.equal(state.observed.scores, scores)


def test_no_gradient_flows_through_a_ranking():
    model, hidden = Decoder(), torch.randn(1, 50, WIDTH, requires_grad=True)
    output, _, positions = model(hidden, METHOD)
    output.sum().backward()
    assert positions.shape == (1, 20) and hidden.grad.isfinite().all()


def test_it_compiles_into_one_graph_for_all_lengths():
    torch.compiler.reset()
    model, graphs = Decoder(), []

    def count(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for tokens in (50, 51, 77, 120):
        hidden = torch.randn(2, tokens, WIDTH)
        with torch.no_grad():
            output, cache, positions = compiled(hidden, METHOD)
            expected, expected_cache, expected_positions = model(hidden, METHOD)
        assert torch.equal(positions, expected_positions)
        torch.testing.assert_close(output, expected)
        assert [k.shape for k, _ in cache] == [k.shape for k, _ in expected_cache]
    assert len(graphs) == 1


class Prefill(nn.Module):
    """The hidden states of a prompt in, those of what CLAA keeps out."""

    def __init__(self, keep: float | int) -> None:
        super().__init__()
        self.decoder, self.method = Decoder(), CLAA(keep=keep, layer=1, last_n=2, first_full=0)

    def forward(self, hidden: Tensor):
        return self.decoder(hidden, self.method)


@torch.no_grad()
@pytest.mark.parametrize(
    ("keep", "length", "deferred"),
    [
        pytest.param(0.1, torch.export.Dim.AUTO, False, id="rate-auto"),
        pytest.param(0.1, torch.export.Dim("n", min=40), True, id="rate-named-and-deferred"),
        pytest.param(20, torch.export.Dim.AUTO, False, id="number-auto"),
        pytest.param(20, torch.export.Dim("n", min=40), True, id="number-named-and-deferred"),
    ],
)
def test_it_exports_for_all_lengths(keep, length, deferred):
    """As the docstring of `begin` says."""
    model = Prefill(keep)
    program = torch.export.export(
        model,
        (torch.randn(2, 150, WIDTH),),
        dynamic_shapes={"hidden": {1: length}},
        prefer_deferred_runtime_asserts_over_guards=deferred,
    ).module()
    for tokens in (100, 101, 400):
        hidden = torch.randn(2, tokens, WIDTH)
        torch.testing.assert_close(program(hidden), model(hidden))


# Misuse is refused in a sentence.


def observed(layer: int = 0):
    state = prefill.begin(CLAA(keep=0.5, layer=1), num_layers=LAYERS, prompt_length=20)
    key = torch.zeros(1, KV_HEADS, 20, DIM)
    state.observe(layer, torch.zeros(1, HEADS, 20, DIM), key)
    return state, key


def test_begin_refuses_an_empty_prompt_and_a_model_too_shallow():
    with pytest.raises(ValueError, match="begin: prompt_length must be at least 1, got 0"):
        prefill.begin(FullKV(), num_layers=4, prompt_length=0)
    with pytest.raises(ValueError, match=r"CLAA: layer must be in \[0, 14\].*16 layers, got 15"):
        prefill.begin(CLAA(layer=15), num_layers=16, prompt_length=9)
    with pytest.raises(ValueError, match="CLAA: the model must have at least 2 layers, got 1"):
        prefill.begin(CLAA(), num_layers=1, prompt_length=9)


@pytest.mark.parametrize("layer", [-1, 4])
def test_layers_outside_the_model_are_refused(layer):
    state, key = observed()
    message = rf"layer must be in \[0, 3\], got {layer}"
    with pytest.raises(ValueError, match="observe: " + message):
        state.observe(layer, key, key)
    with pytest.raises(ValueError, match="compress: " + message):
        state.compress(layer, key, key)
    with pytest.raises(ValueError, match="select: " + message):
        state.select(layer)


def test_calls_out_of_order_are_refused():
    state, key = observed(layer=1)
    with pytest.raises(RuntimeError, match="observe: must be called for layer 1 after lower"):
        state.observe(1, key, key)
    with pytest.raises(RuntimeError, match="compress: must be called for layer 0 once, after its"):
        state.compress(0, key, key)
    with pytest.raises(RuntimeError, match="select: must be called for layer 2 once, after its"):
        state.select(2)
    state.select(1)
    with pytest.raises(RuntimeError, match="the last call was select for layer 1"):
        state.select(1)
    with pytest.raises(RuntimeError, match="compress: must be called for layer 1"):
        state.compress(1, key, key)


def test_hidden_states_that_were_not_gathered_are_refused():
    state, key = observed(layer=1)
    assert state.select(1).shape == (1, 10)
    message = "observe: key of layer 2 must have the 10 tokens that the layer sees, got 20"
    with pytest.raises(ValueError, match=message):
        state.observe(2, key, key)


@pytest.mark.parametrize("end", ["compress", "select", "release"])
def test_what_a_layer_saw_is_not_held_longer_than_needed(end):
    state, key = observed()
    held = weakref.ref(state.observed)
    {
        "compress": lambda: state.compress(0, key, key),
        "select": lambda: state.select(0),
        "release": state.release,
    }[end]()
    assert held() is None
    with pytest.raises(RuntimeError, match="observed: must be read between .*, got layer 0 after"):
        _ = state.observed


@pytest.mark.parametrize("name", ["value", "hidden"])
def test_what_was_not_shown_is_asked_for(name):
    state, _ = observed()
    with pytest.raises(RuntimeError, match=f"CLAA: {name} of layer 0 must be passed to observe"):
        getattr(state.observed, name)


def test_the_state_follows_its_layers_to_another_device():
    start = torch.tensor([2, 0])
    state = prefill.begin(CLAA(keep=0.5, layer=0), num_layers=3, prompt_length=40, start=start)
    query, key = torch.randn(2, HEADS, 40, DIM), torch.randn(2, KV_HEADS, 40, DIM)
    state.observe(0, query, key)
    state.notes["peaks"] = state.importance
    assert state.running is state.importance is not None
    state.method = FullKV()  # it computes nothing, which the device without memory cannot
    state.observe(1, query.to("meta"), key.to("meta"))
    held = (state.start, state.row_lengths, state.importance, state.notes["peaks"])
    assert {each.device.type for each in (*held, state.observed.start)} == {"meta"}
    assert state.running is state.importance


def test_a_turn_follows_its_layers_to_another_device():
    start = torch.tensor([2, 0])
    method = Peak(keep=0.5, layer=0, second_look=True)
    state = prefill.begin(method, num_layers=3, prompt_length=40, start=start)
    query, key = torch.randn(2, HEADS, 50, DIM), torch.randn(2, KV_HEADS, 50, DIM)
    state.observe(0, query[:, :, :40], key[:, :, :40])
    assert state.select(0).shape == (2, 20) and state.parked == 0
    turn = state.turn(40, 10)
    turn.method = FullKV()  # it computes nothing, which the device without memory cannot
    turn.observe(0, query.to("meta"), key.to("meta"))
    held = (turn.start, turn.seen_when_parked[1], turn.held)
    assert {each.device.type for each in held} == {"meta"}
