"""Starts `train_program.py`: how often, and where, the tests say."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "train_program.py"
TIMEOUT = 300


def start(cache: Path, folder: Path, **arguments) -> subprocess.Popen:
    """One process; what it compiles is kept in `cache` for the next."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    environment = {**os.environ, **kept, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", str(PROGRAM), json.dumps({"folder": str(folder), **arguments})]
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def start_several(cache: Path, folder: Path, count: int, of_process=lambda number: {}) -> list[subprocess.Popen]:
    """Processes of one run, with arguments of their own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"coordinator": f"localhost:{port}", "num_processes": count}
    return [start(cache, folder, **shared, process_id=number, **of_process(number)) for number in range(count)]


def finish(started: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit status and output of each; none may hang."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]
