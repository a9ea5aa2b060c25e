"""What a number belongs to."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import claa_ops

FOLDER = Path(__file__).parent


def machine(device: str, commit: str | None = None) -> dict:
    """What a number belongs to: hardware, software, commit, day."""
    if device == "cuda":
        hardware = {
            "device": torch.cuda.get_device_name(),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        hardware = {
            "device": names[0] if names else platform.processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],  # above 0.5 before the first call: others ran too
        }
    described = ("git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--abbrev=12")
    return hardware | {
        "torch": torch.__version__,
        "claa_ops": claa_ops.__version__,
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
