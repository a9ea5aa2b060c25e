"""vLLM for a GPU machine that has CUDA but no network, in parts that are easily carried.

On a machine with a network::

    python -m bench.vllm_site build/vllm-site           # downloads 1.4 GB, leaves 22 parts of 45 MB
    python -m bench.vllm_site build/vllm-site --oldest  # for the torch there: 350 MB, 3 parts

On the other one, with all parts in a folder::

    cat PARTS/site.tgz.* | tar xzf - -C SITE && export PYTHONPATH=SITE
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

LOCKS = Path(__file__).parents[1] / "locks"
GLIBCS = range(5, 40)  # pip wants each by name

# Kernels for other GPUs and other models, the same program in Rust, sources, vocabularies, tests.
UNNEEDED = [
    "bin",
    "mistral_common/data/*.json",
    "pycountry/locales",
    "pycountry/tests",
    "torch/bin/protoc*",
    "torch/include",
    "torch/share",
    "triton/_C/libproton.so",
    "triton/backends/nvidia/bin/ptxas-blackwell",
    "triton/backends/nvidia/lib/cupti*",
    "triton/instrumentation",
    "vllm/_flashkda_C.abi3.so",
    "vllm/_moe_C_stable_libtorch.abi3.so",
    "vllm/_qutlass_C.abi3.so",
    "vllm/third_party/deep_gemm",
    "vllm/third_party/fmha_sm100",
    "vllm/vllm-rs",
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
    "xgrammar/lib/*.a",
]


def install(site: Path, pins: Path, python: str) -> None:
    """Put the pinned packages into a folder, as that Python would find them."""
    platforms = [f"--platform=manylinux_2_{glibc}_x86_64" for glibc in GLIBCS]
    old = ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    command += [*platforms, *old, "--target", str(site), "-r", str(pins)]
    subprocess.run(command, check=True)


def prune(site: Path, keep: list[str]) -> None:
    """Remove what is not needed, and the symbols of the large libraries."""
    for pattern in UNNEEDED:
        for path in site.glob(pattern) if pattern not in keep else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    libraries = [path for path in site.rglob("*.so*") if path.stat().st_size > 20_000_000]
    subprocess.run(["strip", "--strip-unneeded", *map(str, libraries)], check=True)


def split(archive: Path, size: int) -> Iterator[Path]:
    """Cut a file into parts of this many bytes, whose names ascend."""
    with archive.open("rb") as whole:
        for number in range(100):
            part = archive.with_name(f"{archive.name}.{number:02}")
            data = whole.read(size)
            if not data:
                return
            part.write_bytes(data)
            yield part


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="Where the parts go.")
    parser.add_argument("--oldest", action="store_true", help="The oldest vLLM, without torch.")
    parser.add_argument("--python", default="3.12", help="The version of the other machine.")
    parser.add_argument("--part", type=int, default=45, help="MB in a part.")
    parser.add_argument("--keep", nargs="*", default=[], help=f"Of {', '.join(UNNEEDED)}.")
    options = parser.parse_args()
    site, archive = options.folder / "site", options.folder / "site.tgz"
    install(site, LOCKS / f"vllm-gpu{'-oldest' * options.oldest}.txt", options.python)
    prune(site, options.keep)
    with tarfile.open(archive, "w:gz", compresslevel=6) as made:
        made.add(site, arcname=".")
    parts = list(split(archive, options.part * 1_000_000))
    archive.unlink()
    print(f"{len(parts)} parts, {sum(part.stat().st_size for part in parts) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
