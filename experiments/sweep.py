"""Sweeps: many runs of the main job, launched by what is there, restartable, with one table and one plot.

    python -m experiments.sweep --sweep=configs/sweeps/quickstart_rates.py --executor=local --workdir=runs/rates
    python -m experiments.sweep --sweep=... --executor=submitit --launch=slurm_partition=gpu --launch=gpus_per_node=8
    python -m experiments.sweep --sweep=... --executor=print --target=gcloud --launch=tpu=NAME --launch=zone=ZONE

A job is `experiments.finetune` in a process and a folder of its own. The same command again runs what is missing or has
failed: a job that has left its report after its last update is skipped, one that was killed resumes from its last
checkpoint. Further settings, such as --config.data.path=DIR, hold for all jobs. The folder gets `jobs/NAME/`, the
folder of each run, `logs/NAME.log`, and `sweep.md`, `sweep.csv`, `sweep.json` and `sweep.svg`. See docs/launch.md.

A file of configs/sweeps/ has

- ``BASE``: the config that the jobs change;
- ``SCORE``: the metric that is compared, higher being better, as metrics.jsonl names it;
- ``SWEPT``: the key that the plot has on its horizontal axis;
- ``sweep()``, which yields ``(name, {key: value})``: a job and what it changes;
- optionally ``REPETITIONS``: ``{"mean": m, "shape": s}`` of a random number of jobs
(`dp_rmt.finetuning.sweep.privacy`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import runpy
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from dp_rmt.files import write_private
from dp_rmt.finetuning import command_line
from dp_rmt.finetuning.checks import FOLDER_NAME, arm_settings
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.sweep import commands as sweep_commands
from dp_rmt.finetuning.sweep import executors as sweep_executors
from dp_rmt.finetuning.sweep import report as sweep_report
from dp_rmt.finetuning.sweep.executors import Job
from dp_rmt.finetuning.sweep.privacy import Repetitions
from dp_rmt.finetuning.workdir import check_workdir, is_secret

ROOT = Path(__file__).parents[1]
"""Where jobs run: `configs` and `experiments` are not installed."""

JOBS_FILE = "jobs.json"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A file of configs/sweeps/, and the settings that were given for all of its jobs.

    Attributes:
      name: of the file.
      base: the config that the jobs change, as --config takes it.
      score: the metric that is compared.
      swept: the key that the plot has on its horizontal axis.
      changes: job -> dotted key -> value.
      common: settings for all jobs, as ``--config.KEY=VALUE``.
      repetitions: the distribution of the number of jobs; None where it is fixed.
    """

    name: str
    base: str
    score: str
    swept: str
    changes: Mapping[str, Mapping[str, Any]]
    common: Sequence[str] = ()
    repetitions: Repetitions | None = None

    def arguments(self, name: str) -> list[str]:
        """What a job's command line has after --config and --workdir."""
        return [*self.common, *(f"--config.{key}={value}" for key, value in self.changes[name].items())]

    def settings(self, name: str) -> Settings:
        """The settings of a job, read as the job itself will read it.

        Raises:
          ValueError: a key is unknown or a value cannot be used.
        """
        values, argv = flags.FlagValues(), ["sweep", f"--config={self.base}", *self.arguments(name)]
        config_flags.DEFINE_config_file("config", None, "Of the job.", flag_values=values, sys_argv=argv)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of how ml_collections imports a file
                values(argv)
            settings = Settings.from_config(values["config"].value)
            arm_settings(settings)
        except (AttributeError, KeyError, ValueError, OSError, flags.Error) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"job {name!r} ({' '.join(argv[1:])}): {reason}") from error
        return settings

    def jobs(self, workdir: Path, python: str) -> list[Job]:
        """The commands, in order.

        Args:
          workdir: of the sweep.
          python: the interpreter that runs them.
        """
        command = [python, "-m", "experiments.finetune", f"--config={self.base}"]
        jobs = []
        for name in self.changes:
            folder = workdir / "jobs" / name
            given = (*command, f"--workdir={folder}", *self.arguments(name))
            jobs.append(Job(name, given, folder, workdir / "logs" / f"{name}.log"))
        return jobs


