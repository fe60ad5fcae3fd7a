"""What several runs on the same data have spent together, from their ledgers.

    python -m experiments.spent --workdirs=runs/first,runs/second

A run belongs here whether it came to its end or not, and whether its model is kept or not: what counts is that its
updates were computed. Folders of several arms count with every arm. The bound is that of publishing all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from dp_rmt.finetuning import command_line
from dp_rmt.finetuning.sweep.privacy import Run, cost_of_choosing
from dp_rmt.finetuning.sweep.report import arms_of, spent_by
from dp_rmt.reporting.numbers import align, number
from dp_rmt.training.ledger import read_ledger


def spent_together(workdirs: Sequence[Path]) -> str:
    """A line for each run and what they cost together, for the terminal.

    Args:
      workdirs: folders of runs on the same data.

    Raises:
      FileNotFoundError: a folder has no run that has used the data.
    """
    runs: list[Run] = []
    data: set[str] = set()
    for workdir in workdirs:
        arms = [arm.folder for arm in arms_of(workdir)]
        found = [run for folder in arms for run in spent_by(str(folder), folder)]
        if not found:
            raise FileNotFoundError(f"{workdir}: no run there has used its data; give folders of runs")
        runs += found
        data |= {entry.train_data for folder in arms for entry in read_ledger(folder)}
    rows = [["run", "updates", "noise multiplier", "sampling probability", "examples"]]
    for run in runs:
        names = ("noise_multiplier", "sampling_probability", "num_examples")
        updates = f"{run.statement['num_steps']:,}"
        rows.append([run.job, updates, *(number(run.statement[name]) for name in names)])
    warning = ["Their data differ by their fingerprints; here they are taken to be one data set."] * (len(data) > 1)
    return "\n".join([align(rows), *warning, cost_of_choosing(runs).text])


def main(argv: list[str]) -> None:
    """Prints what was spent."""
    del argv
    try:
        print(spent_together([Path(folder) for folder in flags.FLAGS.workdirs]))
    except (ValueError, OSError) as error:
        command_line.stop(error)


if __name__ == "__main__":
    flags.DEFINE_list("workdirs", None, "Folders of runs on the same data.", required=True)
    app.run(main)
