"""How the GPU's jobs are run: in turns, for a limited time, with a file for each part, and on from where it stopped."""

from __future__ import annotations

import doctest
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks.gpu import records as gpu_records
from experiments.benchmarks.gpu import runner
from experiments.benchmarks.gpu.jobs import PARTS, RECORDS, WORK, Job, Places, all_jobs
from experiments.benchmarks.gpu.records import PartRecords

DEVICE = {"machine": {"device_kind": "stand-in"}, "versions": {}}


@pytest.fixture(autouse=True)
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The handlers of the test's own process come back; stopping takes no long."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(runner, "STOPPING", 6.0)
    monkeypatch.setattr(runner, "WORTH_STARTING", 0.0)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def writes(name: str, file: str = "one.json", value: Any = 1) -> Job:
    """A job that writes one record."""
    code = f"import json, sys; json.dump({value!r}, open(sys.argv[1] + '/{file}', 'w'))"
    return Job(name, (("-c", code, RECORDS),))


def run(jobs: list[Job], folder: Path, *, seconds: float = 60, again: bool = False, clock: Any = None) -> PartRecords:
    records = PartRecords(folder / "results", DEVICE)
    with runner.locked(folder / "work" / "lock") as lock:
        clock = clock or runner.Clock(seconds + runner.STOPPING)
        runner.run_all(jobs, records, clock, folder / "work", os.environ, lock, again=again)
    return records


def part(folder: Path, letter: str) -> dict[str, Any]:
    return json.loads((folder / "results" / f"{letter}_{PARTS[letter]}.json").read_text())


def test_each_part_has_a_file_with_the_device_and_all_records(tmp_path: Path) -> None:
    run([writes("a/x"), writes("b/y", "two.json", {"z": 2})], tmp_path)
    assert part(tmp_path, "a")["jobs"]["a/x"]["records"] == {"one.json": 1}
    written = part(tmp_path, "b")
    assert written["machine"]["device_kind"] == "stand-in"
    assert written["jobs"]["b/y"]["status"] == "done"
    assert written["jobs"]["b/y"]["records"] == {"two.json": {"z": 2}}
    assert written["jobs"]["b/y"]["cpu_seconds"] > 0


def test_what_has_ended_is_not_run_again(tmp_path: Path) -> None:
    counts = Job("a/x", (("-c", "import sys; open(sys.argv[1] + '/calls', 'a').write('.')", WORK),))
    for _ in range(2):
        run([counts], tmp_path)
    assert (tmp_path / "work" / "a" / "x" / "work" / "calls").read_text() == "."


def test_a_job_that_fails_keeps_none_of_the_others_from_running(tmp_path: Path) -> None:
    code = "raise SystemExit('no file /home/ada/data/train.tsv')"
    fails = Job("a/x", (("-c", code), ("-c", "open('/nowhere')")))
    records = run([fails, writes("b/y")], tmp_path)
    assert records.job("a/x")["status"] == "failed"
    assert records.job("a/x")["reason"] == "exit status 1: no file train.tsv"
    assert records.job("b/y")["status"] == "done"
    assert records.job("a/x")["calls"] == 1
    assert run([fails], tmp_path).job("a/x")["calls"] == 1
    assert run([fails], tmp_path, again=True).job("a/x")["calls"] == 2


def test_what_is_missing_is_said_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [
        Job("a/x", (("-c", "1"),), packages=("json", "no_such_peer")),
        Job("b/y", (("-c", "1"),), needs=(tmp_path / "models" / "minilm",)),
    ]
    records = run(jobs, tmp_path)
    assert [records.job(job.name)["status"] for job in jobs] == ["skipped", "skipped"]
    said = capsys.readouterr().out
    assert "a/x: skipped, no_such_peer not installed" in said
    assert "b/y: skipped, no folder models/minilm" in said


SAVES = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
begun = len(list(folder.glob("*.json")))
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
for step in range(begun, 3):
    (folder / f"{step}.json").write_text(json.dumps(begun))
    while begun == 0 and not stopped:
        time.sleep(0.01)
    if stopped:
        sys.exit(143)
"""
"""Its first run stops at SIGTERM, with a record saved; its second ends the work. A record says how many there were."""


def test_a_study_that_is_cut_off_goes_on_from_its_records(tmp_path: Path) -> None:
    job = Job("d/study", (("-c", SAVES, RECORDS),), goes_on=True)
    assert run([job, writes("e/x")], tmp_path, seconds=1.5).job("d/study")["status"] == "cut"
    assert part(tmp_path, "d")["jobs"]["d/study"]["records"] == {"0.json": 0}
    assert not (tmp_path / "results" / "e_decoder.json").exists()  # no time was left for it
    # Another machine, which has the results alone.
    (tmp_path / "work").rename(tmp_path / "forgotten")
    records = run([job, writes("e/x")], tmp_path)
    assert records.job("d/study")["status"] == "done"
    assert records.job("d/study")["records"] == {"0.json": 0, "1.json": 1, "2.json": 1}
    assert records.job("d/study")["calls"] == 2
    assert records.job("e/x")["status"] == "done"


SLEEPS = Job("b/sleeps", (("-c", "import time; time.sleep(60)"),))


def test_a_whole_call_that_was_not_enough_is_not_given_twice(tmp_path: Path) -> None:
    assert run([SLEEPS], tmp_path, seconds=1).job("b/sleeps")["status"] == "too long"
    # After another job it may have had too little time.
    assert run([writes("a/x"), SLEEPS], tmp_path / "other", seconds=2).job("b/sleeps")["status"] == "cut"


def test_a_signal_stops_the_job_and_saves_the_file(tmp_path: Path) -> None:
    clock = runner.Clock(60)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    start = time.monotonic()
    records = run([SLEEPS, writes("b/y")], tmp_path, clock=clock)
    assert time.monotonic() - start < 20
    assert records.job("b/sleeps")["status"] == "cut"  # and not too long: it was not given a whole call
    assert part(tmp_path, "b")["jobs"]["b/sleeps"]["status"] == "cut"
    assert records.job("b/y")["status"] is None


def test_two_calls_never_share_a_device(tmp_path: Path) -> None:
    def lock_again() -> None:
        with runner.locked(tmp_path / "lock"):
            pass

    with runner.locked(tmp_path / "lock"), pytest.raises(RuntimeError, match="another call, or a job"):
        lock_again()
    lock_again()


@pytest.mark.parametrize("rehearse", [True, False])
def test_every_part_has_jobs_of_different_names(tmp_path: Path, rehearse: bool) -> None:
    jobs = all_jobs(Places(tmp_path, tmp_path, "decoder"), rehearse=rehearse)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert list(dict.fromkeys(job.part for job in jobs)) == list(PARTS)  # in this order


def test_tokens_of_the_bundle_are_used_if_there_are_any(tmp_path: Path) -> None:
    places = Places(tmp_path / "models", tmp_path, "decoder")
    assert places.tokens() == f"{WORK}/tokens"
    (tmp_path / "tokens").mkdir()
    assert places.tokens() == str(tmp_path / "tokens")


def test_examples_in_docstrings() -> None:
    outcome = doctest.testmod(gpu_records)
    assert outcome.attempted
    assert not outcome.failed
