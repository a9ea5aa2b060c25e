"""What the workers of a parallel run share."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one worker makes for all of them, while the others wait."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, begun = base / name, base / f"{name}.begun"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            shutil.rmtree(begun, ignore_errors=True)  # of a worker that failed
            begun.mkdir()
            make(begun)
            begun.rename(folder)
    return folder
