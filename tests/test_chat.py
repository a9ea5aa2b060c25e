"""System prompt, tool definitions and template, found in the tokens of a chat."""

import json
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as some

from claa_ops.chat import NAMES, learn
from support import chat_templates as forms
from support.chat_templates import HELP, TOOLS, TURNS
from support.tiny_checkpoint import tiny_tokenizer

FORMS = {"chatml": forms.CHATML, "llama": forms.LLAMA, "mistral": forms.MISTRAL}
WITH_WORDS = FORMS | {"words": forms.WORDS}
EACH = [(form, merges) for form in FORMS for merges in (True, False)]
EACH_WITH_WORDS = [(form, merges) for form in WITH_WORDS for merges in (True, False)]


@cache
def learned(form, merges):
    tokenizer = forms.chat_tokenizer(WITH_WORDS[form], merges)
    return tokenizer, learn(tokenizer)


def render(form, merges, messages, tools=None):
    """A chat as text, as tokens, and where in the text these are."""
    tokenizer, chat = learned(form, merges)
    text = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False
    )
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return text, coded.input_ids, coded.offset_mapping, chat


def protected(form, merges, names, messages, tools=None):
    """The chat as text, and begin and end in it of what is protected."""
    text, ids, offsets, chat = render(form, merges, messages, tools)
    flat = chat.spans(names, ids)
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return text, [(offsets[begin][0], offsets[end - 1][1]) for begin, end in pairs]


@pytest.mark.parametrize("tools", [None, TOOLS[:1], TOOLS], ids=["none", "one", "three"])
@pytest.mark.parametrize(("form", "merges"), EACH_WITH_WORDS)
def test_system_is_all_in_front_of_the_first_question(form, merges, tools):
    for turns in (TURNS[:1], TURNS):
        text, [(begin, end)] = protected(form, merges, ["system"], [HELP, *turns], tools)
        first = text.index(TURNS[0]["content"])
        if tools and form == "llama":  # in the message of the user
            first = text.index("Answer by a call")
        elif tools and form == "mistral" and len(turns) == 1:
            assert "[/AVAILABLE_TOOLS]" in text[:end]
        assert begin == 0 and end <= first and not text[end:first].strip()


@pytest.mark.parametrize(("form", "merges"), EACH_WITH_WORDS)
def test_without_a_system_prompt_there_is_none(form, merges):
    text, spans = protected(form, merges, ["system"], TURNS)
    if form == "llama":  # whose template has one of its own
        assert [text[begin:end].count("Knowledge") for begin, end in spans] == [1]
    else:
        assert spans == []


@pytest.mark.parametrize("system", [[], [HELP], [HELP | {"content": "A tool: '}\n\n"}]])
@pytest.mark.parametrize(("form", "merges"), EACH)
def test_tools_are_found_wherever_they_are(form, merges, system):
    for tools in ([tool] for tool in TOOLS), (TOOLS, TOOLS[:2], TOOLS[1:], TOOLS[::-1]):
        for given_tools in tools:
            for turns in (TURNS[:1], TURNS):
                messages = [*system, *turns]
                text, [(begin, end)] = protected(form, merges, ["tools"], messages, given_tools)
                names = [tool["function"]["name"] for tool in given_tools]
                assert [text[begin:end].count(f'"name": "{name}"') for name in names] == [
                    1 for name in names
                ]
                last = json.dumps(given_tools[-1], indent=4 if form == "llama" else None)
                assert begin < text.index(last) and text.index(last) + len(last) <= end
                for message in messages:
                    assert message["content"].strip() not in text[begin:end]
                # Behind them no more than the template has there.
                assert text[end:].lstrip()[:4] in [turn["content"][:4] for turn in TURNS]


@pytest.mark.parametrize(("form", "merges"), EACH)
def test_what_only_looks_like_tools_is_none(form, merges):
    assert protected(form, merges, ["tools"], [HELP, *TURNS])[1] == []


