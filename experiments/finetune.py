"""The main job: private fine-tuning from a config.

    python -m experiments.finetune --config=configs/quickstart.py --workdir=DIR [--config.privacy.epsilon=3 ...]
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from dp_rmt.training.privacy_statement import statement_table
from dp_rmt.training.report import results_table
from experiments import arms, command_line

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run's files; default runs/<name of the config>.")


def main(argv: list[str]) -> None:
    """Prepares, trains and reports; mistakes in the input end it before training, with one clear line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value or f"runs/{config.name}")
    try:
        prepared = arms.prepare(config, workdir)
    except (ValueError, OSError, RuntimeError) as error:
        command_line.stop(error)
    for arm in prepared:
        arms.train(arm)
    runs = arms.report(prepared, workdir)
    print(results_table(runs))
    print(statement_table({name: run.privacy for name, run in runs.items()}))
    print(f"Report: {workdir / 'report.html'}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
