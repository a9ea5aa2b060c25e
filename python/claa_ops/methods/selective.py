from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from claa_ops.methods.drafted import Drafted
from claa_ops.selection.answer import Reader
from claa_ops.selection.budget import Size, Sizes
from claa_ops.selection.method import Preparation
from claa_ops.selection.state import PrefillState


@dataclass(frozen=True)
class SelectiveContext(Drafted):
    """Drop what a language model finds easy to guess, whatever the question needs.

    A small model reads the prompt first. A token's self-information is ``-log p``, where ``p`` is
    its probability given the tokens before it. The tokens with the most go to the model, as if
    they were the prompt: their positions are 0, 1, 2, ..., and decoding continues after them.

    Args:
        keep: what the model reads: a rate of the prompt in (0, 1], or a number of tokens, the
            window and the first token included.
        draft: any decoder with the tokenizer of the model; None for the model itself.
        shared_tokenizer: see :class:`SpeculativePrefill`.
        window: how many last tokens are always kept. It must reach back over the question, which
            the original does not compress either.
        kernel_size, pool_mode: unused: nothing is pooled.

    Raises:
        ValueError: a setting is out of its range; or, in a prefill, the vocabularies of draft and
            model differ in size.

    Source: Selective Context (arXiv 2304.12102, 2310.06201) and its public code
    (liyucheng09/Selective_Context, 099e651), which drops 35 % by default and reads with GPT-2. Its
    unit is the noun phrase; this is its level ``token``, since phrases and sentences need the text
    and a parser of its language. Not there, and ours: the window, where the original is told what
    is context. Departures: the whole prompt is read at once, where the public code reads each
    sentence by itself; the first token, which nothing predicts, is kept; kept ids are not
    tokenized anew.

    Example:
        >>> method = SelectiveContext(keep=0.5, window=64)
    """

    keep: float | int = 0.65
    window: int = field(default=32, kw_only=True)

    def prepare(
        self, reader: Reader, input_ids: Tensor, attention_mask: Tensor | None
    ) -> Preparation:
        """Rank the prompt by what the draft could not guess."""
        ranking, work = self.ask(reader).self_information(input_ids, attention_mask)
        return Preparation(ranking.to(input_ids.device), work)

    def choose(self, state: PrefillState) -> Tensor | None:
        """The first token, the least predictable ones and the window, ``[B, k]``."""
        ranking = state.ranking
        assert ranking is not None  # begin refuses a prefill that lacks one
        if state.length <= self._tokens(state.sizes):
            return None
        scores = ranking[:, : state.length - self.window]
        return self.keep_best(state, scores, self._tokens, window=self.window, num_sinks=1)

    def _tokens(self, sizes: Sizes[Size]) -> Size:
        return self._keep.tokens(sizes.prompt, self.window + 1)
