"""A sweep from its file to its table: runs the jobs that are missing or have failed, and reports on all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dp_rmt.finetuning.sweep import executors, report, selection
from dp_rmt.finetuning.sweep.commands import printed
from dp_rmt.finetuning.sweep.jobs import Job, Sweep, is_finished
from dp_rmt.finetuning.workdir import check_workdir


def run_missing(
    sweep: Sweep,
    workdir: Path,
    program: Sequence[str],
    *,
    by: str,
    jobs_at_once: int | None = None,
    options: Mapping[str, Any] | None = None,
    cwd: Path | None = None,
) -> bool:
    """Runs the jobs that are not finished, then writes the table and the plot of those that are.

    Args:
      sweep: the sweep to run.
      workdir: the folder of the sweep.
      program: the program that fine-tunes, as `Sweep.jobs` takes it.
      by: "local" or "submitit".
      jobs_at_once: for "local", as `executors.slots` takes it.
      options: for "submitit", as `executors.run_submitit` takes them.
      cwd: the folder in which the jobs run.

    Returns:
      Whether all jobs are finished now.

    Raises:
      ValueError, RuntimeError: an error of the executor, or a run lacks the metric of the sweep.
    """
    jobs = sweep.jobs(workdir.absolute(), program)
    missing = [job for job in jobs if not is_finished(job)]
    where = f"; what they say is in {workdir / 'logs'}" if missing else ""
    if sweep.repetitions is None:
        print(f"{len(jobs)} jobs, {len(jobs) - len(missing)} finished before, {len(missing)} to run{where}", flush=True)
    if by == "local":
        tells = sweep.repetitions is None
        notes = executors.run_local(missing, executors.slots(jobs_at_once), cwd=cwd, tells=tells)
    else:
        notes = executors.run_submitit(missing, workdir.absolute(), options or {}, cwd=cwd)
    finished = [job for job in jobs if is_finished(job)]
    table = report.write(sweep, workdir, finished, failures(jobs, notes))
    if sweep.repetitions is None:
        print(table)
        print(f"Table and plot: {workdir / 'sweep.md'}, {workdir / 'sweep.svg'}")
    else:
        _print_selection(sweep, workdir, jobs, is_complete=len(finished) == len(jobs))
    return len(finished) == len(jobs)


def announce(sweep: Sweep, workdir: Path, *, prefix: str = "") -> None:
    """Prints what the best of a random number of jobs will cost, and closes the sweep's folder to others.

    Args:
      sweep: nothing is printed or closed where its number of jobs is fixed.
      workdir: its folder.
      prefix: of the printed line.

    Raises:
      ValueError: no bound for the best alone would hold; the message says why.
    """
    if sweep.repetitions is None:
        return
    workdir.chmod(0o700)  # jobs and table tell the number of jobs
    if sweep.changes:
        print(prefix + selection.price(sweep).text, flush=True)


def _print_selection(sweep: Sweep, workdir: Path, jobs: Sequence[Job], *, is_complete: bool) -> None:
    """What may be said of a sweep whose winner alone is released; others may read terminals and logs of launchers."""
    if not is_complete:
        print(
            f"Not all jobs are finished: see {workdir / 'sweep.md'}. Run the command again; nothing is released before."
        )
    elif (folder := selection.release(sweep, workdir, jobs)) is None:
        print(f"Nothing may be released: see {workdir / 'sweep.md'}.")
    else:
        print(f"The winner, which alone may leave: {folder}\nFor your eyes only: {workdir / 'sweep.md'}")


def print_missing(
    sweep: Sweep, workdir: Path, program: Sequence[str], *, target: str, options: Mapping[str, Any]
) -> None:
    """Prints the commands of the jobs that are not finished, for the user to run.

    Args:
      sweep, workdir, program: as in `run_missing`.
      target, options: as in `commands.printed`.
    """
    waiting = [job for job in sweep.jobs(workdir, program) if not is_finished(job)]
    print("\n".join(printed(waiting, target, options)))


def check_jobs(sweep: Sweep, workdir: Path) -> None:
    """Reads the settings of every job and looks at its folder, before any of them starts.

    Args:
      sweep: the sweep to run.
      workdir: the folder of the sweep.

    Raises:
      ValueError: a key is unknown, a value cannot be used, or a job's folder holds another experiment.
      FileExistsError: a job's folder holds something else.
    """
    for name in sweep.changes:
        check_workdir(workdir / "jobs" / name, sweep.settings(name))


def options_from(given: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as a dict; a value that is an integer becomes one.

    >>> options_from(["slurm_partition=gpu", "gpus_per_node=8"])
    {'slurm_partition': 'gpu', 'gpus_per_node': 8}
    """
    pairs = [option.partition("=")[::2] for option in given]
    return {key: int(value) if re.fullmatch(r"-?\d+", value) else value for key, value in pairs}


def failures(jobs: Sequence[Job], notes: Mapping[str, str]) -> dict[str, str]:
    """For every job that is not finished, the reason and the last lines of its log."""
    return {
        job.name: f"{notes.get(job.name, 'not run')}; {job.log}:\n{executors.last_lines(job.log)}"
        for job in jobs
        if not is_finished(job)
    }
