"""The model class of lm-eval, under the name claa_ops.

::

    python -m claa_ops.lm_eval --model claa_ops \\
        --model_args pretrained=HuggingFaceTB/SmolLM2-135M-Instruct,method=claa,keep=0.2,layer=15 \\
        --tasks ruler

is lm-eval's own command with this class in it; all else is as in ``lm_eval``. Up to 0.4.13 lm-eval
asks no other package for models. Its main branch does, by the entry points ``lm_eval.models``, and
this class is one: with the releases after that ``lm_eval --model claa_ops ...`` finds it alone.
Importing this module is enough for ``simple_evaluate``.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jinja2
import torch

from claa_ops._extras import require

require("evaluate", "lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from claa_ops.evaluate.guard import printable, reason
from claa_ops.evaluate.parse import parse_budget
from claa_ops.evaluate.tasks.answer import decode_until, force
from claa_ops.huggingface.models import InputError, load_model, require_same_tokenizer
from claa_ops.methods import make_method
from claa_ops.prefill import Prefilled, attach, prefill
from claa_ops.selection.budget import is_count

_Scored = tuple[float, bool]
_DEFAULT_LENGTH = 2048  # lm-eval's own, for a model whose positions have no end


@register_model("claa_ops")
class ClaaLM(TemplateLM):
    """A decoder that prefills with any method, as a model of lm-eval.

    The context of a request is prefilled with the method. Then an answer is decoded greedily, or
    the given continuation is teacher-forced. Requests are served one by one; those that share a
    context share its prefill. Where context and answer are longer than the model
    together, the answer gets fewer tokens, but half of the length if it asks for as many; then
    the context is cut on the left. The first time that either happens it is said.

    Args:
        pretrained: a Hugging Face directory, a .gguf file or a hub id.
        method: as :func:`claa_ops.methods.find_method` takes it.
        keep: the budget, a rate (0.2, 20%) or a number of tokens.
        layer: the selection layer; both are left to the method's default if not given.
        draft: the model that ``speculative`` or ``selective-context`` asks first, as
            ``pretrained``; if not given, itself.
        dtype, device: as :func:`claa_ops.huggingface.models.load_model` takes them.
        max_length: of context and answer in tokens; the model's own if not given.
        settings: any other setting of the method, such as ``zscore=True``.

    Raises:
        InputError: the model or the draft cannot be loaded or attached, or their tokenizers
            differ; the method does not exist, has no such setting or does not fit the model;
            ``max_length`` is more than the model has; or, later, a request cannot be served.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str,
        method: str = "claa",
        keep: str | float | int | None = None,
        layer: int | None = None,
        draft: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        # lm-eval's command asks for cuda:0 unless told otherwise, wherever it runs.
        if device is None or (device == "cuda:0" and not torch.cuda.is_available()):
            device = "auto"
        self.model, self.tokenizer = load_model(pretrained, dtype, device)
        self._device = self.model.device
        config = self.model.config.get_text_config()
        self.max_length = _max_length(max_length, getattr(config, "max_position_embeddings", None))
        self._said: set[str] = set()
        try:
            attach(self.model)
            if draft is not None:
                settings["draft"], draft_tokenizer = load_model(draft, dtype, device)
                require_same_tokenizer(self.tokenizer, draft_tokenizer)
            self.method = make_method(
                method,
                num_layers=config.num_hidden_layers,
                layer=layer,
                keep=None if keep is None else parse_budget("keep", str(keep)),
                **settings,
            )
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        begin = self.tokenizer.bos_token_id
        token = self.eot_token_id if begin is None else begin
        if token is None:
            raise InputError(
                "an empty context needs a token that begins or ends a text, the tokenizer has none"
            )
        return token

    @property
    def tokenizer_name(self) -> str:
        """What distinguishes the tokenizer in the cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The turns of a conversation as text; InputError if the template refuses them."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(
                f"the chat template cannot be applied: {reason(error)}; leave "
                "--apply_chat_template out"
            ) from error

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text; a chat template has written the special tokens itself."""
        if printable(string) != string:
            self._say("half a character, as of a text cut in an emoji, is read as U+FFFD")
            # By way of UTF-16, in which two halves that belong together are one character.
            string = string.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        begin = self.tokenizer.bos_token
        special = add_special_tokens
        if special is None:
            special = not (begin and string.startswith(begin))
        return self.tokenizer(string, add_special_tokens=special).input_ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[_Scored]:
        """Log-probability of each continuation; that of none is 0, after whatever context."""
        asked = [request for request in requests if request.args[1]]
        scored = iter(super().loglikelihood(asked, disable_tqdm))
        return [next(scored) if request.args[1] else (0.0, True) for request in requests]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[_Scored]:
        """Log-probability of each continuation, and whether it is what the model would write."""
        results: dict[int, _Scored] = {}
        # Neighbours of the same context, such as the choices of a question, share its prefill.
        order = sorted(range(len(requests)), key=lambda index: requests[index][1])
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood")
        for context, indices in itertools.groupby(order, key=lambda index: requests[index][1]):
            group = list(indices)
            longest = max(len(requests[index][2]) for index in group)
            # The last token is scored, but not read.
            prefilled = self._prefill(self._cut(context, longest - 1))
            for index in group:
                target = torch.tensor(requests[index][2])
                ((right, logprob),) = force(self.model, _branch(prefilled), [target])
                results[index] = (logprob, right)
                self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
                bar.update()
        bar.close()
        return [results[index] for index in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts: there is no prompt to prune but what a window holds."""
        results = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(("", ""), *make_disjoint_window(window)) for window in windows]
            scored = self._loglikelihood_tokens(parts, disable_tqdm=True)
            results.append(sum(logprob for logprob, _ in scored))
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to a stop text or the longest length."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generate_until"):
            context, options = request.args
            options = _generation(options)
            ids = self.tok_encode(context)
            longest = self._fitting(len(ids), options["max_gen_toks"])
            prefilled = self._prefill(self._cut(ids, longest))
            (answer,) = decode_until(
                self.model, self.tokenizer, prefilled, [longest], [options["until"]]
            )
            self.cache_hook.add_partial("generate_until", request.args, answer)
            answers.append(answer)
        return answers

    def _fitting(self, context: int, new_tokens: int) -> int:
        """How many of the new tokens there can be after a context of that many."""
        if not is_count(new_tokens, 1):
            raise InputError(f"max_gen_toks must be a positive integer, got {new_tokens!r}")
        fitting = min(new_tokens, max(self.max_length - context, self.max_length // 2))
        if fitting < new_tokens:
            self._say(
                f"{new_tokens:,} new tokens are asked for after a context of {context:,}, but the "
                f"length is {self.max_length:,}: answers end sooner, here after {fitting:,}"
            )
        return fitting

    def _cut(self, context: Sequence[int], new_tokens: int) -> list[int]:
        """The end of a context that leaves room for so many tokens; all of it as a rule."""
        room = self.max_length - new_tokens
        if room < 1:
            raise InputError(
                f"a continuation must be shorter than the length of {self.max_length:,}, got "
                f"{new_tokens + 1:,} tokens"
            )
        if len(context) > room:
            self._say(
                f"a context of {len(context):,} tokens and {new_tokens:,} new ones are more than "
                f"the length of {self.max_length:,}: contexts are cut on the left, here to {room:,}"
            )
        return list(context)[-room:]

    def _say(self, text: str) -> None:
        """Warn, once of each kind of thing: the texts of one kind differ in their numbers."""
        kind = "".join(character for character in text if not character.isdigit())
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"claa_ops: {text} (said once)", stacklevel=2)

    def _prefill(self, context: list[int]) -> Prefilled:
        ids = torch.tensor([context or [self.prefix_token_id]], device=self.model.device)
        try:
            return prefill(self.model, ids, self.method)
        except ValueError as error:  # of the method: its caches hold less than its window, say
            raise InputError(str(error)) from error


def _max_length(given: int | None, positions: int | None) -> int:
    if given is None:
        return positions or _DEFAULT_LENGTH
    if not is_count(given, 2) or given > (positions or given):
        limit = f"in [2, {positions:,}], what the model holds" if positions else "at least 2"
        raise InputError(f"max_length must be {limit}, got {given!r}")
    return given


def _generation(options: dict[str, Any]) -> dict[str, Any]:
    """A request's options as `generate_until` reads them; InputError if it cannot serve them."""
    try:
        normal = dict(normalize_gen_kwargs(options))
    except (ValueError, TypeError) as error:
        raise InputError(f"the options {options} of a request: {reason(error)}") from error
    if normal.get("do_sample"):
        raise InputError("claa_ops decodes greedily: do_sample must be false, got true")
    if (beams := normal.get("num_beams") or 1) != 1:
        raise InputError(f"claa_ops decodes greedily: num_beams must be 1, got {beams!r}")
    normal["until"] = [mark for mark in normal["until"] if mark is not None]
    for mark in normal["until"]:
        if not isinstance(mark, str):
            raise InputError(f"until must be a text or a list of texts, got {mark!r}")
    return normal


def _branch(prefilled: Prefilled) -> Prefilled:
    """The same prefill with a cache of its own, to be continued in one way of several."""
    cache = copy.copy(prefilled.cache)
    cache.layers = [copy.deepcopy(layer) for layer in cache.layers]
    return replace(prefilled, cache=cache)
