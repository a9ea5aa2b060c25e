"""Prefill and greedy decoding with any method, also with two passes or a draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from claa_ops.huggingface.answer import ModelReader
from claa_ops.huggingface.attach import attach
from claa_ops.huggingface.cache import ClaaCache, hide_before
from claa_ops.huggingface.chat_parts import Protect, protected_of
from claa_ops.huggingface.decoding import count_positions, end_tokens, greedy
from claa_ops.huggingface.hooks import FirstPassDone
from claa_ops.huggingface.prompt import check_prompt, check_room, first_valid
from claa_ops.huggingface.transformers_api import cache_argument, decoder_of
from claa_ops.huggingface.work import count_work
from claa_ops.methods.full import FullKV
from claa_ops.selection.method import Method, Preparation
from claa_ops.selection.state import PrefillState, check_count, check_method
from claa_ops.selection.work import Work


@dataclass
class Prefilled:
    """A prefilled batch of prompts, ready for decoding.

    Attributes:
        logits: ``[B, V]``, of the last token that the model has seen.
        cache: the keys and values.
        next_position: ``[B]``, int64: the position at which decoding continues.
        positions: ``[B, k]``, int64, ascending: the tokens of the (padded) prompt that reached
            the last layer, preceded by -1 where a row has fewer; None if all did.
        attention_mask: ``[B, n]``, of the n tokens that the cache has seen; None without padding.
        work: the multiply-adds of all forwards, including those of drafts, first passes and an
            oracle's answer.
        work_share: those with the weights of the layers, as a share of full prefill's; attention
            is not counted.
        state: the :class:`PrefillState` in which the method selected.
    """

    logits: Tensor
    cache: ClaaCache
    next_position: Tensor
    positions: Tensor | None
    attention_mask: Tensor | None
    work: Work
    work_share: float
    state: PrefillState


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    method: Method,
    attention_mask: Tensor | None = None,
    *,
    protect: Protect | None = None,
    prepared: Preparation | None = None,
    keep_scores: bool = False,
) -> Prefilled:
    """Prefill a batch of prompts with any method.

    Args:
        model: a decoder that :func:`claa_ops.prefill.attach` serves; it is attached if need be.
        input_ids: ``[B, N]``, int64, padded on the left.
        method: which tokens to keep.
        attention_mask: ``[B, N]``, 0 where there is padding.
        protect: tokens that are never dropped: see :class:`ClaaCache`.
        prepared: what ``method.prepare`` returned for this prompt, which methods that differ only
            in budgets and layers can share. Prepared here if not given.
        keep_scores: record the token scores of each ranked layer in ``state.scores``.

    Raises:
        TypeError: the model is not of the form that ``attach`` needs, or ``method`` not a method.
        ValueError: the method does not fit the model or this batch, the padding is not on
            the left, a token is not in the model's vocabulary, or the prompt does not fit into
            its context.

    Example::

        prefilled = prefill(model, input_ids, GemFilter(keep=0.1))
        token = prefilled.logits.argmax(dim=-1)
    """
    prompt = _read(
        model,
        input_ids,
        method,
        attention_mask,
        protect=protect,
        prepared=prepared,
        keep_scores=keep_scores,
    )
    cache = prompt.cache
    output = model(
        input_ids=prompt.input_ids,
        attention_mask=prompt.attention_mask,
        position_ids=prompt.position_ids,
        use_cache=True,
        logits_to_keep=1,
        **cache_argument(model, cache),
    )
    assert cache.state is not None  # the forward made it
    work = prompt.work + count_work(model, cache.seen, within=cache.within, sparse=cache.sparse)
    for layer, lengths in cache.state.ahead:
        work += count_work(model, lengths, logits=0, first=layer)
    full = count_work(model, [input_ids.shape[1]] * len(cache.layers))
    state = prompt.first or cache.state
    return Prefilled(
        logits=output.logits[:, -1],
        cache=cache,
        next_position=prompt.next_position,
        positions=state.positions,
        attention_mask=prompt.attention_mask,
        work=work,
        work_share=work.linear / full.linear,
        state=state,
    )


@dataclass
class _Prompt:
    """The input of the forward that fills the cache: the prompt, or what a first pass chose."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    next_position: Tensor
    cache: ClaaCache
    first: PrefillState | None  # of the first pass, if there was one
    work: Work  # so far


