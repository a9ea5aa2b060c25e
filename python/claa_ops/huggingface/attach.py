"""Attach a Hugging Face decoder: permanent hooks that act when a ClaaCache is passed."""

from __future__ import annotations

import threading
import warnings

from claa_ops.huggingface.attention import AttachedAttention
from claa_ops.huggingface.hooks import install_hooks
from claa_ops.huggingface.requirements import layers_and_attentions
from claa_ops.huggingface.self_test import SelfTest
from claa_ops.huggingface.transformers_api import (
    PreTrainedModel,
    attention_name,
    decoder_of,
    set_attention,
    untested,
)

# What transformers calls attention is known to the whole process, and the hooks to all threads.
_LOCK = threading.RLock()


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare a decoder for :class:`ClaaCache`, once; without one it works as before.

    Installs forward pre-hooks and an attention function that calls the model's own, so nothing of
    the model is copied or replaced; ``torch.compile``, ``pickle`` and ``torch.save`` may follow.
    Then a few tiny forwards must show that keeping everything gives the plain model's logits,
    that keeping half shortens the sequence, and that a padded row is then decoded as it is alone.

    Args:
        model: a decoder whose layers take a cache and ``position_embeddings``, with sdpa, eager
            or flash attention, on one device. ``docs/architectures.md`` lists what was tested.

    Returns:
        The same model.

    Raises:
        TypeError: the model is not of that form.
        ValueError: its attention, the kind of a layer or its device map is not served, or it
            fails the self-test. The model is then as it was before.

    Any number of threads may attach a model; whose attention was set to another since is attached
    anew.

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
    """Whether the model was not attached before."""
    decoder = decoder_of(model)
    before: AttachedAttention | None = getattr(decoder, "claa_attached", None)
    configured = attention_name(decoder)
    if before is not None and before.name == configured:
        return False
    layers, attentions = layers_and_attentions(model, decoder)
    attention = AttachedAttention.of(configured, attentions[0])
    attention.base()  # refuses one of another kind
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
