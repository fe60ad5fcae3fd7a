"""Prints the table of the study of units of privacy, from its records, as Markdown.

python -m experiments.studies.units.table --results=experiments/studies/units/results/e2e
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dp_rmt.finetuning import command_line
from dp_rmt.reporting.records import learning_rate, markdown_table, read_records
from experiments.studies.methods.score import score_at
from experiments.studies.whitening.table import best_runs

Record = dict[str, Any]
COLUMNS = (
    "arm",
    "units in a step",
    "rows of each",
    "noise of the mean, in clip norms",
    "learning rate (tried)",
    "seeds",
    "loss on dev",
    "last training losses",
)


def main(argv: list[str]) -> None:
    """Prints one row for each arm."""
    del argv
    print(markdown_table(COLUMNS, rows(read_records(Path(flags.FLAGS.results)))))


def rows(records: Sequence[Record]) -> list[list[str]]:
    """The cells of the table, a row for each arm that has a whole run; the least loss first.

    Args:
      records: of `experiments.studies.methods.study`, whole runs and those that stopped where a rate was chosen.
    """
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record["arm"], []).append(record)
    found = {arm: best_runs(runs) for arm, runs in arms.items()}
    whole = {arm: best for arm, best in found.items() if best}
    return [
        [arm, *_row(best, arms[arm])]
        for arm, best in sorted(whole.items(), key=lambda item: statistics.fmean(run["loss"][-1][1] for run in item[1]))
    ]


def _row(best: Sequence[Record], tried: Sequence[Record]) -> list[str]:
    privacy = best[0]["config"]["privacy"]
    rates = ", ".join(f"{rate:g}" for rate in sorted({learning_rate(run["config"]) for run in tried}))
    is_of_persons = best[0]["config"]["data"].get("user_column") is not None
    return [
        f"{privacy['expected_batch_size']:g}",
        f"at most {privacy['rows_per_user']}" if is_of_persons else "1",
        f"{best[0]['noise_multiplier'] / privacy['expected_batch_size']:.5f}",
        f"{learning_rate(best[0]['config']):g} ({rates})",
        str(len(best)),
        f"{statistics.fmean(run['loss'][-1][1] for run in best):.3f}",
        f"{-statistics.fmean(score_at(run, run['steps']) for run in best):.3f}",
    ]


if __name__ == "__main__":
    flags.DEFINE_string("results", "experiments/studies/units/results/e2e", "Folder of the records.")
    command_line.run(main)
