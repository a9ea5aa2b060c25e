"""What a result depends on: the model as it is in memory, the method, and the software."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claa_ops.evaluate.spec import plain_settings
from claa_ops.huggingface.decoding import end_tokens
from claa_ops.huggingface.transformers_api import attention_name
from claa_ops.info import versions
from claa_ops.methods import Method

_SAMPLES = 2048  # bytes of each tensor, evenly spread, beside the sum of all
# What of a configuration says where a model came from, and not what it computes.
_ORIGIN = {"_name_or_path", "transformers_version", "architectures"}


def model_key(model: PreTrainedModel) -> dict[str, Any]:
    """All of the model that its answers depend on, by content: a copy of it has the same key.

    Beside weights and settings that is the kind of device, and the versions of this package, of
    torch and of transformers, since a greedy answer can turn on the last bit of a logit.
    """
    installed = versions()
    return {
        "weights": weights_digest(model),
        "config": _digest(_config(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": attention_name(model).removeprefix("claa_"),
        "ends": sorted(end_tokens(model)),
        "device": model.device.type,
        "versions": [installed[name] for name in ("claa_ops", "torch", "transformers")],
    }


def method_key(method: Method) -> dict[str, Any]:
    """All of a method that its answers depend on: a draft by its content, not by its name."""
    kind = type(method)
    key: dict[str, Any] = {"method": kind.__name__, "settings": plain_settings(method)}
    if not kind.__module__.startswith("claa_ops."):  # a user's own, which may change
        with contextlib.suppress(OSError):
            source = inspect.getsource(inspect.getmodule(kind) or kind)
            key |= {"module": kind.__module__, "source": _digest(source)}
    draft = getattr(method, "draft", None)
    return key if draft is None else {**key, "draft": model_key(draft)}


def decoder_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what makes text of tokens, on which a decoded answer depends, and its end."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        parts = {"class": type(tokenizer).__name__, "model": tokenizer.get_vocab()}
    else:
        whole = json.loads(backend.to_str())
        parts = {name: whole[name] for name in ("model", "added_tokens", "decoder")}
    cleans = getattr(tokenizer, "clean_up_tokenization_spaces", None)
    return _digest({**parts, "cleans": cleans, "special": tokenizer.all_special_tokens})


def weights_digest(model: PreTrainedModel) -> str:
    """A digest of every parameter and buffer: the sum of all its bits, and some of its bytes.

    It reads the weights once, as fast as memory gives them, and is the same whatever files they
    came from. A change of a single element changes it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content = _bytes(tensor)
        whole = len(content) // 8 * 8
        total = content[:whole].view(torch.int64).sum() + content[whole:].sum()
        places = torch.linspace(0, max(0, len(content) - 1), _SAMPLES, dtype=torch.float64)
        samples = content[places.long().to(content.device)] if len(content) else content
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(total)}".encode())
        digest.update(samples.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> Tensor:
    """The content of a tensor, ``[n]``, uint8, from an address that 8 divides."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return content.clone() if content.storage_offset() % 8 else content


def ids_digest(ids: Tensor) -> str:
    """A digest of token ids."""
    return hashlib.sha256(ids.cpu().to(torch.int64).numpy().tobytes()).hexdigest()[:16]


def _config(model: PreTrainedModel) -> dict[str, Any]:
    settings = model.config.to_dict()
    return {name: value for name, value in settings.items() if name not in _ORIGIN}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
