"""What two processes with half of the heads each find, and one with all heads: see main."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import claa_ops
from claa_ops.huggingface.tuned import model_identity
from claa_ops.huggingface.turns import ask_again
from claa_ops.methods import (
    ASL,
    CLAA,
    Coarse,
    FastKV,
    GemFilter,
    Hops,
    LazyLLM,
    Method,
    Oracle,
    Peak,
    Pruning,
    PyramidInfer,
    PyramidKV,
    SelectiveContext,
    SnapKV,
    SpeculativePrefill,
    UniPrefill,
)
from claa_ops.prefill import ClaaCache, attach, decode, prefill
from claa_ops.selection import Layer
from support.tiny_models import generate, prompt


@dataclass(frozen=True)
class Unmerged(Pruning):
    """A ranking by the heads of one process."""

    def rank(self, layer: Layer, before: Tensor | None) -> Tensor:
        """The sum of the scores, and no more."""
        return layer.scores.sum(dim=1)


PROCESSES = 2
STEPS = 5
METHODS: dict[str, Method] = {
    "claa": CLAA(keep=50, layer=2, last_n=3, first_full=0, keep_kv=30),
    "claa, sums": CLAA(keep=50, layer=2, last_n=3, zscore=True, over_heads="sum"),
    "claa, within": CLAA(keep=50, layer=2, last_n=3, in_layer=True),
    "peak": Peak(keep=60, layer=1, keep_kv=0.15),
    "peak, staged": Peak(keep=(90, 50), layer=(0, 2)),
    "fastkv": FastKV(keep=50, layer=1, keep_kv=25),
    "snapkv": SnapKV(keep=0.2),
    "pyramidkv": PyramidKV(keep=0.2),
    "hops": Hops(keep=60, layer=1, states="hidden", num_seeds=8, least=20),
    "gemfilter": GemFilter(keep=50, layer=1),
    "uniprefill": UniPrefill(top_p=0.6, layer=1, block=8, num_sinks=4, window=8),
    "pyramidinfer": PyramidInfer(least=8),
    "coarse": Coarse(keep=60, layer=0, ahead=2, window=8),
    "revived": LazyLLM(keep=(90, 50), layer=(0, 2), revive=True),
    "asl": ASL(keep=60, layer=1, last_n=2, tau=None),
    "oracle": Oracle(keep=50, layer=1, max_new_tokens=4),
    "speculative": SpeculativePrefill(keep=0.3, look_ahead=3, chunk=None),
    "selective": SelectiveContext(keep=0.3),
}
BATCHES = {"one": (200,), "padded": (200, 130)}
SECOND_LOOK = Peak(keep=60, layer=1, second_look=True)

Found = dict[str, Any]


@torch.no_grad()
def find(model: PreTrainedModel) -> dict[str, Found]:
    """What each case of METHODS and BATCHES gives, by the names of both, and some others."""
    found = {
        f"{name}, {lengths}": find_one(model, method, *prompt(*BATCHES[lengths]))
        for name, method in METHODS.items()
        for lengths in BATCHES
    }
    identity = {"identity": model_identity(model)}
    others = {"second look": second_look(model), "generate": by_generate(model), "model": identity}
    return {**found, **others}


def find_one(model: PreTrainedModel, method: Method, ids: Tensor, mask: Tensor) -> Found:
    """What a method keeps of some prompts, and the answers to them."""
    prefilled = prefill(model, ids, method, mask, keep_scores=True)
    return {
        "positions": prefilled.positions,
        "ranking": prefilled.state.importance,
        "scores": prefilled.state.scores,
        "work": prefilled.work,
        "keys": [layer.keys.clone() for layer in prefilled.cache.layers],
        "answer": decode(model, prefilled, max_new_tokens=STEPS, eos_token_id=[]),
    }


def second_look(model: PreTrainedModel) -> Found:
    """What a later turn takes up, and what the model expects after it."""
    ids, mask = prompt(200, 130)
    prefilled = prefill(model, ids, SECOND_LOOK, mask)
    said = decode(model, prefilled, max_new_tokens=4, eos_token_id=[])
    again = ask_again(model, prefilled, [*said], [*prompt(9, 7, seed=3)[0]])
    keys = [layer.keys for layer in again.cache.layers]
    return {"positions": again.state.positions, "keys": keys, "answer": again.logits.argmax(dim=-1)}


def by_generate(model: PreTrainedModel) -> Found:
    """The tokens of ``model.generate``, with a cache that is passed and with one that is not."""
    ids, mask = prompt(200, 130)
    cache = ClaaCache(model.config, METHODS["peak"])
    tokens, _ = generate(attach(model), ids, cache, mask, STEPS)
    with claa_ops.attached(model, METHODS["claa"]):
        inside = model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False)
    assert cache.state is not None
    answer = torch.cat([tokens, inside[:, ids.shape[1] :]])
    return {"positions": cache.state.positions, "answer": answer}


def refusal(action: Any, *arguments: Any) -> str:
    """What an action is refused with."""
    try:
        with torch.no_grad():
            action(*arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing"


def load(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint, with the heads of this process."""
    config = DistributedConfig(tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


def main(folder: Path) -> None:
    """Run under torchrun, on the checkpoints ``model`` and ``uneven`` in a folder.

    Each process writes what it found to a file with its rank.
    """
    torch.set_num_threads(1)
    model, uneven = load(folder / "model"), load(folder / "uneven")
    values, unmerged = Hops(keep=60, layer=1), Unmerged(keep=60, layer=1)
    ids, mask = prompt(200)
    refused = {
        "uneven": refusal(attach, uneven),
        "base": refusal(attach, model.model),
        "attached": refusal(lambda: claa_ops.attached(model, values).__enter__()),
        "prefill": refusal(prefill, model, ids, values, mask),
        "unmerged": refusal(prefill, model, ids, unmerged, mask),
    }
    rank = torch.distributed.get_rank()
    torch.save({"found": find(model), "refused": refused}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
