"""The main job: private fine-tuning from a config.

python -m experiments.finetune --config=configs/quickstart.py --workdir=DIR [--config.privacy.epsilon=3 ...]
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from dp_rmt.finetuning import arms, command_line
from dp_rmt.finetuning.settings import Settings
from dp_rmt.reporting.page import results_table
from dp_rmt.reporting.privacy_statement import statement_table
from dp_rmt.training import processes

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file of configs/.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "For several processes: host:port of the first; auto on TPU pods, Slurm, Open MPI."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes, each with the same command.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process's number, from 0.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run's files; default runs/<name of the config>.")


def main(argv: list[str]) -> None:
    """Prepares, trains and reports; mistakes in the input end it before training, with one clear line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value or f"runs/{config.name}")
    with processes.ending_together():
        try:
            settings = Settings.from_config(config)
            processes.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
            prepared = arms.prepare(settings, workdir)
        except (ValueError, OSError, RuntimeError) as error:
            command_line.stop(error)
        try:
            for arm in prepared:
                arms.train(arm)
        except OSError as error:  # a full disk: no mistake in the program, and the run can go on
            command_line.stop(error)
        if processes.is_first():
            _report(prepared, workdir)


def _report(prepared: list[arms.Arm], workdir: Path) -> None:
    runs = arms.report(prepared, workdir)
    print(results_table(runs))
    print(statement_table({name: run.privacy for name, run in runs.items()}))
    print(f"Report: {workdir / 'report.html'}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
