import pytest

from claa_ops.evaluate.prompt import check_fits, encode_prompt
from claa_ops.models import InputError
from evaluate.tiny_checkpoint import CONTEXT, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def text_of(ids) -> str:
    return TOKENIZER.decode(ids)


def test_the_chat_template_applies_if_there_is_one():
    assert text_of(encode_prompt(TOKENIZER, "hello").ids[0]) == "<s>hello</s><s>"
    assert text_of(encode_prompt(TOKENIZER, "hello", chat=False).ids[0]) == "hello"
    plain = tiny_tokenizer(chat=False)
    assert text_of(encode_prompt(plain, "hello").ids[0]) == "hello"


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(InputError, match="no chat template: use --no-chat"):
        encode_prompt(tiny_tokenizer(chat=False), "hello", chat=True)


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
