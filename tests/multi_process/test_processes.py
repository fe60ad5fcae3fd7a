"""Several processes make the run of one: the same samples, noise and parameters, and one end for all of them.

Parameters are divided over the processes, so that none has them whole, unless a test says otherwise. Results differ by
the order of float32 sums over the examples; Adam with eps = 1e-3 passes on less than 1e-5 of the parameters (see
tests/multi_device).
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dp_rmt.training import processes
from dp_rmt.training.metrics import read_metrics
from dp_rmt.training.preemption import EXIT_CODE

pytestmark = pytest.mark.thorough


RUN = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "run_program.py")))
RTOL, ATOL = 1e-4, 1e-5


def assert_same_run(folder, expected):
    with np.load(folder / "final.npz") as actual, np.load(expected / "final.npz") as reference:
        assert set(actual) == set(reference)
        for path in reference:
            np.testing.assert_allclose(actual[path], reference[path], rtol=RTOL, atol=ATOL, err_msg=path)
    lines, others = (read_metrics(each / "metrics.jsonl") for each in (folder, expected))
    assert [(line["step"], *line) for line in lines] == [(line["step"], *line) for line in others]
    for line, other in zip(lines, others, strict=True):
        for name in ("nonprivate/batch_size", "nonprivate/loss", "eval/dev/loss"):
            assert line.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-4)


def rows(folder, count):
    """What each process read for the first step."""
    return [set(json.loads((folder / f"rows{number}.json").read_text())) for number in range(count)]


@pytest.mark.slow
def test_two_processes_stop_together_and_four_go_on(cache, alone, tmp_path):
    """SIGTERM reaches one; both save the same step and exit. The run is continued by other numbers of processes."""

    def signalled(number):
        return {"seconds_per_step": 0.2, **({"signal_at": 2, "signal_name": "SIGTERM"} if number else {})}

    results = RUN.finish(RUN.start_several(cache, tmp_path, 2, signalled))
    for status, output in results:
        assert status == EXIT_CODE, output
        assert "stopped by SIGTERM after step" in output
    ours = rows(tmp_path, 2)
    assert ours[0] | ours[1] == rows(alone, 1)[0]
    assert not ours[0] & ours[1]
    assert all(ours)
    for status, output in RUN.finish(RUN.start_several(cache, tmp_path, 4)):
        assert status == 0, output
        assert "training from step 0" not in output
    ours = rows(tmp_path, 4)
    assert set.union(*ours) == rows(alone, 1)[0]
    assert sum(map(len, ours)) == len(rows(alone, 1)[0])
    extra = {"step", "eval/dev/accuracy", "eval/dev/loss"}
    assert not any(line.keys() <= extra and line["step"] % 4 for line in read_metrics(tmp_path / "metrics.jsonl"))
    assert_same_run(tmp_path, alone)


def test_one_that_dies_ends_the_other(cache, tmp_path):
    """With a message, and the checkpoint as it was."""
    results = RUN.finish(RUN.start_several(cache, tmp_path, 2, lambda number: {"signal_at": 5} if number else {}))
    (status, output), (killed, _) = results
    assert killed == -9
    assert status not in (0, None), output
    assert "process 0 of 2 ends, and with it the others" in output or "distributed service" in output
    assert (tmp_path / "checkpoints" / "2" / "sha256.json").exists()
    assert not (tmp_path / "final.npz").exists()


@pytest.mark.slow
def test_the_first_that_dies_ends_the_other(cache, tmp_path):
    """The coordinator of all."""
    results = RUN.finish(RUN.start_several(cache, tmp_path, 2, lambda number: {} if number else {"signal_at": 5}))
    (killed, _), (status, output) = results
    assert killed == -9
    assert status not in (0, None), output
    assert "process 1 of 2 ends, and with it the others" in output or "distributed service" in output


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_killed(cache, alone, tmp_path):
    for status, _ in RUN.finish(RUN.start_several(cache, tmp_path, 2, lambda number: {"signal_at": 7})):
        assert status in (-9, 1)
    ((status, output),) = RUN.finish([RUN.start(cache, tmp_path)])
    assert status == 0, output
    assert "training from step 4" in output or "training from step 6" in output
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("divided", ["data", "fsdp", "tensor"])
@pytest.mark.parametrize("count", [2, 4])
def test_any_division_among_processes_gives_the_run_of_one(count, divided, cache, alone, tmp_path):
    for status, output in RUN.finish(RUN.start_several(cache, tmp_path, count, lambda number: {"divided": divided})):
        assert status == 0, output
    assert_same_run(tmp_path, alone)


def test_one_process_needs_no_others():
    assert processes.is_first()
    assert processes.of_first(2**127 + 5) == 2**127 + 5
    processes.wait_for_all("nothing")
    with processes.first_alone("nothing"):
        pass
    tree = {"x": np.ones(3)}
    assert processes.to_host(tree)["x"] is tree["x"]
    processes.initialize()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, None), "need --coordinator_address"),
        ((None, None, 0), "need --coordinator_address"),
        (("localhost:1", None, None), "needs --num_processes and --process_id"),
        (("localhost:1", 2, None), "needs --process_id"),
    ],
)
def test_flags_that_do_not_belong_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.initialize(*arguments)


def test_an_error_of_one_process_is_left_alone():
    with pytest.raises(KeyError), processes.ending_together():
        raise KeyError
