"""Programs that need a number of virtual devices of their own, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def run_on_devices(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[int, dict[str, np.ndarray]]]:
    """``(program of this folder, *numbers of devices) -> {number: arrays that the program saved}``."""

    def run(program: str, *numbers: int) -> dict[int, dict[str, np.ndarray]]:
        found = {}
        for devices in numbers:
            out = tmp_path_factory.mktemp("devices") / f"{devices}.npz"
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
            environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
            command = [sys.executable, "-W", "error", str(Path(__file__).parent / program), str(out)]
            finished = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=240, check=False
            )
            assert finished.returncode == 0, finished.stderr
            with np.load(out) as arrays:
                found[devices] = dict(arrays)
            assert found[devices]["num_devices"] == devices
        return found

    return run
