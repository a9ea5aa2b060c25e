"""``claa-ops info``: how the ops were built."""

from __future__ import annotations

import json

import torch
import typer
from rich.console import Console
from rich.table import Table

from claa_ops.cli.options import AsJson


def info(as_json: AsJson = False) -> None:
    """Print how the ops were built, and what torch and CUDA they run with."""
    try:
        from claa_ops._C import build_info
    except ModuleNotFoundError:  # the wheel for every Python has no module that is for one of them
        from claa_ops import _build_info

        build_info = {k: v for k, v in vars(_build_info).items() if not k.startswith("_")}

    cuda = torch.cuda.is_available()
    facts = {
        **build_info,
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "CUDA device": torch.cuda.get_device_name() if cuda else "none",
        "CPU threads": str(torch.get_num_threads()),
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)
