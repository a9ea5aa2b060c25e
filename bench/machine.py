"""What a number belongs to."""

import datetime
import os
import subprocess
from pathlib import Path

import torch

from claa_ops import info

FOLDER = Path(__file__).parent


def machine(device: str, commit: str | None = None) -> dict:
    """What a number belongs to: hardware, software, commit, day."""
    known = info.machine(device)
    if device == "cuda":
        hardware = {
            "device": known["name"],
            "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    else:
        hardware = {
            "device": known["name"],
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": known["threads"],
            "load_average": os.getloadavg()[0],  # above 0.5 before the first call: others ran too
        }
    described = ("git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--abbrev=12")
    versions = info.versions()
    return hardware | {
        "torch": versions["torch"],
        "claa_ops": versions["claa_ops"],
        "commit": commit or _output(*described),
        "date": datetime.date.today().isoformat(),
    }


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def short_name(device: str) -> str:
    """How a file of results is called: h100 for an NVIDIA H100 80GB HBM3."""
    return torch.cuda.get_device_name().split()[1].lower() if device == "cuda" else device
