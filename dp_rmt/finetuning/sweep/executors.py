"""Two ways to run the jobs of a sweep: a pool of processes on this machine, or Slurm by submitit."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from dp_rmt.files import make_private_folder
from dp_rmt.finetuning.sweep.jobs import Job
from dp_rmt.reporting.provenance import command_line

ONE_OF_MANY = "--coordinator_address=auto"
"""The flag that tells a run that it has several processes (`dp_rmt.training.processes`)."""

RUNNING = "still running, started before"


@dataclasses.dataclass(frozen=True)
class Slot:
    """A share of the machine, which one job at a time has to itself.

    Attributes:
      environment: variables that keep the job to its share.
      cores: processor cores; empty for all.
    """

    environment: Mapping[str, str]
    cores: frozenset[int] = frozenset()


def slots(jobs_at_once: int | None = None) -> list[Slot]:
    """One slot for each NVIDIA GPU; on a machine without GPUs one slot for two cores, unless a number is given.

    The cores are divided among the slots, because XLA makes as many threads as a process has cores.

    Args:
      jobs_at_once: number of slots; on a machine with GPUs, the largest number of them that is used.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpus = _gpus()
    by_cores = max(1, (len(cores) or os.cpu_count() or 1) // 2)
    count = min(jobs_at_once or len(gpus), len(gpus)) if gpus else jobs_at_once or by_cores
    found = []
    for number in range(count):
        environment = {"CUDA_VISIBLE_DEVICES": gpus[number]} if gpus else {}
        own = frozenset(cores[number % len(cores) :: count]) if cores else frozenset()
        found.append(Slot({**environment, "OMP_NUM_THREADS": str(max(1, len(own)))}, own))
    return found


def run_local(
    jobs: Sequence[Job],
    free: Sequence[Slot],
    *,
    cwd: Path | None = None,
    poll_seconds: float = 0.2,
    tells: bool = True,
) -> dict[str, str]:
    """Runs all jobs in processes on this machine, one per slot; if it is ended itself, it ends them.

    Args:
      jobs: the jobs in the order of starting.
      free: the slots.
      cwd: the folder in which the commands run.
      poll_seconds: seconds between looks at the processes.
      tells: whether it prints a line as a job ends, which tells how many jobs there are.

    Returns:
      name -> how the job ended, in words.
    """
    waiting, idle, notes = list(jobs), list(free), {}
    running: dict[str, tuple[subprocess.Popen[bytes], IO[str], Slot]] = {}
    with _terminated_as_interrupted():
        try:
            while waiting or running:
                while waiting and idle:
                    job, slot = waiting.pop(0), idle.pop(0)
                    if (log := open_log(job.log)) is None:
                        notes[job.name] = RUNNING
                        idle.append(slot)
                        continue
                    running[job.name] = start(job.command, log, slot, cwd), log, slot
                for name, (process, log, slot) in list(running.items()):
                    if process.poll() is not None:
                        notes[name] = ended(process.returncode, log)
                        if tells:
                            print(f"{name}: {notes[name]} ({len(notes)} of {len(jobs)})", flush=True)
                        del running[name]
                        idle.append(slot)
                time.sleep(poll_seconds)
        finally:
            for process, _, _ in running.values():
                process.terminate()  # a run saves a checkpoint and ends
            for process, log, _ in running.values():
                ended(process.wait(), log)
    return notes


def run_submitit(
    jobs: Sequence[Job], workdir: Path, options: Mapping[str, Any], *, cwd: Path | None = None
) -> dict[str, str]:
    """Submits all jobs by submitit and waits for them. A job that was submitted before and still runs is not repeated.

    Args:
      jobs: the jobs.
      workdir: the folder of the sweep; submitit's own files go to `submitit/` in it.
      options: parameters of submitit's `AutoExecutor`, such as ``slurm_partition`` and ``gpus_per_node``; and
        ``cluster``, by default "slurm" ("local" runs all jobs at once, on this machine).
      cwd: the folder in which the commands run.

    Returns:
      name -> how the job ended, in words.

    Raises:
      RuntimeError: submitit is not installed.
      ValueError: an option is unknown.
    """
    try:
        import submitit
    except ImportError as error:
        raise RuntimeError("--executor=submitit needs submitit: pip install 'dp_rmt[slurm]'") from error
    parameters = dict(options)
    make_private_folder(workdir / "submitit")  # the commands in it may give seeds
    executor = submitit.AutoExecutor(folder=workdir / "submitit", cluster=parameters.pop("cluster", "slurm"))
    submitted = {}
    try:
        for job in jobs:
            identity = job.log.with_suffix(".submitted")
            if identity.exists():
                before = executor.job_class(executor.folder, identity.read_text())
                if not before.done():
                    submitted[job.name] = before
                    continue
            executor.update_parameters(**{"name": job.name, **parameters})
            submitted[job.name] = executor.submit(Submitted(tuple(job.command), job.log, cwd))
            job.log.parent.mkdir(parents=True, exist_ok=True)
            identity.write_text(submitted[job.name].job_id)
    except (NameError, AssertionError) as error:  # submitit raises these for its parameters
        raise ValueError(f"--launch: {' '.join(str(error).split())}") from error
    for handle in submitted.values():
        handle.wait()
    return {name: f"job {handle.job_id}, {handle.state.lower()}" for name, handle in submitted.items()}


class Submitted:
    """A command that Slurm runs in a process of its own; after a time limit or a preemption it is queued again.

    Args:
      command: the program and its arguments. In a job of several tasks each task runs it and finds the others.
      log: log of task 0; the other tasks add their number to its name.
      cwd: the folder in which the command runs.
    """

    def __init__(self, command: Sequence[str], log: Path, cwd: Path | None):
        self.command, self.log, self.cwd = command, log, cwd
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Runs the command to its end and returns its exit status."""
        import submitit

        tasks = submitit.JobEnvironment()
        path = self.log if tasks.global_rank == 0 else self.log.with_suffix(f".{tasks.global_rank}.log")
        command = [*self.command, *[ONE_OF_MANY] * (tasks.num_tasks > 1)]
        if (log := open_log(path)) is None:
            raise RuntimeError(f"{path} is locked: the job {RUNNING}")
        # Slurm warns every process of a job by SIGUSR2, which would end the command before it has saved anything.
        handler = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self.process = start(command, log, Slot({}), self.cwd)
        signal.signal(signal.SIGUSR2, handler)
        status = self.process.wait()
        ended(status, log)
        if status != 0:
            raise RuntimeError(f"exit status {status}; {path}:\n{last_lines(path)}")
        return status

    def checkpoint(self) -> Any:
        """Lets the run save its checkpoint, and queues it again; submitit calls this shortly before the end."""
        import submitit

        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        return submitit.helpers.DelayedSubmission(Submitted(self.command, self.log, self.cwd))


# ---- One process and its log ---------------------------------------------------------------------------------------


def open_log(path: Path) -> IO[str] | None:
    """The log of a job, opened for appending; None while a process that was started with it still runs.

    A lock on the open file tells. The job's processes inherit the file, so the lock lasts as long as the last of them,
    even if the sweep that started them was killed. On a file system without locks the log always opens.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        return None
    except OSError:
        pass
    return log


def start(command: Sequence[str], log: IO[str], slot: Slot, cwd: Path | None) -> subprocess.Popen[bytes]:
    """Starts a command on the cores of a slot."""
    log.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {command_line(command)}\n")
    log.flush()
    environment = {**os.environ, **slot.environment}
    with _on_cores(slot.cores):
        return subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )


def ended(status: int, log: IO[str]) -> str:
    """Writes at the end of a command's log how it ended, closes the log, and returns what it wrote."""
    note = f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
    log.write(f"== {note}\n")
    log.close()
    return note


def last_lines(log: Path, count: int = 15) -> str:
    """The last lines of a log; of a progress bar, which overwrites its line, only the last state counts."""
    if not log.exists():
        return "(no log)"
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").split("\n")
    shown = [line.rsplit("\r", 1)[-1].rstrip() for line in lines]
    return "\n".join([line for line in shown if line][-count:])


@contextlib.contextmanager
def _on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Programs started inside inherit the cores; nothing else sets these before a program's first line runs."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt, so that it ends the jobs, too."""

    def interrupt(signum: int, frame: Any) -> None:
        del frame
        raise KeyboardInterrupt(f"signal {signum}")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _gpus() -> list[str]:
    """The NVIDIA GPUs that may be used, without starting JAX, which would take their memory."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return listed.stdout.split()
