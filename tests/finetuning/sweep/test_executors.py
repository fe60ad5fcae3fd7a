"""What runs the jobs of a sweep: a pool of processes on this machine, and submitit."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dp_rmt
from dp_rmt.finetuning.sweep import executors
from dp_rmt.finetuning.sweep.executors import Slot
from dp_rmt.finetuning.sweep.jobs import Job

ROOT = Path(dp_rmt.__file__).parents[1]


def test_jobs_have_their_slots_to_themselves_and_no_more_run_than_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = (
        "import os, pathlib, sys, time\nhere = pathlib.Path(sys.argv[1])\n"
        "mark = here / f'{os.environ[\"SLOT\"]}.busy'\nmark.touch(exist_ok=False)\ntime.sleep(0.2)\n"
        "print(sorted(os.sched_getaffinity(0)), os.environ['SLOT'])\nmark.unlink()\n"
    )
    jobs = [
        Job(f"j{n}", (sys.executable, "-c", program, str(tmp_path)), tmp_path, tmp_path / f"{n}.log") for n in range(5)
    ]
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    slots = [Slot({"SLOT": name}, frozenset({core})) for name in "ab"]
    notes = executors.run_local(jobs, slots, poll_seconds=0.02)
    assert set(notes.values()) == {"exit status 0"}
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in said] == [f"exit status 0 ({n} of 5)" for n in range(1, 6)]
    assert os.sched_getaffinity(0) == before
    used = [job.log.read_text().splitlines()[-2] for job in jobs]
    assert set(used) == {f"[{core}] a", f"[{core}] b"}


def test_each_gpu_takes_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    slots = executors.slots()
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["3", "GPU-5f"]
    assert len(executors.slots(1)) == 1
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert all("CUDA_VISIBLE_DEVICES" not in slot.environment for slot in executors.slots(3))
    assert len(executors.slots(3)) == 3


def test_a_job_that_outlived_its_sweep_is_not_started_twice(tmp_path: Path) -> None:
    job = Job("long", (sys.executable, "-c", "import time; time.sleep(60)"), tmp_path, tmp_path / "long.log")
    log = executors.open_log(job.log)
    assert log is not None
    process = executors.start(job.command, log, Slot({}), None)
    log.close()  # as when the sweep was killed; the job goes on, and with it the lock
    try:
        assert executors.run_local([job], [Slot({})]) == {"long": executors.RUNNING}
    finally:
        process.kill()
        process.wait()
    quick = dataclasses.replace(job, command=(sys.executable, "-c", ""))
    assert executors.run_local([quick], [Slot({})], poll_seconds=0.02) == {"long": "exit status 0"}


@pytest.mark.thorough
def test_sigterm_ends_the_jobs_too(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys\nfrom dp_rmt.finetuning.sweep.executors import Slot, run_local\n"
        "from dp_rmt.finetuning.sweep.jobs import Job\n"
        "waits = 'import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        "print(1, flush=True); time.sleep(60)'\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "run_local([Job('j', (sys.executable, '-c', waits), folder, folder / 'j.log')], [Slot({})])\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (log := tmp_path / "j.log").exists() or "\n1" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) != 0
    assert executors.last_lines(log).endswith("1\n== exit status 7")


def test_submitit_queues_a_job_again_after_it_has_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    saves = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(60)"
    job = executors.Submitted((sys.executable, "-c", saves), tmp_path / "j.log", None)
    log = executors.open_log(job.log)
    assert log is not None
    job.process = executors.start(job.command, log, Slot({}), None)
    log.close()
    time.sleep(0.5)
    again = job.checkpoint()
    assert job.process.returncode in (0, -signal.SIGTERM)
    assert (again.function.command, again.function.log, again.function.process) == (job.command, job.log, None)
    with pytest.raises(ValueError, match=r"--launch: .*Unknown argument 'partitionn'"):
        executors.run_submitit(
            [Job("j", (), tmp_path, tmp_path / "k.log")], tmp_path, {"cluster": "local", "slurm_partitionn": "x"}
        )


def test_last_lines_show_what_a_terminal_would(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("one\ntrain 1%\rtrain 2%\rtrain 3%\n\nend\n")
    assert executors.last_lines(tmp_path / "log", 2) == "train 3%\nend"
