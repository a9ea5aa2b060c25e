"""The search: for each method and layer the smallest budget that does not fail, in rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.grid.cells import Cell
from claa_ops.evaluate.grid.journal import Journal
from claa_ops.evaluate.grid.records import End, Record, evaluate_model
from claa_ops.evaluate.tasks import Example
from claa_ops.evaluate.tune.judge import Prompt, Score, Verdict, judge
from claa_ops.evaluate.tune.rounds import Rounds, answered, asked, known
from claa_ops.huggingface.work import count_work

ABLE = 0.3  # the share of right answers below which a task says nothing about a setting
_TRIED = 4  # prompts of a task after which that is decided
_BESIDE = 6  # settings that share a round after the first one
_AT_ONCE = 4  # prompts after which a setting may be seen to fail


@dataclass
class Chain:
    """One method at one layer, with its budgets in ascending order.

    The smallest budget that does not clearly fail is found by bisection on the first round; the
    next rounds try that one, and go on to the next larger one when it fails after all. A smaller
    budget than one that failed is taken to fail as well.
    """

    cells: Sequence[Cell]
    first: int = 0  # those before it failed
    last: int = field(init=False)  # it or one before it is wanted

    def __post_init__(self) -> None:
        self.last = len(self.cells)

    @property
    def active(self) -> Cell | None:
        """The setting to try next; None if all failed."""
        if self.first < self.last:
            return self.cells[(self.first + self.last) // 2]
        return self.cells[self.first] if self.first < len(self.cells) else None

    def take(self, fails: bool) -> None:
        """Note what came of the active one."""
        bisecting = self.first < self.last
        place = (self.first + self.last) // 2
        if fails:
            self.first = place + 1
            self.last = max(self.last, self.first)
        elif bisecting:
            self.last = place


@dataclass
class Race:
    """Settings against full prefill, round by round, until time is up or all is decided.

    Attributes:
        model, tokenizer: the model, attached.
        full, chains: full prefill, and the settings to try.
        rounds: the prompts.
        journal: where finished answers are kept.
        aim, worst: the least ratio to full prefill's score, of all prompts and of each task.
        chat, batch_size: as `evaluate_model` takes them.
        is_time_up: asked before each prefill.
        on_step: told what is being done.
        on_problem: told of what cannot be used.
        scores: what was found of each setting and prompt.
        end: what ended it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    full: Cell
    chains: Sequence[Chain]
    rounds: Rounds
    journal: Journal
    aim: float
    worst: float
    chat: bool | None
    batch_size: int
    is_time_up: Callable[[], bool]
    on_step: Callable[[str], None]
    on_problem: Callable[[str], None]
    scores: dict[Cell, dict[Prompt, Score]] = field(default_factory=dict)
    end: End = "all"

    def __post_init__(self) -> None:
        self.scores = {self.full: {}}
        self._done: dict[Cell, int] = {}  # rounds of each setting
        self._work: dict[Cell, tuple[int, int]] = {}  # its multiply-adds, and full prefill's
        self._made: list[list[Example]] = []  # the prompts of each round
        self._targets: list[list[Example]] = []  # those that settings are tried on, with targets

    def run(self, most: int) -> None:
        """Try settings on at most so many rounds."""
        while self.end == "all":
            live = [cell for cell in self._live() if self._done.get(cell, 0) < most]
            if not live:
                return
            # In the first round all are looked at, then the cheapest ones, until these fail.
            if all(self._done.get(cell, 0) for cell in live):
                live = sorted(live, key=self._share)[:_BESIDE]
            index = min(self._done.get(cell, 0) for cell in live)
            cells = [cell for cell in live if self._done.get(cell, 0) == index]
            self.on_step(f"round {index + 1}: {len(cells)} settings")
            prompts = self._round(index)
            if not self._made[index]:
                return  # no task has more
            self._try(cells, prompts)
            for chain in self.chains if self.end == "all" else ():
                if chain.active in cells:
                    self._done[chain.active] = index + 1
                    chain.take(self._fails(chain.active))

    def verdicts(self) -> list[Verdict]:
        """What is known of each setting that was tried, the cheapest first."""
        tried = [cell for chain in self.chains for cell in chain.cells if cell in self._work]
        found = [self.verdict(cell) for cell in tried]
        kept = [one for one in found if one is not None and not math.isnan(one.ratio)]
        return sorted(kept, key=lambda one: one.work)

    def verdict(self, cell: Cell) -> Verdict | None:
        """What is known of one setting; None if it answered nothing."""
        if cell not in self._work:
            return None
        own, full = self._work[cell]
        tasks = self.counted()
        return judge(cell, own / full, self.scores[cell], self.scores[self.full], tasks)

    def answered(self) -> dict[str, tuple[float, int]]:
        """For each task the share of prompts that full prefill answers right, and their number."""
        found: dict[str, list[float]] = {}
        for (task, _), score in self.scores[self.full].items():
            found.setdefault(task, []).append(score.right)
        return {task: (sum(rights) / len(rights), len(rights)) for task, rights in found.items()}

    def counted(self) -> list[str]:
        """The tasks that full prefill can do, as far as is known."""
        return [task for task, (share, _) in self.answered().items() if share >= ABLE]

    def _live(self) -> list[Cell]:
        """The active settings, but for those that cost more than one that reaches the aim."""
        reaching = [one.work for one in self.verdicts() if one.reaches(self.aim, self.worst)]
        limit = min(reaching, default=math.inf)
        active = [chain.active for chain in self.chains]
        return [cell for cell in active if cell is not None and self._share(cell) <= limit]

    def _share(self, cell: Cell) -> float:
        own, full = self._work.get(cell, (0, 1))
        return own / full

    def _fails(self, cell: Cell) -> bool:
        verdict = self.verdict(cell)
        return verdict is not None and verdict.fails(self.aim)

    def _round(self, index: int) -> list[Example]:
        """The prompts of a round that settings are tried on: full prefill answers all first."""
        if index < len(self._targets):
            return self._targets[index]
        hopeless = {
            task
            for task, (share, prompts) in self.answered().items()
            if share < ABLE and prompts >= _TRIED
        }
        if index == len(self._made):
            made = self.rounds.take(index)
            self._made.append([example for example in made if example.task not in hopeless])
        prompts = self._made[index]
        targets = [target for each in prompts if (target := known(each)) is not None]
        for record in self._evaluate([asked(x) for x in prompts if known(x) is None], [self.full]):
            place = record.task, record.name
            example = next(each for each in prompts if (each.task, each.name) == place)
            target = answered(example, "".join(record.answers), self.rounds.count)
            self.scores[self.full][place] = Score(record.score, record.score)
            if target is None:  # it says nothing of a setting, but something of the task
                self.scores[self.full][place] = Score(0.0, 0.0)
            else:
                targets.append(target)
        forced = [example for example in targets if example.target is not None]
        self._note(self._evaluate(forced, [self.full]), forced)
        able = self.counted()
        targets = [example for example in targets if example.task in able]
        if self.end == "all":
            self._targets.append(targets)
        return targets

    def _try(self, cells: Sequence[Cell], prompts: Sequence[Example]) -> None:
        """Try settings on prompts, a few at a time: one that clearly fails is not tried on more."""
        for first in range(0, len(prompts), _AT_ONCE):
            few = prompts[first : first + _AT_ONCE]
            self._note(self._evaluate(few, cells), few)
            cells = [cell for cell in cells if not self._fails(cell)]

    def _note(self, records: Sequence[Record], prompts: Sequence[Example]) -> None:
        targets = {(example.task, example.name): example.target for example in prompts}
        for record in records:
            place = record.task, record.name
            probability = record.score
            if record.logprob is not None:
                ids = self.tokenizer(targets[place], add_special_tokens=False).input_ids
                probability = math.exp(record.logprob * len(ids))
            self.scores.setdefault(record.cell, {})[place] = Score(record.score, probability)
            if record.cell is not self.full:
                own, full = self._work.get(record.cell, (0, 0))
                done, whole = _work(self.model, record)
                self._work[record.cell] = own + done, full + whole

    def _evaluate(self, prompts: Sequence[Example], cells: Sequence[Cell]) -> list[Record]:
        """The records of these settings; none once something ended the search."""
        if not prompts or self.end != "all":
            return []
        records = evaluate_model(
            self.model,
            self.tokenizer,
            "tuned",
            prompts,
            cells,
            self.journal,
            chat=self.chat,
            batch_size=self.batch_size,
            is_time_up=self.is_time_up,
            on_problem=self.on_problem,
        )
        self.end = records.end
        return records.found


def make_chains(cells: Sequence[Cell]) -> list[Chain]:
    """The settings of each method and layer together, in ascending order of budget."""
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.label, cell.layer), []).append(cell)
    return [Chain(sorted(group, key=lambda cell: cell.keep)) for group in groups.values()]  # type: ignore[arg-type, return-value]


def _work(model: PreTrainedModel, record: Record) -> tuple[int, int]:
    """Multiply-adds of a record's layers, by weights and in attention, and of full prefill's.

    Attention is that of a single selection, after the last layer at which the method selects.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    whole = max(record.cell.method.selection_layers(num_layers), default=num_layers - 1) + 1
    seen = [record.tokens] * whole + [record.kept] * (num_layers - whole)
    full = count_work(model, [record.tokens] * num_layers)
    own = round(record.work * full.linear) + count_work(model, seen).attention
    return own, full.linear + full.attention
