"""Whatever ends a run, it goes on from its last checkpoint and ends as if nothing had been: bit for bit.

Three SIGKILLs at random moments; as many as the environment variable DP_RMT_KILLS says, such as 30.
"""

from __future__ import annotations

import os
import random
import runpy
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dp_rmt.training.metrics import read_metrics

pytestmark = pytest.mark.thorough


RUN = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "run_program.py")))
KILLS = int(os.environ.get("DP_RMT_KILLS", "3"))
SECONDS_PER_STEP = 0.05


def lines(folder):
    """The metrics without the seconds, which no two runs share."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder / "metrics.jsonl")]


def assert_bit_for_bit(folder, expected):
    with np.load(folder / "final.npz") as actual, np.load(expected / "final.npz") as reference:
        assert set(actual) == set(reference)
        for path in reference:
            np.testing.assert_array_equal(actual[path], reference[path], err_msg=path)
    assert lines(folder) == lines(expected)


def kill_at_a_random_moment(process, moments):
    """From the first step on; whether it was still running."""
    for line in process.stdout:
        if line.startswith("training from step"):
            break
    time.sleep(moments.uniform(0, 1.5))
    was_running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return was_running


@pytest.mark.slow
def test_killed_at_random_moments(cache, alone, tmp_path):
    """A run that ended before it was killed is compared, and a new one begun."""
    moments, number, kills = random.Random(KILLS), 0, 0
    while kills < KILLS:
        folder = tmp_path / str(number)
        process = RUN.start(cache, folder, seconds_per_step=SECONDS_PER_STEP)
        if kill_at_a_random_moment(process, moments):
            kills += 1
        elif (folder / "final.npz").exists():
            assert_bit_for_bit(folder, alone)
            number += 1
    ((status, output),) = RUN.finish([RUN.start(cache, folder)])
    assert status == 0, output
    assert_bit_for_bit(folder, alone)


@pytest.fixture
def small_disk(tmp_path):
    """Eight megabytes, a file system of their own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "dp_rmt_test", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk(cache, alone, small_disk):
    """The third checkpoint of 3 MB does not fit beside two. With more room, the run goes on."""
    ((status, output),) = RUN.finish([RUN.start(cache, small_disk, ballast=800_000)])
    assert status == 1
    assert "the checkpoint of step 6 could not be written" in output
    assert "the last good one is step 4. Free space" in output
    assert {path.name for path in (small_disk / "checkpoints").iterdir()} == {"2", "4"}
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    ((status, output),) = RUN.finish([RUN.start(cache, small_disk, ballast=800_000)])
    assert status == 0, output
    assert "training from step 4" in output
    assert_bit_for_bit(small_disk, alone)
