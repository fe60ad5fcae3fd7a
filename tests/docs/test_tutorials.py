"""The tutorials run from their first cell to their last, and their figures are what their prose says."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
LIMIT_S = 180


def test_all_tutorials_are_in_the_contents():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert TUTORIALS
    assert [path.stem for path in TUTORIALS if f"\ntutorials/{path.stem}\n" not in index] == []


@pytest.mark.thorough
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_in_a_fresh_folder_and_process(path, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore:FigureCanvasAgg is non-interactive:UserWarning", str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()


@pytest.mark.thorough
def test_models_of_the_loop_learn(monkeypatch, capsys):
    names = runpy.run_path(str(ROOT / "docs" / "tutorials" / "own_loop.py"))
    found = [names[f"accuracy_{way}"] for way in ("plain", "linen", "nnx")]
    assert min(found) > 0.5  # four classes: chance is a quarter
    assert names["together"] > 1.2 * 3.0
