"""A method of your own is one function of what a layer saw.

This one ranks a token by the attention that the last tokens pay it, times the length of its value:
attention to a token whose value is near zero changes nothing. It has the settings of every method
that drops tokens, and works wherever a name of a method does:

    pip install 'claa-ops[models]'
    python examples/own_method.py [MODEL]

    PYTHONPATH=examples claa-ops generate --method own_method:ValueAware --prompt "..."
"""

import argparse
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from claa_ops.methods import Pruning
from claa_ops.prefill import generate, prefill
from claa_ops.selection import Layer


@dataclass(frozen=True)
class ValueAware(Pruning):
    """Attention of the last tokens, weighted with the norm of the values."""

    def score(self, layer: Layer) -> Tensor:
        """Scores ``[B, G, M]`` of the tokens before the window, for each key/value head."""
        return layer.window_scores * layer.value[:, :, : layer.context].float().norm(dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    method = ValueAware(keep=0.2, layer=model.config.num_hidden_layers * 2 // 3)
    prompt = f"{topics['assert']}\n\nIn one sentence, an assert statement"
    ids = tokenizer(prompt, return_tensors="pt").input_ids

    prefilled = prefill(model, ids, method)
    tokens = generate(model, ids, method, max_new_tokens=24)
    print(f"{prefilled.positions.shape[1]} of {ids.shape[1]} tokens reach the last layer")
    print(f"{prefilled.work_share:.2f} of full prefill's multiply-adds by weights")
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
