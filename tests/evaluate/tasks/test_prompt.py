import pytest

from claa_ops.evaluate.tasks.prompt import check_fits, encode_prompt, encode_turn
from claa_ops.huggingface.models import InputError
from support.tiny_checkpoint import CONTEXT, TEMPLATE, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def text_of(ids) -> str:
    return TOKENIZER.decode(ids)


def test_the_chat_template_applies_if_there_is_one():
    assert text_of(encode_prompt(TOKENIZER, "hello").ids[0]) == "<s>hello</s><s>"
    assert text_of(encode_prompt(TOKENIZER, "hello", chat=False).ids[0]) == "hello"
    plain = tiny_tokenizer(chat=False)
    assert text_of(encode_prompt(plain, "hello").ids[0]) == "hello"


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(InputError, match="no chat template: use chat=False"):
        encode_prompt(tiny_tokenizer(chat=False), "hello", chat=True)


def with_template(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('a system\\n turn is needed') }}", "fails: a system turn is needed"),
        ("{% for x in %}", "fails: Expected an expression"),
        ("{{ messages[1]['content'] }}", "fails: .*has no element 1"),
        ("{{ 'turn ' + 1 }}", "fails: can only concatenate str"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ raise_exception('') }}", "fails: TemplateError"),
        ("", "leaves the prompt out"),
        (" \n", "leaves the prompt out"),
        ("<s>You are helpful</s><s>", "leaves the prompt out"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template, reason):
    tokenizer = with_template(template or "{# nothing #}")
    with pytest.raises(InputError, match=f"^the chat template {reason}.*: use chat=False$"):
        encode_prompt(tokenizer, "hello there", chat=True)
    assert encode_prompt(tokenizer, "hello there", chat=False).ids.numel() == 11


def test_a_template_that_writes_half_a_character_is_refused():
    tokenizer = with_template("{{ messages[0]['content'] + '\\ud83d' }}")
    with pytest.raises(
        InputError, match="the chat template must be UTF-8 text, got half surrogate"
    ):
        encode_prompt(tokenizer, "hello there")


@pytest.mark.parametrize("text", ["  hello \n there ", 'say "hello"', "???", "größer"])
@pytest.mark.parametrize("change", ["trim", "tojson", "string"])
def test_a_template_may_change_a_prompt(text, change):
    tokenizer = with_template(f"<s>{{{{ messages[0]['content'] | {change} }}}}")
    assert encode_prompt(tokenizer, text).ids.numel() > 1


@pytest.mark.parametrize(
    "text, got", [("a\udcff", "byte 0xff"), ("a\ud83d", "half surrogate U\\+D83D")]
)
@pytest.mark.parametrize("chat", [True, False])
def test_a_half_surrogate_is_no_text(text, got, chat):
    with pytest.raises(InputError, match=f"the prompt must be UTF-8 text, got {got} at offs"):
        encode_prompt(TOKENIZER, text, chat=chat)
    with pytest.raises(InputError, match="the prompt must be UTF-8 text"):
        encode_prompt(TOKENIZER, "a", chat=chat, answer_prefix=text)


def test_a_token_beyond_the_embedding_is_refused():
    model = tiny_model()
    model.resize_token_embeddings(100)
    check_fits(model, encode_prompt(TOKENIZER, "!!", chat=False), 1)
    prompt = encode_prompt(TOKENIZER, "!!")  # with <s>, whose token is 256
    with pytest.raises(
        InputError, match="token 25. of the prompt lies beyond the draft's embeddin"
    ):
        check_fits(model, prompt, 1, of="the draft")


@pytest.mark.parametrize("chat", [True, False])
def test_the_range_of_a_fact_is_its_tokens(chat):
    prompt = encode_prompt(TOKENIZER, "The sky is blue. Naïve?", chat=chat, fact="sky is blue")
    tokens = prompt.ids[0, prompt.fact.start : prompt.fact.stop]
    assert text_of(tokens) == "sky is blue"


def test_a_prompt_that_leaves_no_room_is_refused_with_numbers():
    model = tiny_model()
    check_fits(model, encode_prompt(TOKENIZER, "x" * (CONTEXT - 10), chat=False), 10)
    message = f"the prompt has {CONTEXT - 10:,} tokens and 11 may follow, .* holds {CONTEXT:,}"
    with pytest.raises(InputError, match=message):
        check_fits(model, encode_prompt(TOKENIZER, "x" * (CONTEXT - 10), chat=False), 11)


# A second question, after the answer to the first.


@pytest.mark.parametrize("change", ["string", "trim"])
@pytest.mark.parametrize("chat", [True, False])
def test_prompt_answer_and_turn_are_the_whole_conversation(chat, change):
    tokenizer = with_template(TEMPLATE.replace("['content']", f"['content'] | {change}"))
    prompt, question, answer = "The sky is blue. Its colour?\n", "And by night?", "It is blue!"
    first = encode_prompt(tokenizer, prompt, chat=chat, answer_prefix="It is")
    turn = encode_turn(tokenizer, prompt, question, chat=chat, answer_prefix="By night")
    said = tokenizer(answer.removeprefix("It is"), add_special_tokens=False).input_ids
    if chat:
        turns = [("user", prompt), ("assistant", answer), ("user", question)]
        messages = [{"role": role, "content": text} for role, text in turns]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        whole = f"{prompt}{answer}\n\n{question}\n"
    expected = tokenizer(f"{whole}By night", add_special_tokens=False).input_ids
    assert [*first.ids[0].tolist(), *said, *turn.tolist()] == expected


def test_a_template_without_room_for_a_second_question_is_refused():
    for template, reason in (
        ("{{ messages[0]['content'] }}{{ messages[2]['content'] }}", "leaves the answer out"),
        ("{{ messages[0]['content'] }}{{ messages[1]['content'] }}", "leaves the prompt out"),
        ("{{ messages[3]['content'] }}", "fails"),
    ):
        with pytest.raises(InputError, match=f"the chat template {reason}"):
            encode_turn(with_template(template), "hello there", "what else")
    with pytest.raises(InputError, match="the question must be UTF-8 text"):
        encode_turn(TOKENIZER, "hello", "a\udcff")
