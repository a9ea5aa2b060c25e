"""Hugging Face ``generate`` after a prefill by CLAA, beside the same after full prefill.

One fact stands in the middle of a long text. Up to the selection layer every layer sees the whole
prompt; those after it see the tenth that the last tokens of the prompt attended to most.

    pip install 'claa-ops[models]'
    python examples/hugging_face_generate.py [MODEL] [--layer LAYER] [--keep RATE]

MODEL is a folder or a hub id of any family in docs/architectures.md.
"""

import argparse
import time
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from claa_ops.methods import CLAA, FullKV
from claa_ops.prefill import ClaaCache, attach

FACT = "The best thing to do in Boston is to feed the ducks at the lake."
QUESTION = "According to the text, what is the best thing to do in Boston?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--keep", type=float, default=0.1)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = attach(AutoModelForCausalLM.from_pretrained(arguments.model).eval())
    text = "\n\n".join(topics.values())[:12_000]
    prompt = f"{text[:6_000]}\n\n{FACT}\n\n{text[6_000:]}\n\n{QUESTION}"
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = inputs.input_ids.shape[1]

    for method in (FullKV(), CLAA(keep=arguments.keep, layer=arguments.layer)):
        cache = ClaaCache(model.config, method)
        began = time.perf_counter()
        tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
        seconds = time.perf_counter() - began
        answer = tokenizer.decode(tokens[0, length:], skip_special_tokens=True)
        kept = length if cache.state.positions is None else cache.state.positions.shape[1]
        print(
            f"{type(method).__name__}: {kept} of {length} tokens reach the last layer, "
            f"{cache.nbytes() / 2**20:.1f} MiB of keys and values, {seconds:.1f} s: {answer}"
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
