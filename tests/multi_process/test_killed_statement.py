"""Killed at any moment, a run has stated at least what its metrics and its checkpoint have spent."""

from __future__ import annotations

import json
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy
from dp_rmt.training.ledger import read_ledger
from dp_rmt.training.metrics import read_metrics

pytestmark = pytest.mark.thorough


RUN = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "run_program.py")))
POINTS = 6  # of 12 steps: epsilon, and an announcement, at every second


def last_saved(folder: Path) -> int:
    return max((int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()), default=0)


def assert_true(folder: Path) -> PrivacyStatement:
    """The statement covers the metrics and the checkpoint."""
    statement, ledger = PrivacyStatement.from_json(read_privacy(folder)), read_ledger(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    spent = [line["epsilon"] for line in lines if "epsilon" in line]
    assert statement.epsilon >= max(spent, default=0.0)
    assert statement.num_steps >= max([last_saved(folder), *(line["step"] for line in lines)])
    assert statement.num_steps == (ledger[-1].updates if ledger else 0)
    return statement


@pytest.mark.parametrize("step", [0, 5, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 8, 11))])
def test_killed_before_a_step(cache, tmp_path, step):
    """The process dies when it is about to compute update step + 1, steps in flight before it."""
    ((status, output),) = RUN.finish([RUN.start(cache, tmp_path, signal_at=step, epsilon_points=POINTS)])
    assert status == -signal.SIGKILL, output
    statement = assert_true(tmp_path)
    assert statement.is_upper_bound
    assert statement.num_steps == 2 * (step // 2 + 1)
    page = (tmp_path / "privacy.md").read_text()
    assert f"**This run has done at most {statement.num_steps} updates.**" in page
    ((status, output),) = RUN.finish([RUN.start(cache, tmp_path, epsilon_points=POINTS)])
    assert status == 0, output
    statement = assert_true(tmp_path)
    assert (statement.num_steps, statement.is_upper_bound) == (12, False)
    assert len({entry.run for entry in read_ledger(tmp_path)}) == 1
    assert "After 12 updates this run is" in (tmp_path / "privacy.md").read_text()


def test_stopped_by_sigterm_and_by_until_the_number_is_exact(cache, tmp_path):
    for folder, arguments in (("term", {"signal_at": 4, "signal_name": "SIGTERM"}), ("until", {"until": 5})):
        ((_, output),) = RUN.finish([RUN.start(cache, tmp_path / folder, epsilon_points=POINTS, **arguments)])
        statement = assert_true(tmp_path / folder)
        assert (statement.num_steps, statement.is_upper_bound) == (5, False), output
        assert last_saved(tmp_path / folder) == 5


def test_a_stop_before_the_bound_of_a_killed_process_leaves_that_bound(cache, tmp_path):
    """What the killed process computed beyond the checkpoint remains spent."""
    ((_, output),) = RUN.finish([RUN.start(cache, tmp_path, signal_at=9, epsilon_points=1)])
    assert assert_true(tmp_path).num_steps == 12, output
    ((status, output),) = RUN.finish([RUN.start(cache, tmp_path, until=9, epsilon_points=1)])
    assert status == 0, output
    statement = assert_true(tmp_path)
    assert (statement.num_steps, statement.is_upper_bound) == (12, True)


def test_several_processes_write_one_ledger(cache, tmp_path):
    results = RUN.finish(RUN.start_several(cache, tmp_path, 2, lambda number: {"epsilon_points": 3}))
    assert [status for status, _ in results] == [0, 0], results
    assert [(entry.updates, entry.is_exact) for entry in read_ledger(tmp_path)] == [
        (4, False),
        (8, False),
        (12, False),
        (12, True),
    ]
    record = json.loads((tmp_path / "privacy.json").read_text())
    assert (record["num_steps"], record["is_upper_bound"]) == (12, False)
