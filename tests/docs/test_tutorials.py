"""The tutorials run from their first cell to their last, and their figures are what their prose says."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
LIMIT_S = 180  # of processor time


def test_all_tutorials_are_in_the_contents():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert TUTORIALS
    assert [path.stem for path in TUTORIALS if f"\ntutorials/{path.stem}\n" not in index] == []


@pytest.mark.slow  # choosing: 66 s of a core; own_loop: 30 s
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_in_a_fresh_folder_and_process(path, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "JAX_PLATFORMS": "cpu"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ended = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < LIMIT_S
    CHECKS[path.stem](ended.stdout, tmp_path)


def own_loop(printed, folder):
    """Four classes, of which chance finds a quarter; three runs cost more than one."""
    found = [float(share) for share in re.findall(r"accuracy (\S+)%", printed)]
    assert len(found) == 3
    assert min(found) > 60
    one, three = (float(value) for value in re.findall(r"epsilon (\d\S+)$", printed, re.MULTILINE))
    assert one <= 3.0 < 1.2 * 3.0 < three


def choosing(printed, folder):
    """The noise falls with the batch, and a smaller epsilon is found less often."""
    stds = [float(std) for std in re.findall(r"\d+: (0\.\d+)", printed.splitlines()[0])]
    assert stds == sorted(stds, reverse=True)
    assert len(stds) == 4
    found = [float(share) for share in re.findall(r"false alarms: (\S+)%", printed)]
    assert 1 < found[0] < found[1] < found[2] < 100


CHECKS = {"own_loop": own_loop, "choosing": choosing}
