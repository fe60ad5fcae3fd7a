"""A sweep from its file to its table: runs the jobs that are missing or have failed, and reports on all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dp_rmt.finetuning.sweep import executors, report
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
    print(f"{len(jobs)} jobs, {len(jobs) - len(missing)} finished before, {len(missing)} to run{where}", flush=True)
    if by == "local":
        notes = executors.run_local(missing, executors.slots(jobs_at_once), cwd=cwd)
    else:
        notes = executors.run_submitit(missing, workdir.absolute(), options or {}, cwd=cwd)
    finished = [job for job in jobs if is_finished(job)]
    print(report.write(sweep, workdir, finished, failures(jobs, notes)))
    print(f"Table and plot: {workdir / 'sweep.md'}, {workdir / 'sweep.svg'}")
    return len(finished) == len(jobs)


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
