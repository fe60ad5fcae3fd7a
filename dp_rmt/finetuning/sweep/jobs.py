"""The jobs of a sweep: the sweep's file, the command of each job, and whether a job is finished."""

from __future__ import annotations

import dataclasses
import itertools
import json
import runpy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dp_rmt.accounting import Repetitions
from dp_rmt.files import write_private
from dp_rmt.finetuning import command_line
from dp_rmt.finetuning.checks import FOLDER_NAME, arm_settings
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.sweep.arm_folders import arms_of
from dp_rmt.finetuning.workdir import is_secret

JOBS_FILE = "jobs.json"
_TRIED = 64
"""Draws that are compared: two lists of independent ones agree in all of these only if there is one outcome."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that fills a folder.

    Attributes:
      name: name of the job.
      command: the program and its arguments.
      workdir: the folder that it fills.
      log: the file that gets what the job prints.
    """

    name: str
    command: Sequence[str]
    workdir: Path
    log: Path


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The file of a sweep, and the settings that were given for all of its jobs.

    Attributes:
      name: name of the file.
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
        """The arguments of a job's command line after --config and --workdir."""
        return [*self.common, *(f"--config.{key}={value}" for key, value in self.changes[name].items())]

    def settings(self, name: str) -> Settings:
        """The settings of a job, read as the job itself will read them.

        Raises:
          ValueError: a key is unknown or a value cannot be used.
        """
        arguments = self.arguments(name)
        try:
            settings = command_line.read(self.base, command_line.split(arguments)[1])
            arm_settings(settings)
        except (AttributeError, KeyError, ValueError, OSError) as error:
            given, reason = " ".join([f"--config={self.base}", *arguments]), " ".join(str(error).split())
            raise ValueError(f"job {name!r} ({given}): {reason}") from error
        return settings

    def jobs(self, workdir: Path, program: Sequence[str]) -> list[Job]:
        """The commands, in order.

        Args:
          workdir: the folder of the sweep.
          program: the program that fine-tunes, such as ``("python", "-m", "experiments.finetune")``.
        """
        jobs = []
        for name in self.changes:
            folder = workdir / "jobs" / name
            command = (*program, f"--config={self.base}", f"--workdir={folder}", *self.arguments(name))
            jobs.append(Job(name, command, folder, workdir / "logs" / f"{name}.log"))
        return jobs


def load_sweep(path: str | Path, workdir: Path, common: Sequence[str] = ()) -> Sweep:
    """Reads the file of a sweep. If the number of jobs is random, it is drawn once for all restarts.

    The file is a Python module. It has

    - ``BASE``: the config that the jobs change;
    - ``SCORE``: the metric that is compared, higher being better, as metrics.jsonl names it;
    - ``SWEPT``: the key that the plot has on its horizontal axis;
    - ``sweep()``, which yields ``(name, {key: value})``: a job and what it changes;
    - optionally ``REPETITIONS``: ``{"mean": m, "shape": s}`` of a random number of jobs
      (`dp_rmt.accounting.Repetitions`). Then ``sweep()`` is endless, and draws the settings of each job independently.

    Args:
      path: the file.
      workdir: the folder of the sweep; gets `jobs.json` if the number of jobs is drawn at random.
      common: settings for all jobs, as ``--config.KEY=VALUE``.

    Returns:
      A `Sweep`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file lacks a name, two jobs have one name, a name cannot be a folder's, or SWEPT is a seed; with
        REPETITIONS, ``sweep()`` ends or gives the same list twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"--sweep={path}: there is no such file. Give a Python file with BASE, SCORE, SWEPT and a function sweep; "
            "a checkout of dp_rmt has some in configs/sweeps/"
        )
    module = runpy.run_path(str(path))
    missing = [name for name in ("BASE", "SCORE", "SWEPT", "sweep") if name not in module]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}. A sweep has BASE (a config), SCORE (the metric compared, such as "
            "'eval/dev/accuracy'), SWEPT (the setting that differs, such as 'train.learning_rate') and sweep(), which "
            "yields (name, {setting: value})"
        )
    repetitions = Repetitions(**module["REPETITIONS"]) if "REPETITIONS" in module else None
    if repetitions is None:
        drawn = list(module["sweep"]())
    elif (saved := workdir / JOBS_FILE).exists():
        drawn = list(json.loads(saved.read_text()).items())
    else:
        drawn = _independent_draws(path, module["sweep"], repetitions.draw())
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


def _independent_draws(
    path: str | Path, draws: Callable[[], Iterable[tuple[str, Mapping[str, Any]]]], count: int
) -> list[tuple[str, Mapping[str, Any]]]:
    """The first `count` jobs of an endless random list; the theorem has nothing to say of any other list."""
    drawn = list(itertools.islice(draws(), max(count, _TRIED)))
    if len(drawn) < max(count, _TRIED):
        raise ValueError(
            f"{path}: sweep() ends after {len(drawn)} jobs. With REPETITIONS the number of jobs is drawn, and a list "
            "that cuts it short would void the bound: let sweep() go on for ever (`for number in itertools.count()`)"
        )
    first, again = ([changes for _, changes in some] for some in (drawn[:_TRIED], itertools.islice(draws(), _TRIED)))
    if first == again and any(changes != first[0] for changes in first):
        raise ValueError(
            f"{path}: sweep() gives the same list every time. With REPETITIONS the settings of each job have to be "
            "drawn independently, with secret randomness: use numpy.random.default_rng() without a seed, and no grid"
        )
    return drawn[:count]


def is_finished(job: Job) -> bool:
    """Whether a run has done all of its updates and has written its report, which comes last."""
    return (job.workdir / "report.html").exists() and all(
        arm.steps == arm.planned_steps for arm in arms_of(job.workdir)
    )
