"""What gpu.sh starts, with a stand-in for Python: programs that there are, with flags that they know, from the root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import experiments

ROOT = Path(experiments.__file__).parents[1]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Where each program was started, and its arguments."""
    folder = tmp_path_factory.mktemp("gpu")
    stand_in = folder / "python"
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\0" "$PWD" "$@" >> {folder}/calls\necho >> {folder}/calls\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    script = ROOT / "experiments" / "benchmarks" / "gpu.sh"
    subprocess.run(["bash", str(script)], env=environment, check=True, timeout=60)
    return [line.rstrip("\0").split("\0") for line in (folder / "calls").read_text().split("\0\n") if line]


def test_every_program_starts_at_the_root(calls: list[list[str]]) -> None:
    assert len(calls) == 15
    assert {folder for folder, *_ in calls} == {str(ROOT)}
    assert {module for _, _, module, *_ in calls} == {
        "experiments.benchmarks.step.main",
        "experiments.benchmarks.denoiser",
    }


PARSE = """
import importlib, json, sys
from absl import flags
importlib.import_module(sys.argv[1])
for given in json.load(sys.stdin):
    flags.FLAGS.unparse_flags()  # what other calls gave
    flags.FLAGS([sys.argv[1], *given])
"""


@pytest.mark.thorough
@pytest.mark.parametrize("module", ["experiments.benchmarks.step.main", "experiments.benchmarks.denoiser"])
def test_every_program_knows_its_flags(module: str, calls: list[list[str]]) -> None:
    """One process for each program, which parses the flags of all its calls."""
    given = json.dumps([given for _, _, name, *given in calls if name == module])
    command = [sys.executable, "-c", PARSE, module]
    checked = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True, check=False, timeout=300)
    assert checked.returncode == 0, checked.stderr
