"""The OpenAI server, in processes of its own, started as a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def server(
    model: str,
    log: Path,
    *arguments: str,
    vllm: tuple[str, ...] = (),
    variables: dict[str, str] | None = None,
    wait: float = 600,
) -> Iterator[str]:
    """Start ``claa-ops serve``, wait until it answers, give its address, and end it.

    Args:
        model: a folder.
        log: where it writes what it says.
        arguments: of ``claa-ops serve``.
        vllm: what follows ``--``.
        variables: more of its environment.
        wait: seconds for the start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command = [sys.executable, "-m", "claa_ops", "serve", model, *arguments, "--", *own, *vllm]
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "HF_HUB_OFFLINE": "1",
        **(variables or {}),
    }
    with log.open("w") as output:
        started = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(started, address, log, wait)
        yield address
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)


def _wait(started: subprocess.Popen[bytes], address: str, log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if started.poll() is not None:
            raise RuntimeError(f"the server ended with {started.returncode}:\n{log.read_text()}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(1)
    raise TimeoutError(f"the server does not answer after {seconds} s:\n{log.read_text()}")
