"""The error of a backward pass through a score."""

from functools import partial
from typing import NoReturn

import torch
from torch import Tensor


def without_gradient(op: str, scores: Tensor) -> Tensor:
    """Mark the result of an op that has no gradient; asking for one raises a RuntimeError.

    A hook does it: an autograd kernel in Python would cost every call more than a small op takes. A
    compiled graph holds no hooks; there PyTorch itself warns that it found no formula.
    """
    if scores.requires_grad and not torch.compiler.is_compiling():
        scores.register_hook(partial(_refuse, op))
    return scores


def _refuse(op: str, gradient: Tensor) -> NoReturn:
    raise RuntimeError(
        f"{op}: must not be differentiated, got a backward pass through its result; detach its "
        "arguments, or train through the plain PyTorch of claa_ops.reference"
    )
