from claa_ops.evaluate.tasks.needle import demo_example, manual_prose
from support.tiny_checkpoint import tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat=False)


def count_tokens(text):
    return len(TOKENIZER(text).input_ids)


def test_the_answer_is_in_the_fact_and_nowhere_else():
    example = demo_example(count_tokens, 4000)
    (answer,) = example.answers
    assert example.prompt.count(example.fact) == 1
    assert answer in example.fact
    assert example.prompt.count(answer) == 1


def test_the_prompt_is_about_as_long_as_asked_for():
    assert 3500 < count_tokens(demo_example(count_tokens, 4000).prompt) < 4100


def test_the_fact_lies_at_the_depth():
    for depth in (0.0, 0.25, 0.5, 1.0):
        example = demo_example(count_tokens, 20_000, depth)
        assert abs(example.prompt.index(example.fact) / len(example.prompt) - depth) < 0.05


def test_prose_is_sentences():
    paragraphs = list(manual_prose())
    assert len(paragraphs) > 200
    assert all(text[0].isalpha() and text.endswith(".") for text in paragraphs)
    assert not any("::=" in text or "***" in text for text in paragraphs)
