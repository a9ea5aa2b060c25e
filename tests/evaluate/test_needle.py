from claa_ops.evaluate.needle import manual_prose, needle_task
from support.tiny_checkpoint import tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat=False)


def test_the_answer_is_in_the_fact_and_nowhere_else():
    task = needle_task(TOKENIZER, 4000)
    assert task.prompt.count(task.fact) == 1
    assert task.answer in task.fact
    assert task.prompt.count(task.answer) == 1


def test_the_prompt_is_about_as_long_as_asked_for():
    tokens = len(TOKENIZER(needle_task(TOKENIZER, 4000).prompt).input_ids)
    assert 3500 < tokens < 4100


def test_the_fact_lies_at_the_depth():
    for depth in (0.0, 0.25, 0.5, 1.0):
        task = needle_task(TOKENIZER, 20_000, depth)
        assert abs(task.prompt.index(task.fact) / len(task.prompt) - depth) < 0.05


def test_prose_is_sentences():
    paragraphs = list(manual_prose())
    assert len(paragraphs) > 200
    assert all(text[0].isalpha() and text.endswith(".") for text in paragraphs)
    assert not any("::=" in text or "***" in text for text in paragraphs)