@torch.no_grad()
def _read(
    model: PreTrainedModel,
    input_ids: Tensor,
    method: Method,
    attention_mask: Tensor | None,
    *,
    protect: Protect | None = None,
    prepared: Preparation | None = None,
    keep_scores: bool = False,
) -> _Prompt:
    """Do everything that comes before that forward: checks, a ranking, a first pass."""
    # Before anything slow: what is wrong with the prompt, or does not fit the model.
    check_method("prefill", method, first_pass=True)
    check_prompt("prefill", model, input_ids)
    batch, length = input_ids.shape
    start = first_valid(attention_mask, batch, length)
    attach(model)
    kind = _FirstPassCache if method.two_pass else ClaaCache
    cache: ClaaCache = kind(model.config, method, protect=protect, keep_scores=keep_scores)
    if start is None:
        attention_mask = None
    if prepared is not None and not isinstance(prepared, Preparation):
        raise TypeError(
            f"prefill: prepared must be what method.prepare returned, got {type(prepared).__name__}"
        )
    if prepared is None:
        prepared = method.prepare(ModelReader(model), input_ids, attention_mask)
    cache.ranking, work = (None, Work()) if prepared is None else prepared
    position_ids = count_positions(input_ids, attention_mask)
    next_position = position_ids[:, -1] + 1

    first = None
    if method.two_pass:
        first = _first_pass(model, input_ids, position_ids, attention_mask, start, cache)
        work += count_work(model, cache.seen, logits=0, within=cache.within, sparse=cache.sparse)
        if first.positions is not None:
            chosen = first.positions.clamp_min(0)  # padding is hidden
            input_ids = input_ids.gather(1, chosen)
            if attention_mask is not None and first.start is not None:
                attention_mask = hide_before(attention_mask.gather(1, chosen), first.start)
            if method.keeps_positions:
                position_ids = position_ids.gather(1, chosen)
            else:
                position_ids = count_positions(input_ids, attention_mask)
                next_position = position_ids[:, -1] + 1
        cache = ClaaCache(model.config, FullKV())
    return _Prompt(input_ids, attention_mask, position_ids, next_position, cache, first, work)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prefilled: Prefilled,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
) -> Tensor:
    """The greedy answers to a prefilled batch of prompts, whose cache they fill.

    Args:
        model: the model of the prefill.
        prefilled: what :func:`prefill` returned.
        max_new_tokens: the longest answer, in tokens.
        eos_token_id: the tokens that end an answer; those of the model's generation
            configuration if not given, none if empty.

    Returns:
        ``[B, T]``, int64, T at most ``max_new_tokens``: the new tokens, up to and including the
        one that ends the answer; shorter rows are filled up with that token.

    Raises:
        TypeError: an argument is of another type.
        ValueError: ``max_new_tokens`` is below 1, or more than the model's context has room for,
            or the prefilled batch was decoded before.
    """
    if not isinstance(prefilled, Prefilled):
        raise TypeError(
            f"decode: prefilled must be what prefill returned, got {type(prefilled).__name__}"
        )
    check_count("decode", "max_new_tokens", max_new_tokens)
    state, seen = prefilled.cache.state, prefilled.cache.get_seq_length()
    if state is None or seen != state.prompt_length:
        raise ValueError(
            "decode: prefilled must be decoded once, because its cache takes the answer in, "
            f"got one of which the cache has {seen} tokens: call prefill again"
        )
    check_room("decode", model, int(prefilled.next_position.max()), max_new_tokens)
    tokens = greedy(
        model,
        prefilled.logits,
        prefilled.cache,
        prefilled.next_position,
        prefilled.attention_mask,
        end_tokens(model, eos_token_id),
    )
    return torch.cat(list(islice(tokens, max_new_tokens)), dim=1)


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    method: Method,
    *,
    attention_mask: Tensor | None = None,
    protect: Protect | None = None,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    """Prefill with any method and answer, greedily or with options of ``model.generate``.

    Args:
        model: a decoder that :func:`claa_ops.prefill.attach` serves; it is attached if need be.
        input_ids: ``[B, N]``, int64, padded on the left.
        method: how the prompt is prefilled.
        attention_mask: ``[B, N]``, 0 where there is padding.
        protect: tokens that are never dropped: see :class:`ClaaCache`.
        max_new_tokens: the longest answer, in tokens.
        eos_token_id: the tokens that end an answer; those of the model's generation
            configuration if not given, none if empty.
        options: of ``model.generate``, such as ``do_sample=True, temperature=0.7`` or
            ``streamer=...``. With any of them ``model.generate`` decodes; without, :func:`decode`
            does.

    Returns:
        ``[B, T]``, int64: the new tokens, T at most ``max_new_tokens``.

    Raises:
        TypeError, ValueError: as :func:`prefill` and :func:`decode`, before anything is computed;
            or the options ask for an output other than tokens, or come with a method whose second
            pass keeps original positions, which ``model.generate`` does not continue.

    Example::

        answer = generate(model, input_ids, GemFilter(keep=0.1), max_new_tokens=64)
        drawn = generate(model, input_ids, CLAA(keep=0.1), max_new_tokens=64, do_sample=True)
    """
    check_count("generate", "max_new_tokens", max_new_tokens)
    check_method("generate", method, first_pass=True)
    check_prompt("generate", model, input_ids)
    if not method.two_pass or method.keeps_positions:  # else the answer comes after fewer tokens
        check_room("generate", model, input_ids.shape[1], max_new_tokens)
    if not options:
        prefilled = prefill(model, input_ids, method, attention_mask, protect=protect)
        return decode(model, prefilled, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)
    _check_options(method, options)
    if eos_token_id is not None:
        options["eos_token_id"] = eos_token_id
    prompt = _read(model, input_ids, method, attention_mask, protect=protect)
    output = cast(Any, model).generate(
        input_ids=prompt.input_ids,
        attention_mask=prompt.attention_mask,
        max_new_tokens=max_new_tokens,
        **cache_argument(model, prompt.cache),
        **options,
    )
    return output[:, prompt.input_ids.shape[1] :]