def load_sweep(path: str | Path, workdir: Path, common: Sequence[str] = ()) -> Sweep:
    """Reads a file of configs/sweeps/; where the number of jobs is random, draws it, once for all restarts.

    Args:
      path: the file.
      workdir: of the sweep; gets `jobs.json` if the jobs are drawn at random.
      common: settings for all jobs, as ``--config.KEY=VALUE``.

    Returns:
      A `Sweep`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file lacks a name, or names two jobs alike.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--sweep={path}: no such file; give one of configs/sweeps/")
    module = runpy.run_path(str(path))
    missing = [name for name in ("BASE", "SCORE", "SWEPT", "sweep") if name not in module]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; what a sweep has is said in experiments/sweep.py")
    repetitions = Repetitions(**module["REPETITIONS"]) if "REPETITIONS" in module else None
    if repetitions is None:
        drawn = list(module["sweep"]())
    elif (saved := workdir / JOBS_FILE).exists():
        drawn = list(json.loads(saved.read_text()).items())
    else:
        drawn = list(itertools.islice(module["sweep"](), repetitions.draw()))
        workdir.mkdir(parents=True, exist_ok=True)
        write_private(saved, json.dumps(dict(drawn), indent=1) + "\n")  # the number of jobs is a secret
    changes = dict(drawn)
    if len(changes) < len(drawn):
        raise ValueError(f"{path}: two jobs have the same name, among {', '.join(name for name, _ in drawn)}")
    if is_secret(module["SWEPT"]):
        raise ValueError(f"{path}: SWEPT is {module['SWEPT']!r}, whose values would stand in table and plot")
    if wrong := [name for name in changes if not FOLDER_NAME.fullmatch(name)]:
        raise ValueError(
            f"{path}: the name {wrong[0]!r} becomes a folder; use letters, digits, '.', '_' and '-', the first a "
            "letter, a digit or '_'"
        )
    return Sweep(Path(path).stem, module["BASE"], module["SCORE"], module["SWEPT"], changes, tuple(common), repetitions)


def is_finished(job: Job) -> bool:
    """Whether a run has done all of its updates and written its report, the last thing that it does."""
    return (job.workdir / "report.html").exists() and all(
        arm.steps == arm.planned_steps for arm in sweep_report.arms_of(job.workdir)
    )


def main(argv: list[str]) -> None:
    """Runs what is missing, then writes table and plot; exit status 1 if a job has failed."""
    common = argv[1:]
    if others := [argument for argument in common if not argument.startswith("--config.")]:
        raise app.UsageError(f"unexpected arguments: {' '.join(others)}; jobs take --config.KEY=VALUE")
    path, executor = flags.FLAGS.sweep, flags.FLAGS.executor
    workdir = Path(flags.FLAGS.workdir or f"runs/sweeps/{Path(path).stem}")
    options = _options(flags.FLAGS.launch)
    try:
        sweep = load_sweep(path, workdir, common)
        for name in sweep.changes:
            check_workdir(workdir / "jobs" / name, sweep.settings(name))
        if executor == "print":
            waiting = [job for job in sweep.jobs(workdir, "python") if not is_finished(job)]
            print("\n".join(sweep_commands.printed(waiting, flags.FLAGS.target, options)))
            return
        jobs = sweep.jobs(workdir.absolute(), sys.executable)
        missing = [job for job in jobs if not is_finished(job)]
        print(f"{len(jobs)} jobs, {len(jobs) - len(missing)} finished before, {len(missing)} to run", flush=True)
        if executor == "local":
            notes = sweep_executors.run_local(missing, sweep_executors.slots(flags.FLAGS.jobs_at_once), cwd=ROOT)
        else:
            notes = sweep_executors.run_submitit(missing, workdir.absolute(), options, cwd=ROOT)
    except (ValueError, OSError, RuntimeError) as error:
        command_line.stop(error)
    report = sweep_report.write(sweep, workdir, [job for job in jobs if is_finished(job)], _failed(jobs, notes))
    print(f"{report}\nTable and plot: {workdir / 'sweep.md'}, {workdir / 'sweep.svg'}")
    sys.exit(any(not is_finished(job) for job in jobs))


def _failed(jobs: Sequence[Job], notes: Mapping[str, str]) -> dict[str, str]:
    """What is to be said of every job that is not finished: why, and the last lines of its log."""
    return {
        job.name: f"{notes.get(job.name, 'not run')}; {job.log}:\n{sweep_executors.last_lines(job.log)}"
        for job in jobs
        if not is_finished(job)
    }


def _options(given: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as a dict; a value that is an integer becomes one."""
    pairs = [option.partition("=")[::2] for option in given]
    return {key: int(value) if re.fullmatch(r"-?\d+", value) else value for key, value in pairs}


def _parse_flags(argv: list[str]) -> list[str]:
    """Leaves --config.KEY=VALUE, which the jobs take, to `main`."""
    try:
        return flags.FLAGS(argv, known_only=True)
    except flags.Error as error:
        sys.exit(f"sweep: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("sweep", None, "A file of configs/sweeps/.", required=True)
    flags.DEFINE_enum("executor", "local", ["local", "submitit", "print"], "What launches the jobs.")
    flags.DEFINE_string("workdir", None, "Folder of the sweep; default runs/sweeps/NAME.")
    flags.DEFINE_integer("jobs_at_once", None, "Of local, on CPUs; default one for two cores.", lower_bound=1)
    flags.DEFINE_enum("target", "gcloud", list(sweep_commands.TARGETS), "Of print.")
    flags.DEFINE_multi_string("launch", [], "KEY=VALUE for submitit or print; docs/launch.md lists them.")
    app.run(main, flags_parser=_parse_flags)
