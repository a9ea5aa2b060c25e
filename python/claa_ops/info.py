"""How the ops were built, and what they run with."""

from __future__ import annotations

import contextlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from claa_ops._build_info import version

# Those whose versions decide what the adapter and the commands do.
_PACKAGES = (
    "transformers",
    "tokenizers",
    "huggingface-hub",
    "accelerate",
    "safetensors",
    "gguf",
    "lm-eval",
)


def facts() -> dict[str, str]:
    """Return the facts of the build, then the versions of what is installed and used."""
    try:
        from claa_ops._C import build_info
    except ModuleNotFoundError:  # the wheel for every Python has no module that is for one of them
        from claa_ops import _build_info

        build_info = {k: v for k, v in vars(_build_info).items() if not k.startswith("_")}

    cuda = torch.cuda.is_available()
    return {
        **build_info,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "CUDA device": torch.cuda.get_device_name() if cuda else "none",
        "CPU threads": str(torch.get_num_threads()),
        **{name: _version(name) for name in _PACKAGES},
    }


def versions() -> dict[str, str]:
    """The versions that a measurement depends on."""
    return {
        "claa_ops": version,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "python": platform.python_version(),
    }


def machine(device: torch.device | str) -> dict[str, Any]:
    """What a measurement on this device was made on: the device, its name, torch's CPU threads."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The CPU's name, where the system tells it; else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_version() -> None:
    """Print the version of claa_ops."""
    print(f"claa-ops {version}", flush=True)


def print_facts(as_json: bool = False) -> None:
    """Print the facts, one a line or as one JSON object."""
    found = facts()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
