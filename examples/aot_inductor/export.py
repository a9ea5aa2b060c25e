"""Ops in a program without Python: ``torch.export``, AOTInductor, and C++ that runs the package.

This file writes what the C++ program beside it needs: ``selection.pt2``, the compiled program,
``inputs.pt`` and ``expected.pt``, tensors to compare with, and ``library.txt``, where the shared
library is that registers ``torch.ops.claa``. The program serves every length of prompt.

    pip install claa-ops
    python examples/aot_inductor/export.py FOLDER
    cmake -S examples/aot_inductor -B FOLDER/build -DPython_EXECUTABLE="$(which python)"
    cmake --build FOLDER/build
    FOLDER/build/select FOLDER
"""

import argparse
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

import claa_ops  # registers torch.ops.claa

WINDOW = 8


class Selection(nn.Module):
    """After a selection layer: the tenth of the hidden states, keys and values that is kept."""

    def forward(
        self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states ``[B, k, C]``, keys and values ``[B, G, k, D]``, positions ``[B, k]``."""
        scores = claa_ops.score_tokens(query[:, :, -WINDOW:], key)
        kept = key.shape[2] // 10 + WINDOW
        onward = claa_ops.select_topk(scores.amax(dim=1), kept, window=WINDOW)
        cached = claa_ops.select_topk(scores, kept, window=WINDOW)
        return (
            claa_ops.gather_tokens(hidden, onward),
            *claa_ops.gather_kv(key, value, cached),
            onward,
        )


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and one layer's queries, keys and values of a prompt."""
    query, key, value = (torch.randn(1, heads, length, 64) for heads in (8, 2, 2))
    return torch.randn(1, length, 512), query, key, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = Selection()
    length = torch.export.Dim("length", min=64, max=2**20)
    shapes = ({1: length}, {2: length}, {2: length}, {2: length})
    program = torch.export.export(model, inputs(500), dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "selection.pt2"))

    given = inputs(3000)  # another length than that of the export
    torch.save(list(given), folder / "inputs.pt")
    torch.save(list(model(*given)), folder / "expected.pt")
    library = resources.files("claa_ops") / "lib" / "libclaa_ops.so"
    (folder / "library.txt").write_text(str(library))
    print(f"written to {folder}: selection.pt2, inputs.pt, expected.pt, library.txt")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
