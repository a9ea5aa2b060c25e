"""Attach a Hugging Face decoder, for good or for a while, and detach it."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from functools import partial

from claa_ops.huggingface.attention import AttachedAttention
from claa_ops.huggingface.cache import ClaaCache
from claa_ops.huggingface.chat_parts import Protect
from claa_ops.huggingface.hooks import install_hooks, remove_hooks
from claa_ops.huggingface.requirements import layers_and_attentions
from claa_ops.huggingface.self_test import SelfTest
from claa_ops.huggingface.transformers_api import (
    PreTrainedModel,
    attention_name,
    decoder_of,
    set_attention,
    tensor_parallel_group,
    untested,
)
from claa_ops.selection.method import Method
from claa_ops.selection.parallel import reduce_over
from claa_ops.selection.state import check_method

# Attention functions are registered for the whole process, and all threads share a model's hooks.
_LOCK = threading.RLock()


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare a decoder for :class:`ClaaCache`, once; without such a cache it works as before.

    Installs forward pre-hooks and an attention function that calls the model's own, so nothing of
    the model is copied or replaced; ``torch.compile``, ``pickle`` and ``torch.save`` may follow.
    Then a few tiny forwards must show that keeping everything gives the plain model's logits,
    that keeping half shortens the sequence, and that a padded row is then decoded as it is alone.

    Args:
        model: a decoder whose layers take a cache and ``position_embeddings``, with sdpa, eager
            or flash attention, on one device, on several GPUs by layers (``device_map``), or tensor
            parallel in several processes, which all attach it; some layers may be recurrent
            instead.
            ``docs/architectures.md`` lists what was tested.

    Returns:
        The same model.

    Raises:
        TypeError: the model is not of that form.
        ValueError: its attention, the kind of a layer or its device map is not served, or it
            fails the self-test. The model is then as it was before.

    Any number of threads may attach a model. A model whose attention was changed after that is
    attached anew.

    Example::

        model = attach(AutoModelForCausalLM.from_pretrained(name))
        model.generate(ids, past_key_values=ClaaCache(model.config, CLAA(keep=0.1)))
    """
    with _LOCK:
        warning = untested()
        try:
            is_new = _attach(model)
        except (TypeError, ValueError) as error:
            if warning is None:
                raise
            raise type(error)(f"{warning}; {error}") from error
        if warning is not None and is_new:
            warnings.warn(warning, stacklevel=2)
    return model


def _attach(model: PreTrainedModel) -> bool:
    """Attach the model; return whether it was not attached before."""
    decoder = decoder_of(model)
    before: AttachedAttention | None = getattr(decoder, "claa_attached", None)
    configured = attention_name(decoder)
    if before is not None and before.name == configured:
        return False
    layers, attentions = layers_and_attentions(model, decoder)
    attention = AttachedAttention.of(configured, attentions[0])
    attention.base()  # refuses what is not served
    test = SelfTest(model)

    handles = [] if before else install_hooks(model, decoder, layers, attentions)
    try:
        attention.register()
        decoder.claa_attached = attention
        set_attention(decoder, attention.name)
        test.run()
    except Exception as error:
        for handle in handles:
            handle.remove()
        set_attention(decoder, configured)
        if before is None:
            del decoder.claa_attached
        else:
            decoder.claa_attached = before
        name = type(model).__name__
        raise ValueError(f"attach: {name} failed the self-test: {error}") from error
    return True


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take everything off a model that :func:`attach` put on it.

    A cache that was filled before can no longer be decoded from. Other models stay attached, and
    the attention functions stay registered with transformers, where no detached model uses them.

    Args:
        model: any decoder; one that is not attached is left as it is.

    Returns:
        The same model.

    Raises:
        TypeError: this is not a model of transformers.

    Example::

        detach(attach(model))
    """
    with _LOCK:
        decoder = decoder_of(model)
        attention: AttachedAttention | None = getattr(decoder, "claa_attached", None)
        if attention is not None:
            remove_hooks(model)
            if attention_name(decoder) == attention.name:
                set_attention(decoder, attention.base_name)
            del decoder.claa_attached
    return model


@contextlib.contextmanager
def attached(
    model: PreTrainedModel, method: Method, *, protect: Protect | None = None
) -> Iterator[PreTrainedModel]:
    """A context in which the model prefills every prompt with the method; no cache is passed.

    Each ``model.generate``, each call of a pipeline and each forward that brings no cache of its
    own gets a new :class:`ClaaCache`; afterwards the model is as it was before. This holds for all
    threads that use the model, such as the one that streams an answer.

    Args:
        model: a decoder that :func:`attach` serves; if need be it is attached for that time.
        method: one that prefills once and needs no ranking beforehand. For others call
            :func:`claa_ops.prefill.generate`.
        protect: tokens that are never dropped: see :class:`ClaaCache`.

    Raises:
        TypeError: as :func:`attach`, or ``method`` is not a method.
        ValueError: as :func:`attach`, or the method does not fit the model, prefills twice or
            needs a ranking.

    Example::

        with claa_ops.attached(model, CLAA(keep=0.1)):
            model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=64)
    """
    check_method("attached", method, first_pass=False)
    if method.needs_ranking:
        raise ValueError(
            f"attached: the method must rank by its prefill alone, got {type(method).__name__}: "
            "call claa_ops.prefill.generate(model, input_ids, method)"
        )
    new_cache = partial(ClaaCache, model.config, method, protect=protect)
    cache = new_cache()  # refuses what does not fit the model
    cache.reduce = reduce_over(tensor_parallel_group(model))
    cache.new_state(1, None)  # refuses what cannot have its heads on several devices
    was_attached = hasattr(decoder_of(model), "claa_attached")
    before = vars(model).get("claa_new_cache")
    attach(model)
    vars(model)["claa_new_cache"] = new_cache
    try:
        yield model
    finally:
        if before is not None:
            vars(model)["claa_new_cache"] = before
        else:
            del vars(model)["claa_new_cache"]
        if not was_attached:
            detach(model)
