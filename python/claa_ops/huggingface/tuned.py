"""The setting that ``claa-ops tune`` found for a model, kept where it is found again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from claa_ops.huggingface.models import InputError, cache_folder
from claa_ops.methods import Method, make_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES = 64  # of each tensor, evenly spread
# What of a configuration says where a model came from or how it is stored, not what it computes.
_ORIGIN = {"_name_or_path", "architectures", "dtype", "transformers_version"}


@dataclass(frozen=True)
class Tuned:
    """A saved setting.

    Attributes:
        method: the method, with all of its settings.
        sentence: what was found about it.
        facts: all that was saved: the table that justifies it, prompts, seed and versions.
        file: where it is kept.
    """

    method: Method
    sentence: str
    facts: dict[str, Any]
    file: Path


def tuned_method(model: PreTrainedModel) -> Method:
    """The method that ``claa-ops tune`` found for this model, with layer and budget.

    Args:
        model: the model, loaded from wherever, in float32 or bfloat16. It is known by its
            configuration and by samples of its weights: another model, also a fine-tuned one, has
            a setting of its own or none.

    Raises:
        LookupError: none was saved for this model.
        ValueError: the saved one cannot be read, or is of another version of this package.

    Example::

        with claa_ops.attached(model, tuned_method(model)):
            model.generate(ids, max_new_tokens=16)
    """
    tuned = find_tuned(model)
    if tuned is None:
        raise LookupError(
            f"nothing is saved for this model in {tuned_folder()}: `claa-ops tune MODEL` finds a "
            "method for it, and saves it"
        )
    return tuned.method


def find_tuned(model: PreTrainedModel) -> Tuned | None:
    """What was saved for this model, if anything was; InputError if it cannot be used."""
    file = tuned_folder() / f"{model_identity(model)}.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        method = make_method(
            facts["method"],
            num_layers=model.config.get_text_config().num_hidden_layers,
            **facts["settings"],
        )
        return Tuned(method, facts["sentence"], facts, file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot use {file}, which `claa-ops tune` saved ({error}): run it again, or remove "
            "the file"
        ) from error


def save_tuned(model: PreTrainedModel, facts: dict[str, Any]) -> Path:
    """Save a setting for a model, in the place of an older one.

    Args:
        model: the model.
        facts: ``method``, a name; ``settings`` of it; ``sentence``; and whatever justifies it.

    Raises:
        InputError: the file cannot be written.
    """
    file = tuned_folder() / f"{model_identity(model)}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole: whoever reads finds the old one or the new one.
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, prefix=".saving-", delete=False
        ) as aside:
            try:
                json.dump(facts, aside, indent=1)
                aside.close()
                os.replace(aside.name, file)
            except BaseException:
                Path(aside.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise InputError(
            f"cannot save into {file.parent}: {error.strerror} (CLAA_OPS_CACHE names another "
            "folder)"
        ) from error
    return file


def tuned_folder() -> Path:
    """Where settings are saved: ``tuned`` in :func:`cache_folder`."""
    return cache_folder() / "tuned"


def model_identity(model: PreTrainedModel) -> str:
    """What a model is known by, in 16 digits: a copy of it, in another dtype too, has the same.

    It is made of the configuration, of the names and shapes of all tensors, and of samples of
    each, rounded to bfloat16.
    """
    settings = model.config.get_text_config().to_dict()
    kept = {name: value for name, value in settings.items() if name not in _ORIGIN}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(_samples(weight))
    return digest.hexdigest()[:16]


@torch.no_grad()
def _samples(weight: Tensor) -> bytes:
    if weight.is_meta or not weight.numel():  # of a model that is not wholly in memory
        return b""
    if isinstance(weight, DTensor):  # other processes, which ask too, have other parts of it
        weight = weight.full_tensor()
    step = -(-weight.numel() // _SAMPLES)
    few = weight.reshape(-1)[::step].to(torch.bfloat16)
    return few.view(torch.int16).cpu().numpy().tobytes()
