"""What the methods share that ask a draft model before the prefill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from claa_ops.selection.answer import Reader
from claa_ops.selection.budget import Budget
from claa_ops.selection.method import Method


@dataclass(frozen=True)
class Drafted(Method):
    """A method whose first pass is a draft model's; the second one reads what it chose.

    Args:
        keep: what the model reads: a rate of the prompt in (0, 1], or a number of tokens.
        draft: any decoder with the tokenizer of the model; None for the model itself.
        shared_tokenizer: the draft is known to have the model's tokenizer, although its vocabulary
            is of another size, as when both are padded.

    Raises:
        ValueError: a setting is out of its range; or, in a prefill, the vocabularies of draft
            and model differ in size.
    """

    keep: float | int = 0.1
    draft: Any | None = field(default=None, repr=False)
    shared_tokenizer: bool = False

    _keep: Budget = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        shared = isinstance(self.shared_tokenizer, bool)
        self.require(shared, "shared_tokenizer", "True or False")
        object.__setattr__(self, "_keep", self.budget("keep"))

    @property
    def two_pass(self) -> bool:
        """True: the first pass is the draft's."""
        return True

    @property
    def needs_ranking(self) -> bool:
        """True: the draft's."""
        return True

    def ask(self, reader: Reader) -> Reader:
        """The draft, or the model itself; ValueError if its vocabulary cannot be the model's."""
        draft = reader.drafted_by(self.draft)
        if draft.vocab_size != reader.vocab_size and not self.shared_tokenizer:
            raise ValueError(
                f"{type(self).__name__}: draft must have the tokenizer of the model, whose "
                f"vocabulary has {reader.vocab_size} tokens, got one of {draft.vocab_size}"
            )
        return draft
