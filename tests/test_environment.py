"""What a program sets before JAX starts, and what a function of the library says to one that has not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dp_rmt import environment
from dp_rmt.training import run_checks

ROOT = Path(environment.__file__).parents[1]
VARIABLES = ("XLA_FLAGS", "OPENBLAS_NUM_THREADS", "TRANSFORMERS_NO_ADVISORY_WARNINGS")
SHOW = f"import os; print(*(os.environ.get(name) for name in {VARIABLES}), sep='|')"


def run(program, **variables):
    """What a new Python without the three variables prints, and its standard error."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    clean |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), **variables}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True, timeout=120
    )
    return finished.stdout.strip(), finished.stderr


def test_prepare_sets_what_is_missing():
    shown, errors = run(f"from dp_rmt import environment; environment.prepare(); {SHOW}")
    assert shown == f"{environment.IN_ORDER}=false|1|1"
    assert errors == ""


def test_prepare_leaves_the_user_alone():
    given = {"XLA_FLAGS": f"--xla_dump_to=x {environment.IN_ORDER}=true", "OPENBLAS_NUM_THREADS": "3"}
    shown, errors = run(f"import numpy; from dp_rmt import environment; environment.prepare(); {SHOW}", **given)
    assert shown == f"{given['XLA_FLAGS']}|3|1"
    assert errors == ""


def test_prepare_adds_to_other_flags():
    program = f"from dp_rmt import environment; environment.prepare(); {SHOW}"
    assert run(program, XLA_FLAGS="--xla_dump_to=x")[0] == f"--xla_dump_to=x {environment.IN_ORDER}=false|1|1"


@pytest.mark.parametrize(("loaded", "late"), [("numpy", "numpy"), ("jax", "numpy and jax")])
def test_prepare_warns_when_it_comes_too_late(loaded, late):
    _, errors = run(f"import {loaded}; from dp_rmt import environment; environment.prepare()")
    assert f"RuntimeWarning: dp_rmt.environment.prepare() was called after {late} had been imported" in errors


def test_the_experiments_are_prepared():
    """Each program is, before any of its own imports: what it imports first is its package."""
    assert run(f"import sys, experiments; assert 'jax' not in sys.modules; {SHOW}")[0].endswith("=false|1|1")


def test_an_unprepared_process_is_told_on_the_cpu(monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    monkeypatch.setenv("XLA_FLAGS", "")
    told = environment.unprepared()
    assert "without OPENBLAS_NUM_THREADS=1 and without XLA_FLAGS=" in told
    assert "environment.prepare()" in told
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert environment.unprepared() is None


def test_a_prepared_process_is_told_nothing():
    assert environment.unprepared() is None  # tests/conftest.py has called prepare()


def test_a_run_passes_it_on(monkeypatch, caplog):
    monkeypatch.setattr(environment, "unprepared", lambda: "Begin with prepare().")
    run_checks.warn_of_unprepared_process()
    assert "Begin with prepare()." in caplog.text
