"""Matrices divided among devices are denoised as on one, and none is lost where the devices do not divide them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).parent / "denoise_divided.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, np.ndarray]]:
    """By number of devices."""
    found = {}
    for devices in (1, 4):
        out = tmp_path_factory.mktemp("divided") / f"{devices}.npz"
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-W", "error", str(PROGRAM), str(out)]
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert finished.returncode == 0, finished.stderr
        with np.load(out) as arrays:
            found[devices] = dict(arrays)
        assert found[devices]["num_devices"] == devices
    return found


@pytest.mark.parametrize("kind", ["gram", "subspace", "moment"])
def test_four_devices_give_the_result_of_one(kind: str, results: dict[int, dict[str, np.ndarray]]) -> None:
    names = [name for name in results[1] if name.startswith(f"{kind}/")]
    assert {name.split("/")[1] for name in names} == {"0", "1", "2"}
    assert any("kept_rank" in name and results[1][name].any() for name in names)
    for name in names:
        # The same decompositions of the same matrices; the last bits depend on how many a LAPACK call gets.
        np.testing.assert_allclose(results[4][name], results[1][name], rtol=2e-3, atol=2e-4, err_msg=name)
