"""A chat of several turns about one long text, its answers streamed as they are made.

The text is read once: what CLAA keeps of it stays in one cache, and every later turn adds its own
tokens, which are kept in full.

    pip install 'claa-ops[models]'
    python examples/streaming_chat.py [MODEL] [--question QUESTION]...

Without a question it asks for them, until an empty line.
"""

import argparse
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from claa_ops.methods import CLAA
from claa_ops.prefill import ClaaCache, attach


def questions(given: list[str]) -> Iterator[str]:
    if given:
        yield from given
    else:
        while question := input("> ").strip():
            yield question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--question", action="append", default=[])
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = attach(AutoModelForCausalLM.from_pretrained(arguments.model).eval())
    # The answers come from the caches, so they keep twice as much as the last layers see.
    method = CLAA(keep=0.2, keep_kv=0.4, layer=model.config.num_hidden_layers * 2 // 3)
    cache = ClaaCache(model.config, method)
    ids = torch.empty(1, 0, dtype=torch.int64)
    text = f"{topics['assert']}\n\n{topics['while']}\n\n"
    for question in questions(arguments.question):
        turn = turn_tokens(tokenizer, text + question, first=not ids.shape[1])
        ids = torch.cat([ids, turn], dim=1)
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=32,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        print(f"[{ids.shape[1]} tokens so far, layers hold {min(cache.lengths)} or more]")
        text = ""


def turn_tokens(tokenizer, question: str, first: bool) -> torch.Tensor:
    """The tokens of a user's turn, ``[1, T]``; in a later one, those that end the answer too."""
    messages = [{"role": "user", "content": question}]
    if not first:
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        messages = before + messages
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if not first:
        rendered = rendered.partition("ANSWER")[2]
    return tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids


if __name__ == "__main__":
    with torch.inference_mode():
        main()
