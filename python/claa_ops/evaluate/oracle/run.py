"""Load the model, rank all prompts, compare, and draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from claa_ops.evaluate.oracle.measures import MEASURES
from claa_ops.evaluate.oracle.page import write_page
from claa_ops.evaluate.oracle.picture import draw_heat_map, draw_measure
from claa_ops.evaluate.oracle.rank import Study, compare_rankings, rank_examples
from claa_ops.evaluate.oracle.settings import Settings
from claa_ops.evaluate.parse import parse_budget, parse_layers
from claa_ops.evaluate.spec import MethodSpec
from claa_ops.evaluate.tasks import Example, TaskSettings, examples, has_needles
from claa_ops.evaluate.tasks.prompt import PromptCounter
from claa_ops.huggingface.models import InputError, load_model
from claa_ops.huggingface.transformers_api import cache_layers
from claa_ops.methods import Coarse, Method, find_method
from claa_ops.prefill import attach


def run_study(
    settings: Settings,
    prompt: Example | None,
    on_step: Callable[[str], None],
    on_problem: Callable[[str], None],
) -> tuple[Study, PreTrainedTokenizerBase]:
    """Load the model, rank all prompts and compare the rankings.

    Args:
        settings: what to compare, checked.
        prompt: what the check returned: the single prompt, or None for those of the tasks.
        on_step: called with a line of text before each slow step.
        on_problem: told of each prompt or record that cannot be used; the others are.

    Returns:
        The study, and the tokenizer of its prompts.

    Raises:
        InputError: a setting does not fit the model, or no prompt can be used.
    """
    keep = parse_budget("keep", settings.keep)
    model, tokenizer = load_model(settings.source, settings.dtype, settings.device, on_step)
    try:
        attach(model)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and settings.length > context and has_needles(settings.tasks or ()):
        raise InputError(
            f"length must be at most what the model's context holds, {context:,} tokens, got "
            f"{settings.length:,}"
        )
    num_layers = config.num_hidden_layers
    if settings.layer is None:
        kinds = enumerate(cache_layers(model.config))
        layers = [layer for layer, kind in kinds if kind.attends][:-1]
    else:
        layers = sorted(set(parse_layers(settings.layer)))
    methods = {
        spec.label: _make_method(spec, num_layers, layers, keep) for spec in settings.specs()
    }
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
    counter = PromptCounter(tokenizer, settings.chat)
    return list(examples(settings.tasks or (), of_tasks, counter, on_problem))


def _make_method(
    spec: MethodSpec, num_layers: int, layers: Sequence[int], keep: float | int
) -> Method:
    """The method, if it ranks the tokens at each of the layers."""
    if issubclass(find_method(spec.name), Coarse):
        raise InputError(
            f"{spec.label} cannot be compared: expected a method that ranks all tokens up to the "
            "layer after which it selects; this one runs a part of them ahead for that"
        )
    if spec.has("layer"):
        return [spec.make(num_layers, layer, keep) for layer in layers][0]  # each is checked
    method = spec.make(num_layers, keep=keep)
    if not method.needs_ranking:
        raise InputError(
            f"{spec.label} cannot be compared: expected a method that selects tokens after a "
            "layer, or ranks them before the prefill"
        )
    return method
