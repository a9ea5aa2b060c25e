"""One prompt of a task, and how an answer to it is graded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from claa_ops.evaluate.inputs import require_text
from claa_ops.huggingface.models import InputError


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with a target, or with a grade for whatever the model answers.

    A target is teacher-forced: the answer is right if each of its tokens is the model's first
    choice after those before it, which is what greedy decoding would have written. Without one
    the answer is decoded greedily and graded.

    Attributes:
        task: the task, a column of the tables.
        name: the prompt's name within the task, the same in every run.
        prompt: the user's text.
        answer_prefix: how the answer is made to begin.
        chat: whether the chat template applies; None: if the tokenizer has one.
        target: the right answer, after the prefix.
        grade: the score in [0, 1] of an answer.
        answers: the texts that the grade looks for.
        max_new_tokens: the length at which an answer is cut off.
        stop: texts that end an answer.
        enough: whether an answer so far may end, because no more of it changes its grade.
        fact: the part of the prompt that decides the answer, where it is known and one.
        facts: where in the prompt all parts stand that decide the answer: for each the first
            character and the one after its last. Of a second question, in the first one's prompt.
        protected: where in the prompt stands what a caller knows and may have kept whole, likewise.
        place: where it stands: the prompt's length in tokens and the fact's depth in [0, 1].
        then: a second question about the prompt, asked as a further turn after the first one's
            answer; both are decoded, and the score is the mean of theirs.
        may_cut: whether a prompt too long for the model is cut in the middle; else it is refused.
        source: file and line of a record; empty for a prompt that was made here.
    """

    task: str
    name: str
    prompt: str
    answer_prefix: str = ""
    chat: bool | None = None
    target: str | None = None
    grade: Callable[[str], float] | None = None
    answers: Sequence[str] = ()
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    enough: Callable[[str], bool] | None = field(default=None, compare=False)
    fact: str | None = None
    facts: tuple[tuple[int, int], ...] = ()
    protected: tuple[tuple[int, int], ...] = ()
    place: Mapping[str, float] = field(default_factory=dict)
    then: Example | None = None
    may_cut: bool = False
    source: str = ""

    @property
    def questions(self) -> list[Example]:
        """This one, and the second question if there is one."""
        return [self] if self.then is None else [self, self.then]

    @property
    def where(self) -> str:
        """What a user finds the prompt by."""
        return self.source or f"{self.task}, {self.name}"

    def check(self) -> None:
        """Raise InputError, before a model runs, unless all texts are made of characters."""
        require_text("the prompt", self.prompt)
        require_text("the answer's prefix", self.answer_prefix)
        for answer in (self.target or "", *self.answers):
            require_text("the right answer", answer)
        if self.then is not None:
            if self.grade is None or self.then.grade is None:
                raise InputError("two questions about a prompt must both have a grade")
            self.then.check()
