"""What several runs on the same data have spent together, from their ledgers, for the terminal.

A run counts because its updates were computed, whether or not it came to its end and its model is kept. A folder with
several arms counts with all of them. The bound is that of publishing all runs. Rows of private evaluation data, which a
ledger does not count, have a line of their own, from the runs' statements.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dp_rmt.finetuning.sweep.arm_folders import arms_of, spent_by
from dp_rmt.finetuning.sweep.privacy import cost_of_choosing, cost_of_scores
from dp_rmt.finetuning.sweep.spent_runs import SpentRun
from dp_rmt.reporting.numbers import align, number
from dp_rmt.training.ledger import read_ledger


def spent_together(workdirs: Sequence[Path]) -> str:
    """A line for each run, and what all runs cost together, for the terminal.

    Args:
      workdirs: folders of runs on the same data.

    Raises:
      FileNotFoundError: a folder has no run that has used the data.
    """
    runs: list[SpentRun] = []
    data: set[str] = set()
    for workdir in workdirs:
        arms = [arm.folder for arm in arms_of(workdir)]
        found = [run for folder in arms for run in spent_by(str(folder), folder)]
        if not found:
            raise FileNotFoundError(f"{workdir}: no run there has used its data; give folders of runs")
        runs += found
        data |= {entry.train_data for folder in arms for entry in read_ledger(folder)}
    rows = [["run", "updates", "noise multiplier", "sampling probability", "examples or users"]]
    for run in runs:
        names = ("noise_multiplier", "sampling_probability", "num_examples")
        rows.append([run.job, f"{run.num_steps:,}", *(number(run.statement[name]) for name in names)])
    warning = ["Their data differ by their fingerprints; here they are taken to be one data set."] * (len(data) > 1)
    scores = cost_of_scores(runs)
    return "\n".join([align(rows), *warning, cost_of_choosing(runs).text, *([scores] if scores else [])])