def _check_options(method: Method, options: dict[str, Any]) -> None:
    """Raise ValueError if ``model.generate`` cannot decode with these after this method."""
    if options.get("return_dict_in_generate"):
        raise ValueError(
            "generate: return_dict_in_generate must be left out, because new tokens are returned; "
            "call model.generate(..., past_key_values=ClaaCache(model.config, method)) for more"
        )
    if method.two_pass and method.keeps_positions:
        raise ValueError(
            f"generate: {', '.join(options)} are for methods that do not keep the positions of a "
            f"second pass, got {type(method).__name__}: leave them out to decode greedily"
        )


class _FirstPassCache(ClaaCache):
    first_pass = True

    def __init__(self, config: PreTrainedConfig, method: Method, **options: Any) -> None:
        super().__init__(config, method, **options)
        if method.keeps_positions and "sliding_attention" in self.layer_types:
            raise ValueError(
                f"{type(method).__name__}: a second pass in original positions needs a model "
                "without sliding windows, which go by position"
            )


def _first_pass(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    start: Tensor | None,
    cache: ClaaCache,
) -> PrefillState:
    """Choose the tokens of the second pass, running no more layers than needed; the state."""
    protect = protected_of(cache.protect, input_ids)
    state = cache.new_state(input_ids.shape[1], start, protect)
    chosen = state.choose()
    if chosen is not None or state.method.last_layer(state) is None:
        return state
    try:
        decoder = decoder_of(model)
        decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **cache_argument(decoder, cache),
        )
    except FirstPassDone:
        pass
    assert cache.state is not None  # the forward made it
    if cache.state.positions is None:
        cache.select(len(cache.layers) - 1)
    return cache.state
