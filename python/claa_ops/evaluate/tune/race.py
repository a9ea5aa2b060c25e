"""The search: settings race on rounds of prompts, the good ones against cheaper ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.grid.cells import Cell
from claa_ops.evaluate.grid.journal import Journal
from claa_ops.evaluate.grid.records import End, Record, evaluate_model
from claa_ops.evaluate.tasks import Example
from claa_ops.evaluate.tune.judge import SOME, Aim, Prompt, Score, Verdict, judge
from claa_ops.evaluate.tune.rounds import Rounds, answered, asked, known

ABLE = 0.3  # the share of right answers below which a task says nothing about a setting
TRIED = 4  # prompts of a task after which that is decided
_BESIDE = 7  # settings that share the rounds after the first; one less each time
_LEAST = 3  # but for these
_AT_ONCE = 4  # prompts after which a setting may be seen to fail
_MOST_ROUNDS = 4  # of prompts that are taken together


@dataclass
class Chain:
    """One method at one layer, with its budgets in ascending order.

    The largest budget is tried first. Where it holds the aim, the next smaller one is tried beside
    it, and takes its place if it holds too. Where it fails, so do the smaller ones.
    """

    cells: Sequence[Cell]
    place: int = field(init=False)  # of the budget in use
    below: int = 0  # those before it failed

    def __post_init__(self) -> None:
        self.place = len(self.cells) - 1

    def active(self, holds: Callable[[Cell], bool]) -> list[Cell]:
        """The settings to try: the one in use, and the one that may take its place."""
        if self.place == len(self.cells):
            return []
        used = self.cells[self.place]
        return [used, self.cells[self.place - 1]] if self._may_descend(holds) else [used]

    def take(self, fails: Callable[[Cell], bool], holds: Callable[[Cell], bool]) -> None:
        """Note what came of the active ones."""
        if self.place < len(self.cells) and fails(self.cells[self.place]):
            self.place += 1
            self.below = self.place
        elif self._may_descend(holds):
            smaller = self.cells[self.place - 1]
            if fails(smaller):
                self.below = self.place
            elif holds(smaller):
                self.place -= 1

    def _may_descend(self, holds: Callable[[Cell], bool]) -> bool:
        return self.below < self.place < len(self.cells) and holds(self.cells[self.place])


@dataclass
class Race:
    """Settings against full prefill, round by round, until time is up or all is decided.

    Attributes:
        model, tokenizer: the model, attached.
        full, chains: full prefill, and the settings to try.
        rounds: the prompts.
        journal: where finished answers are kept.
        aim: what is wanted.
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
    aim: Aim
    chat: bool | None
    batch_size: int
    is_time_up: Callable[[], bool]
    on_step: Callable[[str], None]
    on_problem: Callable[[str], None]
    scores: dict[Cell, dict[Prompt, Score]] = field(default_factory=dict)
    end: End = "all"

    def __post_init__(self) -> None:
        self.scores = {self.full: {}}
        self._done: dict[Cell, int] = {}  # steps of each setting
        self._shares: dict[Cell, dict[Prompt, float]] = {}  # of full prefill's multiply-adds
        self._judged: dict[Cell, tuple[tuple[object, ...], Verdict]] = {}  # by what they rest on
        self._made: list[list[Example]] = []  # the prompts of each step
        self._targets: list[list[Example]] = []  # those that settings are tried on, with targets

    def run(self, most: int) -> None:
        """Try settings on at most so many rounds, of which later steps take several together."""
        steps = _steps(most)
        while self.end == "all":
            live = [cell for cell in self._live() if self._done.get(cell, 0) < len(steps)]
            if not live:
                return
            index = min(self._done.get(cell, 0) for cell in live)
            cells = [cell for cell in live if self._done.get(cell, 0) == index]
            self.on_step(f"round {steps[index][0] + 1}: {len(cells)} settings")
            prompts = self._step(index, steps[index])
            if not self._made[index]:
                return  # no task has more
            self._try(cells, prompts)
            if self.end == "all":
                self._done |= {cell: index + 1 for cell in cells}
                for chain in self.chains:
                    chain.take(self._fails, self._holds)

    def able(self) -> tuple[int, int]:
        """How many tasks full prefill can do, and how many there are, by the first rounds alone."""
        self._step(0, range(TRIED))
        return len(self.counted()), len(self.answered())

    def verdicts(self) -> list[Verdict]:
        """What is known of each setting that was tried, the cheapest first."""
        tried = [cell for chain in self.chains for cell in chain.cells if cell in self._shares]
        found = [self.verdict(cell) for cell in tried]
        kept = [one for one in found if one is not None and not math.isnan(one.ratio)]
        return sorted(kept, key=lambda one: one.work)

    def verdict(self, cell: Cell) -> Verdict | None:
        """What is known of one setting; None if it answered nothing."""
        if cell not in self._shares:
            return None
        own, tasks = self.scores[cell], self.counted()
        key = len(own), *tasks
        if cell not in self._judged or self._judged[cell][0] != key:
            shares = self._shares[cell].values()
            work = sum(shares) / len(shares)
            self._judged[cell] = key, judge(cell, work, own, self.scores[self.full], tasks)
        return self._judged[cell][1]

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
        """The active settings, but for those that are dearer or clearly worse than another."""
        active = [cell for chain in self.chains for cell in chain.active(self._holds)]
        # In the first step all are looked at.
        if new := [cell for cell in active if cell not in self._done and not self._descends(cell)]:
            return new
        known = {cell: found for cell in active if (found := self.verdict(cell)) is not None}
        reaching = [one.work for one in self.verdicts() if one.reaches(self.aim)]
        limit = min(reaching, default=math.inf)
        best = max(known, key=lambda cell: _floor(known[cell], self.aim), default=None)
        kept = [
            cell
            for cell in active
            if cell not in known
            or (known[cell].work <= limit and not (best and self._is_worse(cell, best)))
        ]
        step = max(self._done.values(), default=0)
        # What may take the place of another one has few prompts: it goes with that one.
        kept.sort(key=lambda cell: -_floor(known.get(cell), self.aim))
        return kept[: max(_LEAST, _BESIDE - step)]

    def _descends(self, cell: Cell) -> bool:
        """Whether a setting would take the place of a larger budget, which holds."""
        return any(cell in chain.active(self._holds)[1:] for chain in self.chains)

    def _is_worse(self, cell: Cell, best: Cell) -> bool:
        """Whether a setting that does not hold is clearly worse than another one."""
        if cell == best or self._holds(cell):
            return False
        found = judge(cell, 0.0, self.scores[cell], self.scores[best], self.counted())
        return found.prompts >= SOME and found.high < 1

    def _fails(self, cell: Cell) -> bool:
        verdict = self.verdict(cell)
        return verdict is not None and verdict.fails(self.aim)

    def _holds(self, cell: Cell) -> bool:
        verdict = self.verdict(cell)
        return verdict is not None and verdict.holds(self.aim)

    def _step(self, index: int, rounds: range) -> list[Example]:
        """The prompts of some rounds that settings are tried on: full prefill answers all first."""
        if index < len(self._targets):
            return self._targets[index]
        hopeless = {
            task
            for task, (share, prompts) in self.answered().items()
            if share < ABLE and prompts >= TRIED
        }
        if index == len(self._made):
            made = [example for each in rounds for example in self.rounds.take(each)]
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
        size = max(_AT_ONCE, self.batch_size)
        for first in range(0, len(prompts), size):
            few = prompts[first : first + size]
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
                self._shares.setdefault(record.cell, {})[place] = record.operations

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


def _steps(most: int) -> list[range]:
    """The rounds of each step: 1, 1, 2, 4, 4, ...: a batch of several is hardly slower."""
    steps, first = [], 0
    while first < most:
        size = min(max(1, first), _MOST_ROUNDS, most - first)
        steps.append(range(first, first + size))
        first += size
    return steps


def _floor(verdict: Verdict | None, aim: Aim) -> float:
    """How near it is to the aim for sure; of what is not known, as near as can be."""
    floor = math.inf if verdict is None else verdict.floor(aim)
    return -math.inf if math.isnan(floor) else floor
