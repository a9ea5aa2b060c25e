"""python -m bench: every op against eager PyTorch, torch's own kernels and the machine's roofs.

All numbers are measured: no line is taken from elsewhere. Caches are cold before each call.
"""

import argparse
from pathlib import Path

import torch

from bench import busy, cpu, cuda, record
from bench.cases import OPS
from bench.machine import machine, short_name

RESULTS = Path(__file__).parent / "results"


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--op", choices=OPS, help="only this op")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--busy", action="store_true", help="instead: score_tokens beside busy processes"
    )
    parser.add_argument("--quick", action="store_true", help="the fewest tokens, few calls")
    parser.add_argument("--commit", help="the commit, for sources that are not a git checkout")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file; bench/results/cpu.json, h100.json or busy.json for a full run",
    )
    arguments = parser.parse_args()
    if arguments.busy and (arguments.op or arguments.device != "cpu"):
        parser.error("--busy times score_tokens on the CPU: it takes neither --op nor --device")
    return arguments


def main() -> None:
    arguments = parsed_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    about = machine(arguments.device, arguments.commit)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if arguments.busy:
        name, report = "busy", busy.report(arguments.quick)
    else:
        ops = [arguments.op] if arguments.op else list(OPS)
        name = short_name(arguments.device)
        report = {"cpu": cpu.report, "cuda": cuda.report}[arguments.device](ops, arguments.quick)

    full = not arguments.quick and arguments.op is None
    out = arguments.out or (RESULTS / f"{name}.json" if full else None)
    if out is not None:
        record.write(out, {"machine": about} | report)


if __name__ == "__main__":
    main()
