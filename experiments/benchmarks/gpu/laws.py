"""The project's laws, as its tests have them, on the device that JAX computes on.

    python -m experiments.benchmarks.gpu.laws --laws=sensitivity,noise_law,noise_tails,private_step --results=DIR

Writes which of them passed, failed or were skipped, with the message of each failure. A law that fails does not end
the program with an error: that is what was asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from dp_rmt.files import write_atomically
from dp_rmt.finetuning import command_line
from dp_rmt.reporting import machine
from experiments.benchmarks.gpu.records import without_folders

ROOT = Path(__file__).parents[3]
_LAWS = flags.DEFINE_list("laws", None, "Names of files tests/laws/test_NAME.py.", required=True)
_CHOSEN = flags.DEFINE_string("chosen", "", "Only the tests that pytest's -k chooses.")
_RESULTS = flags.DEFINE_string("results", None, "Folder of the record.", required=True)


class Outcomes:
    """A plugin of pytest that remembers how each test ended."""

    def __init__(self) -> None:
        self.by_test: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's own outcome, or that of the setup or teardown that kept it from one."""
        if report.when != "call" and report.outcome == "passed":
            return
        message = report.longreprtext.strip().rpartition("\n")[2] if report.outcome != "passed" else None
        self.by_test[report.nodeid] = {
            "outcome": report.outcome,
            "message": without_folders(message) if message else None,
            "seconds": round(report.duration, 2),
        }


def main(argv: list[str]) -> None:
    """Runs the tests in this process, and writes the record."""
    del argv
    outcomes = Outcomes()
    files = [str(ROOT / "tests" / "laws" / f"test_{name}.py") for name in _LAWS.value]
    chosen = ["-k", _CHOSEN.value] if _CHOSEN.value else []
    code = pytest.main(["-n0", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *chosen, *files], [outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not outcomes.by_test:
        raise SystemExit(f"pytest ended with {code!r} and ran {len(outcomes.by_test)} tests")
    ended = [test["outcome"] for test in outcomes.by_test.values()]
    record = {
        "passed": "failed" not in ended,
        "counts": {outcome: ended.count(outcome) for outcome in sorted(set(ended))},
        "machine": machine.description(),
        "tests": outcomes.by_test,
    }
    folder = Path(_RESULTS.value)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "laws.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    command_line.run(main)
