"""Hugging Face ``generate`` with full prefill, and the same call after a prefill by CLAA.

One fact stands in the middle of a long text. Up to the selection layer every layer sees the whole
prompt; those after it see the tenth that the last tokens of the prompt attended to most.

    pip install 'claa-ops[models]'
    python examples/hugging_face_generate.py [MODEL] [--layer LAYER] [--keep RATE]

MODEL is a folder or a hub id of any family in docs/architectures.md.
"""

import argparse
import contextlib
import time
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import claa_ops
from claa_ops.methods import CLAA

FACT = "The best thing to do in Boston is to feed the ducks at the lake."
QUESTION = "According to the text, what is the best thing to do in Boston?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--keep", type=float, default=0.1)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    text = "\n\n".join(topics.values())[:12_000]
    prompt = f"{text[:6_000]}\n\n{FACT}\n\n{text[6_000:]}\n\n{QUESTION}"
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = inputs.input_ids.shape[1]

    method = CLAA(keep=arguments.keep, layer=arguments.layer)
    for name, prefill in (
        ("full prefill", contextlib.nullcontext()),
        ("CLAA", claa_ops.attached(model, method)),
    ):
        with prefill:
            began = time.perf_counter()
            model.generate(**inputs, max_new_tokens=1)
            seconds = time.perf_counter() - began
            tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        answer = tokenizer.decode(tokens[0, length:], skip_special_tokens=True)
        print(f"{name}: {length} tokens, the first new one after {seconds:.2f} s: {answer!r}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
