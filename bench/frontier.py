"""python -m bench.frontier: claa-ops evaluate in several processes on one device.

The tasks of the suites ruler and beyond are dealt to processes that share the device, since
decoding mostly waits for Python. Then their records are put together, and one more run, which
computes nothing, makes the table and the pictures of all. Whatever follows ``--`` goes to each of
them, such as ``--model DIR --method hops --layer 3 --keep 0.12,0.3 --lengths 4096 --prompts 40``.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from claa_ops.evaluate.tasks.beyond import BEYOND
from claa_ops.evaluate.tasks.ruler import RULER

TASKS = (*RULER, *BEYOND)


def command(tasks: Sequence[str], out: Path, options: Sequence[str]) -> list[str]:
    """One evaluation of these tasks."""
    named = [word for task in tasks for word in ("--task", task)]
    return [sys.executable, "-m", "claa_ops", "evaluate", *named, "--out", str(out), *options]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.frontier", description=__doc__)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    parser.add_argument("--jobs", type=int, default=7, help="processes at once")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("options", nargs="*", help="of claa-ops evaluate, after --")
    arguments = parser.parse_args()

    jobs = min(arguments.jobs, len(arguments.task))
    parts = [arguments.out / f"part-{number}" for number in range(1, jobs + 1)]
    running = []
    for number, part in enumerate(parts):
        part.mkdir(parents=True, exist_ok=True)
        call = command(arguments.task[number::jobs], part, arguments.options)
        with (part / "log.txt").open("w") as log:
            running.append(subprocess.Popen(call, stdout=log, stderr=subprocess.STDOUT))
    failed = [part for part, process in zip(parts, running, strict=True) if process.wait()]
    for part in failed:
        print(f"{part} ended early:\n{(part / 'log.txt').read_text()[-1000:]}", file=sys.stderr)
    found = [(part / "records.jsonl").read_text() for part in parts]
    (arguments.out / "records.jsonl").write_text("".join(found))
    done = subprocess.run(command(arguments.task, arguments.out, arguments.options))
    sys.exit(done.returncode or bool(failed))


if __name__ == "__main__":
    main()
