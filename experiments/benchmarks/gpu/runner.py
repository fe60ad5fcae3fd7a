"""Runs jobs one after the other for a limited time, so that a later call goes on where this one stopped."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments.benchmarks.gpu.jobs import RECORDS, WORK, Job
from experiments.benchmarks.gpu.records import (
    CUT,
    DONE,
    ENDED,
    FAILED,
    SKIPPED,
    TOO_LONG,
    PartRecords,
    without_folders,
)

ROOT = Path(__file__).parents[3]
STOPPING = 20.0
"""Seconds that a job has between SIGTERM and SIGKILL: a run finishes its step and saves."""
WORTH_STARTING = 15.0
"""With fewer seconds left no job is started: JAX alone takes some of them."""


class Clock:
    """Counts down from a number of seconds; a signal that asks for an end sets it to zero."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def left(self) -> float:
        """Seconds of work left, less what stopping takes."""
        return 0.0 if self.signal else self._end - STOPPING - time.monotonic()

    def _stop(self, number: int, frame: object) -> None:
        del frame
        self.signal = number


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Holds a lock that the jobs inherit: one that outlives this process, after a SIGKILL, still has it.

    Raises:
      RuntimeError: another call, or a job of one, is at work in the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                "another call, or a job that one left behind, is at work in this folder and on its device; wait until "
                "it has ended, or end it (`fuser` on the file `lock` in the work folder shows it)"
            ) from error
        yield file.fileno()


def run_all(
    jobs: Sequence[Job],
    records: PartRecords,
    clock: Clock,
    work: Path,
    environment: Mapping[str, str],
    lock: int,
    *,
    again: bool = False,
) -> None:
    """Runs the jobs that have not ended, and writes what each found as soon as it is known.

    Args:
      jobs: in order.
      records: what earlier calls found; it is changed.
      clock: when to stop.
      work: folder for what jobs leave behind, and for their logs.
      environment: of the processes.
      lock: descriptor of the lock that the jobs inherit.
      again: also run jobs that failed, were skipped or were too long.
    """
    is_first = True
    for number, job in enumerate(jobs, start=1):
        status = records.job(job.name)["status"]
        if status == DONE or (status in ENDED and not again):
            continue
        label = f"[{number}/{len(jobs)}] {job.name}"
        if reason := missing(job):
            print(f"{label}: skipped, {reason}", flush=True)
            records.update(job.name, status=SKIPPED, reason=reason)
            continue
        if clock.left() <= WORTH_STARTING:
            return
        print(f"{label} ...", flush=True)
        _run(job, records, clock, work / job.name, environment, lock, had_the_whole_call=is_first)
        known = records.job(job.name)
        print(f"{label}: {known['status']}, {known['seconds']:.0f} s{_because(known['reason'])}", flush=True)
        is_first = False


def missing(job: Job) -> str | None:
    """What a job needs and does not find, in words; None if it finds everything."""
    packages = [name for name in job.packages if importlib.util.find_spec(name) is None]
    if packages:
        return f"{', '.join(packages)} not installed"
    folders = [f"{path.parent.name}/{path.name}" for path in job.needs if not path.is_dir()]
    return f"no folder {', '.join(folders)}" if folders else None


def _run(
    job: Job,
    records: PartRecords,
    clock: Clock,
    folder: Path,
    environment: Mapping[str, str],
    lock: int,
    *,
    had_the_whole_call: bool,
) -> None:
    places = {RECORDS: folder / "records", WORK: folder / "work"}
    places[WORK].mkdir(parents=True, exist_ok=True)
    records.restore(job.name, places[RECORDS])
    start, processor, before = time.monotonic(), _cpu_seconds(), records.job(job.name)
    status, reason = DONE, None
    for command in job.commands:
        filled = [_filled(argument, places) for argument in command]
        code, log = _process(filled, clock, folder / "log", {**environment, **job.variables}, lock)
        if code is None:
            too_long = had_the_whole_call and not job.goes_on and clock.signal is None
            status, reason = (TOO_LONG, "a whole call was not enough") if too_long else (CUT, None)
            break
        if code:
            status, reason = FAILED, f"exit status {code}: {_last_lines(log)}"
            break
    records.update(
        job.name,
        status=status,
        reason=reason,
        seconds=round(before["seconds"] + time.monotonic() - start, 1),
        cpu_seconds=round(before["cpu_seconds"] + _cpu_seconds() - processor, 2),
        calls=before["calls"] + 1,
        records=records.collect(job.name, places[RECORDS]),
    )


def _process(
    arguments: Sequence[str], clock: Clock, log: Path, environment: Mapping[str, str], lock: int
) -> tuple[int | None, Path]:
    """Runs Python to its end, or until the clock stops it: then the status is None."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes here alone, and what the job starts can be stopped with it
            pass_fds=(lock,),
        )
        while True:
            try:
                return process.wait(timeout=0.2), log
            except subprocess.TimeoutExpired:
                if clock.left() > 0:
                    continue
            _stop(process)
            return None, log


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # the job alone: it may have to save
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOPPING - 5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _cpu_seconds() -> float:
    """Of all processes that have ended here."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _filled(argument: str, places: Mapping[str, Path]) -> str:
    for name, path in places.items():
        argument = argument.replace(name, str(path))
    return argument


def _last_lines(log: Path) -> str:
    """The end of a log, without folders of this machine."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    return without_folders(" | ".join(line.strip() for line in lines))[-600:]


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""
