"""Loads the shared libraries, which register ``torch.ops.claa.*``."""

from importlib import resources
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch

from claa_ops import ops

_MINIMUM_TORCH = (2, 11)  # what the libraries are built for; see cmake/FindTorchHeaders.cmake


def _find(name: str) -> Path | None:
    # importlib.resources finds the file in a wheel and in an editable install.
    with resources.as_file(resources.files("claa_ops").joinpath("lib", name)) as path:
        return path if path.exists() else None


def _load() -> bool:
    """Load the libraries and return whether there are CUDA kernels."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _MINIMUM_TORCH:
        raise ImportError(f"claa_ops needs torch >= 2.11, got {torch.__version__}")
    cpu = _find("libclaa_ops.so")
    if cpu is None:
        raise ImportError("claa_ops: lib/libclaa_ops.so is missing from the installation")
    torch.ops.load_library(cpu)
    cuda = _find("libclaa_ops_cuda.so")
    if cuda is None or torch.version.cuda is None:
        return False
    torch.ops.load_library(cuda)
    return True


def _refuse_cuda(library: torch.library.Library, op: str) -> None:
    """Refuse CUDA tensors in one sentence, where the dispatcher would print a page."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"{op}: this build of claa_ops has no CUDA kernel for it; expected tensors on the "
            f"cpu, got {args[0].device}"
        )

    library.impl(op, refuse, "CUDA")


if not _load():
    _cuda = torch.library.Library("claa", "IMPL")
    for _module in iter_modules(ops.__path__):
        if not _module.name.startswith("_"):
            _refuse_cuda(_cuda, _module.name)
