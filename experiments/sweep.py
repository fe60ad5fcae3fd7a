"""Sweeps: many runs of the main job, launched by what is there, restartable, with one table and one plot.

    python -m experiments.sweep --sweep=configs/sweeps/quickstart_rates.py --executor=local --workdir=runs/rates
    python -m experiments.sweep --sweep=... --executor=submitit --launch=slurm_partition=gpu --launch=gpus_per_node=8
    python -m experiments.sweep --sweep=... --executor=print --target=gcloud --launch=tpu=NAME --launch=zone=ZONE

A job is `experiments.finetune` in a process and a folder of its own. The same command again runs what is missing or has
failed; a run that was killed resumes from its last checkpoint. Further settings, such as --config.data.path=DIR, hold
for all jobs. The exit status is 1 if a job is not finished. `dp_rmt.finetuning.sweep.jobs.load_sweep` says what a file
of configs/sweeps/ has.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

from configs.reading import read_settings
from dp_rmt.finetuning import command_line
from dp_rmt.finetuning.sweep import commands, jobs, launch

ROOT = Path(__file__).parents[1]  # where jobs run: `configs` and `experiments` are not installed
FINETUNE = ("-m", "experiments.finetune")


def main(argv: list[str]) -> None:
    """Runs what is missing, then writes table and plot."""
    values, common = flags.FLAGS, argv[1:]
    if others := [argument for argument in common if not argument.startswith("--config.")]:
        raise app.UsageError(f"unexpected arguments: {' '.join(others)}; jobs take --config.KEY=VALUE")
    workdir = Path(values.workdir or f"runs/sweeps/{Path(values.sweep).stem}")
    options = launch.options_from(values.launch)
    try:
        sweep = jobs.load_sweep(values.sweep, workdir, common)
        launch.check_jobs(sweep, workdir, read_settings)
        if values.executor == "print":
            return launch.print_missing(sweep, workdir, ("python", *FINETUNE), target=values.target, options=options)
        given = {"by": values.executor, "jobs_at_once": values.jobs_at_once, "options": options, "cwd": ROOT}
        sys.exit(not launch.run_missing(sweep, workdir, (sys.executable, *FINETUNE), **given))
    except (ValueError, OSError, RuntimeError) as error:
        command_line.stop(error)


def _parse_flags(argv: list[str]) -> list[str]:
    try:  # --config.KEY=VALUE, which the jobs take, is left to `main`
        return flags.FLAGS(argv, known_only=True)
    except flags.Error as error:
        sys.exit(f"sweep: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("sweep", None, "A file of configs/sweeps/.", required=True)
    flags.DEFINE_enum("executor", "local", ["local", "submitit", "print"], "What launches the jobs.")
    flags.DEFINE_string("workdir", None, "Folder of the sweep; default runs/sweeps/NAME.")
    flags.DEFINE_integer("jobs_at_once", None, "Of local, on CPUs; default one for two cores.", lower_bound=1)
    flags.DEFINE_enum("target", "gcloud", list(commands.TARGETS), "Of print.")
    flags.DEFINE_multi_string("launch", [], "KEY=VALUE for submitit or print; docs/launch.md lists them.")
    app.run(main, flags_parser=_parse_flags)