@pytest.mark.parametrize(("form", "merges"), EACH)
def test_template_is_all_but_the_contents(form, merges):
    contents = ["You help", "What is it", "It is that", "user"]
    roles = ["system", "user", "assistant", "user"]
    messages = [dict(role=r, content=c) for r, c in zip(roles, contents, strict=True)]
    text, spans = protected(form, merges, ["template"], messages)
    begins, ends = zip(*spans, strict=True)
    rest = [text[end:begin] for end, begin in zip(ends, begins[1:], strict=False)]
    assert [each.strip() for each in rest] == contents
    assert (begins[0], ends[-1]) == (0, len(text))


@pytest.mark.parametrize(("form", "merges"), EACH)
def test_special_tokens_belong_to_the_template_wherever_they_are(form, merges):
    tokenizer, chat = learned(form, merges)
    special = tokenizer.all_special_tokens[0]
    ids = tokenizer(f"a b c {special} d e", add_special_tokens=False).input_ids
    place = ids.index(tokenizer.convert_tokens_to_ids(special))
    assert chat.spans(["template"], ids) == [place, place + 1]


@pytest.mark.parametrize(("form", "merges"), EACH)
def test_a_prompt_that_is_no_chat_has_nothing(form, merges):
    tokenizer, chat = learned(form, merges)
    for text in ("", "x", "A text, no chat.\n\n" * 40):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert chat.spans(NAMES, ids) == []


CONTENT = some.lists(
    some.sampled_from(
        [
            "\n",
            "\n\n",
            " ",
            ".",
            "}",
            '{"',
            "user",
            "# Tools",
            "</tools>",
            "é",
            "7",
            "[INST",
            "<|im",
        ]
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize(("form", "merges"), EACH)
@given(some.lists(CONTENT, min_size=4, max_size=4), some.sampled_from([None, TOOLS[:1], TOOLS]))
def test_whatever_the_contents_are(form, merges, contents, tools):
    """The question begins behind the system prompt, and all tools are protected."""
    system, first, answer, second = (f"{text}|{text}" for text in contents)
    messages = [
        {"role": "system", "content": f"BRIEF{system}"},
        {"role": "user", "content": f"{first}ASK{first}"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    text, spans = protected(form, merges, ["system"], messages, tools)
    asked = text.index("ASK") - len(first.lstrip() if form == "llama" else first)
    ((begin, end),) = spans
    assert begin == 0 and text.index("BRIEF") < end <= asked
    text, spans = protected(form, merges, ["tools"], messages, tools)
    assert len(spans) == bool(tools)
    for begin, end in spans:
        assert begin < text.index('"weather"') and end > text.rindex(
            '"stop"' if tools is TOOLS else '"required"'
        )


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (forms.OLD_MISTRAL, "system"),
        (forms.OLD_MISTRAL, "tools"),
        (forms.BARE, "system"),
        (forms.BARE, "tools"),
        (forms.WORDS, "tools"),
    ],
)
def test_what_a_template_cannot_have_is_refused(form, name):
    chat = learn(forms.chat_tokenizer(form))
    with pytest.raises(ValueError, match=f'"{name}" needs a chat template that puts'):
        chat.spans([name], [1, 2, 3])


def test_the_turns_of_a_template_without_system_prompts_are_found():
    tokenizer = forms.chat_tokenizer(forms.OLD_MISTRAL)
    ids = tokenizer.apply_chat_template([HELP, *TURNS], return_dict=False)
    flat = learn(tokenizer).spans(["template"], ids)
    assert tokenizer.decode(ids[flat[0] : flat[1]]).strip() == "<s>[INST]"
    assert len(flat) == 2 * 4


@pytest.mark.parametrize("tokenizer", [None, tiny_tokenizer(chat=False)], ids=["none", "no chat"])
def test_without_a_chat_template_names_are_refused(tokenizer):
    with pytest.raises(ValueError, match="must be positions where there is no chat template"):
        learn(tokenizer)


def test_a_template_in_place_of_the_tokenizers():
    tokenizer = forms.chat_tokenizer(forms.CHATML)
    ids = tokenizer("<s>Be good</s>\n\nUSER: Hi", add_special_tokens=False).input_ids
    assert learn(tokenizer).spans(["system"], ids) == []
    assert learn(tokenizer, forms.WORDS).spans(["system"], ids) != []
