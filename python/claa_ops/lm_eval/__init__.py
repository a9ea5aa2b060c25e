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
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from claa_ops._extras import require

require("evaluate", "lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from claa_ops.evaluate.answer import decode_until, force
from claa_ops.evaluate.inputs import parse_budget
from claa_ops.methods import make_method
from claa_ops.methods.speculative import require_same_tokenizer
from claa_ops.models import InputError, load_model
from claa_ops.prefill import Prefilled, attach, run

_Scored = tuple[float, bool]


@register_model("claa_ops")
class ClaaLM(TemplateLM):
    """A decoder that prefills with a ranking system, as a model of lm-eval.

    The context of a request is prefilled with the method. Then an answer is decoded greedily, or
    the given continuation is teacher-forced. Requests come one by one; those
    that share a context share its prefill.

    Args:
        pretrained: a Hugging Face directory, a .gguf file or a hub id.
        method: a key of :data:`claa_ops.methods.METHODS`.
        keep: the budget, a rate (0.2, 20%) or a number of tokens.
        layer: the selection layer; both are left to the method's default if not given.
        draft: the model that ``speculative`` asks first, as ``pretrained``; if not given, itself.
        dtype, device: as :func:`claa_ops.models.load_model` takes them.
        max_length: longest context in tokens, cut on the left; the model's own if not given.
        settings: any other setting of the method, such as ``zscore=True``.

    Raises:
        InputError: the model or the draft cannot be loaded or attached, or their tokenizers
            differ; the method does not exist, has no such setting or does not fit the model, or,
            later, a context.
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
        self.max_length = max_length or config.max_position_embeddings
        try:
            attach(self.model)
            if draft is not None:
                settings["draft"], its_tokenizer = load_model(draft, dtype, device)
                require_same_tokenizer(self.tokenizer, its_tokenizer)
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
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """What distinguishes the tokenizer in the cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The turns of a conversation as text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text; a chat template has written the special tokens itself."""
        begin = self.tokenizer.bos_token
        special = add_special_tokens
        if special is None:
            special = not (begin and string.startswith(begin))
        return self.tokenizer(string, add_special_tokens=special).input_ids

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
            prefilled = self._prefill(context, longest)
            for index in group:
                target = torch.tensor(requests[index][2])
                right, logprob = force(self.model, _branch(prefilled), target)
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
            options = normalize_gen_kwargs(options)
            if options.get("do_sample"):
                raise InputError("claa_ops decodes greedily: do_sample must be false, got true")
            longest = options["max_gen_toks"]
            prefilled = self._prefill(self.tok_encode(context), longest)
            answer = decode_until(
                self.model, self.tokenizer, prefilled, longest, options.get("until") or ()
            )
            self.cache_hook.add_partial("generate_until", request.args, answer)
            answers.append(answer)
        return answers

    def _prefill(self, context: Sequence[int], new_tokens: int) -> Prefilled:
        room = max(1, self.max_length - new_tokens)
        ids: Tensor = torch.tensor([list(context)[-room:]], device=self.model.device)
        try:
            return run(self.model, ids, self.method)
        except ValueError as error:  # of the method: its caches hold less than its window, say
            raise InputError(str(error)) from error


def _branch(prefilled: Prefilled) -> Prefilled:
    """The same prefill with a cache of its own, to be continued in one way of several."""
    cache = copy.copy(prefilled.cache)
    cache.layers = [copy.deepcopy(layer) for layer in cache.layers]
    return replace(prefilled, cache=cache)
