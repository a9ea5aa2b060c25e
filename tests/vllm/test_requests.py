"""What a request asks of the selection: how much is kept, and what is never dropped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from claa_ops.chat import NoChatTemplate
from claa_ops.prefill import begin as begin_prefill
from claa_ops.vllm.requests import resolve
from claa_ops.vllm.settings import parse

SETTINGS = parse({"method": "peak", "layer": 3, "keep": 0.2, "min_prompt": 50}, num_layers=8)
WINDOW, SINKS = SETTINGS.method.window, SETTINGS.method.num_sinks


@pytest.mark.parametrize(
    ("asked", "prompt", "kept"),
    [
        (None, 1000, 200),
        ({}, 49, 49),  # shorter than min_prompt
        ({}, 50, WINDOW),
        ({"claa_keep": 0.5}, 40, 20),  # asked for all the same
        ({"claa_keep": 0.5}, 1000, 500),
        ({"claa_keep": 0.1}, 100, WINDOW + SINKS),  # never less than these
        ({"claa_keep": 1}, 1000, WINDOW + SINKS),
        ({"claa_keep": 300}, 1000, 300),
        ({"claa_keep": 300}, 200, 200),
        ({"claa_keep": "all"}, 1000, 1000),
        ({"claa_keep": 1.0}, 1000, 1000),
        ({"claa_protect": [100, 300]}, 1000, 204 + 796 // 5),  # the first four are kept anyway
        ({"claa_protect": [0, 300]}, 1000, 300 + 700 // 5),
        ({"claa_protect": "0, 300"}, 1000, 300 + 700 // 5),
        ({"claa_protect": [0, 1000]}, 1000, 1000),
        ({"claa_protect": []}, 1000, 200),
        ({"claa_keep": 300, "claa_protect": [0, 300]}, 1000, 600),
    ],
)
def test_how_many_are_kept(asked, prompt, kept):
    assert resolve(asked, SETTINGS, prompt)["claa_kept"] == kept


@settings(max_examples=50)
@given(
    some.integers(20, 300),
    some.lists(some.tuples(some.integers(0, 300), some.integers(0, 60)), max_size=3),
    some.sampled_from([0.05, 0.3, 40]),
    some.sampled_from([0, 4]),
)
def test_as_many_are_kept_as_a_prefill_of_its_own_keeps(prompt, pairs, keep, sinks):
    """Both ways into the library have one rule."""
    claa = {"method": "peak", "layer": 1, "keep": keep, "num_sinks": sinks, "min_prompt": 0}
    parsed = parse(claa, num_layers=4)
    spans = [min(end, prompt) for at, length in pairs for end in (at, at + length)]
    mask = torch.zeros(1, prompt, dtype=torch.bool)
    for begin, end in zip(spans[::2], spans[1::2], strict=True):
        mask[0, begin:end] = True
    state = begin_prefill(parsed.method, num_layers=4, prompt_length=prompt, protect=mask)
    rows = torch.randn(1, 2, prompt, 8)
    for layer in (0, 1):
        state.observe(layer, rows, rows)
        state.compress(layer, rows, rows)
        state.select(layer)
    if mask.any():  # without, a server has room for the first tokens in shorter prompts too
        assert resolve({"claa_protect": spans}, parsed, prompt)["claa_kept"] == state.length


def test_spans_are_merged_and_what_others_ask_for_is_left():
    given = {"claa_protect": [300, 400, 0, 120, 100, 200, 50, 50], "other": 1}
    resolved = resolve(given, SETTINGS, 1000)
    assert resolved["claa_protect"] == [0, 200, 300, 400] and resolved["other"] == 1
    assert given == {"claa_protect": [300, 400, 0, 120, 100, 200, 50, 50], "other": 1}


@pytest.mark.parametrize("protect", ["system,tools", "system, tools", ["system", " tools"]])
def test_names_become_positions_and_come_on_top(protect):
    def named(names):
        assert names == ["system", "tools"]
        return [0, 100, 400, 500, 50, 120]

    resolved = resolve({"claa_protect": protect}, SETTINGS, 1000, named)
    assert resolved["claa_protect"] == [0, 120, 400, 500]
    assert resolved["claa_kept"] == 220 + 780 // 5


@pytest.mark.parametrize("protect", ["system,tools", ["system", "tools"]])
def test_a_server_may_protect_by_itself_unless_a_request_says_otherwise(protect):
    claa = {"method": "peak", "layer": 3, "keep": 0.2, "protect": protect}
    parsed = parse(claa, num_layers=8)

    def named(names):
        return {("system", "tools"): [0, 100], ("template",): [50, 60]}[tuple(names)]

    def ask(asked, prompt=1000, where=named):
        found = resolve(asked, parsed, prompt, where)
        return found.get("claa_protect"), found["claa_kept"]

    assert ask(None) == ([0, 100], 100 + 900 // 5)
    assert ask({"claa_keep": 0.5}) == ([0, 100], 100 + 900 // 2)
    assert ask({"claa_keep": "all"}) == ([0, 100], 1000)
    assert ask({"claa_protect": "template"}) == ([50, 60], SINKS + 10 + (990 - SINKS) // 5)
    assert ask({"claa_protect": "none"}) == ask({"claa_protect": []}) == ([], 200)
    assert ask(None, where=None) == (None, 200)  # a prompt of embeddings has no names
    assert ask(None, where=lambda names: []) == (None, 200)

    def no_template(names):
        raise NoChatTemplate("there is none")

    assert ask(None, where=no_template) == (None, 200)  # no chat, as there are none yet
    with pytest.raises(ValueError, match="there is none"):
        ask({"claa_protect": "system"}, where=no_template)


def test_names_of_what_a_prompt_has_not_change_nothing():
    resolved = resolve({"claa_protect": "system"}, SETTINGS, 1000, lambda names: [])
    assert resolved == {"claa_protect": [], "claa_kept": 200}
    assert resolve({"claa_protect": "system"}, SETTINGS, 40, lambda names: [])["claa_kept"] == 40


@pytest.mark.parametrize(
    "protect",
    [
        "",
        "sytem",
        "system,",
        ["system", 3],
        ["system", [1]],
        [0, "tools"],
        "0,tools",
        pytest.param("0," + "9" * 5000, id="too-many-digits"),
    ],
)
def test_other_names_are_refused(protect):
    expected = "must name any of system, tools, template, or be none, or pairs begin, end"
    with pytest.raises(ValueError, match=expected):
        resolve({"claa_protect": protect}, SETTINGS, 100, lambda names: [])


@given(
    some.integers(1, 300),
    some.lists(some.integers(0, 300), max_size=8),
    some.one_of(some.floats(0.01, 1), some.integers(1, 400), some.just("all")),
)
def test_what_is_kept_has_room_for_window_sinks_and_protected(prompt, ends, keep):
    ends = sorted(min(end, prompt) for end in ends[: len(ends) // 2 * 2])
    kept = resolve({"claa_keep": keep, "claa_protect": ends}, SETTINGS, prompt)["claa_kept"]
    sure = {*range(prompt - WINDOW, prompt)} & {*range(prompt)}
    for begin, end in zip(ends[::2], ends[1::2], strict=True):
        sure |= {*range(begin, end)}
    if sure - {*range(prompt - WINDOW, prompt)}:
        sure |= {*range(min(SINKS, prompt))}
    assert len(sure) <= kept <= prompt


@pytest.mark.parametrize(
    "asked",
    [
        {"claa_keep": 0.0},
        {"claa_keep": 0},
        {"claa_keep": True},
        {"claa_keep": "0.1"},
        {"claa_keep": [0.1]},
        {"claa_keep": None},
        {"claa_protect": "system"},
        {"claa_protect": 3},
        {"claa_protect": [3, 2]},
        {"claa_protect": [-1, 2]},
        {"claa_protect": [0.0, 2.0]},
        {"claa_protect": ["0", "2"]},
        {"claa_protect": "0,2,5"},
        {"claa_protect": "0,-2"},
        {"claa_protect": "0,2.0"},
        {"claa_protect": [0, True]},
        {"claa_kept": 5},
        {"claa_keeep": 0.1},
    ],
)
def test_anything_else_is_refused(asked):
    with pytest.raises(ValueError, match=r"^claa: .* got "):
        resolve(asked, SETTINGS, 100)
