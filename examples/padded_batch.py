"""A batch of prompts of different lengths: each row keeps what it would keep alone.

Padding is on the left, where it is neither scored nor kept nor attended to. A rate is of each
row's own length, so a short row keeps fewer tokens than a long one beside it.

    pip install 'claa-ops[models]'
    python examples/padded_batch.py [MODEL]
"""

import argparse
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from claa_ops.methods import CLAA
from claa_ops.prefill import ClaaCache, attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    model = attach(AutoModelForCausalLM.from_pretrained(arguments.model).eval())
    method = CLAA(keep=0.2, layer=model.config.num_hidden_layers // 2)
    names = ["while", "assert", "lambda"]
    prompts = [f"{topics[name]}\n\nIn one sentence: what is this about?" for name in names]

    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    cache = ClaaCache(model.config, method)
    answers = model.generate(**batch, past_key_values=cache, max_new_tokens=16, do_sample=False)
    width = batch.input_ids.shape[1]

    for row, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        inputs = tokenizer(prompt, return_tensors="pt")
        alone = ClaaCache(model.config, method)
        answer = model.generate(**inputs, past_key_values=alone, max_new_tokens=16, do_sample=False)
        length = inputs.input_ids.shape[1]
        # Positions are those of the padded prompt, -1 where the row keeps less than the longest.
        positions = cache.state.positions[row]
        kept = positions[positions >= 0] - (width - length)
        assert torch.equal(kept, alone.state.positions[0])
        same = torch.equal(answers[row, width:][: answer.shape[1] - length], answer[0, length:])
        print(
            f"{name}: {len(kept)} of {length} tokens reach the last layer, as alone; "
            f"the answer is {'the same' if same else 'another'}"
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
