"""An infinite or NaN entry keeps no program from ending, and no other matrix from being denoised."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.thorough
def test_matrices_with_an_entry_that_is_not_finite_pass_through_in_time() -> None:
    """Without the check in `short_side_svd` the first of them, of 16 x 16, was still in LAPACK after a minute."""
    program = Path(__file__).parent / "not_finite_program.py"
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "done"
