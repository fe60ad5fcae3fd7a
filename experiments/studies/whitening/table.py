"""Prints the tables of the study of whitened coordinates, from its records, as Markdown.

python -m experiments.studies.whitening.table --results=experiments/studies/whitening/results/sst2
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dp_rmt.finetuning import command_line
from dp_rmt.reporting.advice import alarm_from
from dp_rmt.reporting.records import learning_rate, markdown_table, read_records
from experiments.studies.methods.score import score_at

Record = dict[str, Any]
BASELINES = ("dp_adam", "dp_adam_b5")
"""DP-Adam with b1 .9 and .5; the better one sets the target."""
SHARE = 0.95
COLUMNS = ("batch", "epsilon", "arm", "learning rate (tried)", "seeds", "average", "last iterate", "steps", "overshot")


def main(argv: list[str]) -> None:
    """Prints one row for each arm, batch size and epsilon."""
    del argv
    print(markdown_table(COLUMNS, rows(read_records(Path(flags.FLAGS.results)))))


def rows(records: Sequence[Record]) -> list[list[str]]:
    """The cells of the table.

    Args:
      records: of `experiments.studies.methods.study`, whole runs and those that stopped where a rate was chosen.

    Returns:
      A row for each batch size, epsilon and arm. Final scores are accuracies, or losses of a text task. The steps are
      those from which a run stays at 95% of the better baseline's final accuracy, of the average and of the last
      iterate; a text task has none, as it is evaluated at its end alone.
    """
    groups = by_cell(records)
    cells = []
    for (batch, epsilon, arm), runs in sorted(groups.items(), key=lambda item: (-item[0][0], -item[0][1])):
        target = target_of([groups.get((batch, epsilon, name), []) for name in BASELINES])
        cells.append([f"{batch:g}", f"{epsilon:g}", arm, *_row(runs, target)])
    return cells


def by_cell(records: Sequence[Record]) -> dict[tuple[float, float, str], list[Record]]:
    """Records by batch size, epsilon and arm."""
    groups: dict[tuple[float, float, str], list[Record]] = {}
    for record in records:
        batch = record["config"]["privacy"]["expected_batch_size"]
        groups.setdefault((batch, record["epsilon"], record["arm"]), []).append(record)
    return groups


def best_runs(runs: Sequence[Record]) -> list[Record]:
    """The runs of one arm that went to the end, at the rate that is best at the end of the first seed's runs."""
    whole = [run for run in runs if run["steps"] == run["steps_of_the_schedule"]]
    if not whole:
        return []
    first = min(run["seed"] for run in whole)
    best = max((run for run in whole if run["seed"] == first), key=lambda run: score_at(run, run["steps"]))
    return [run for run in whole if learning_rate(run["config"]) == learning_rate(best["config"])]


def _row(runs: Sequence[Record], target: float | None) -> list[str]:
    tried = ", ".join(f"{rate:g}" for rate in sorted({learning_rate(run["config"]) for run in runs}))
    best = best_runs(runs)
    if not best:
        return [f"({tried})", "0", "not run to the end", "", "", ""]
    finals = [[run[key][-1][1] for run in best if run.get(key)] for key in _finals(best[0])]
    steps = [[stays_from(run[key], target) for run in best] for key in ("accuracy", "accuracy_of_last_iterate")]
    return [
        f"{learning_rate(best[0]['config']):g} ({tried})",
        str(len(best)),
        *(_mean(values) for values in finals),
        "; ".join(", ".join(str(step) for step in curve) for curve in steps) if target is not None else "",
        ", ".join(_overshot(run) for run in best),
    ]


def _finals(record: Record) -> tuple[str, str]:
    if record["accuracy"]:
        return "accuracy", "accuracy_of_last_iterate"
    return "loss", "loss_of_last_iterate"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def target_of(baselines: Sequence[Sequence[Record]]) -> float | None:
    """95% of the best baseline's mean final accuracy, averaged iterates or not."""
    finals = []
    for runs in baselines:
        best = best_runs(runs)
        for key in ("accuracy", "accuracy_of_last_iterate"):
            if values := [run[key][-1][1] for run in best if run.get(key)]:
                finals.append(statistics.fmean(values))
    return SHARE * max(finals) if finals else None


def stays_from(curve: Sequence[tuple[int, float]], target: float | None) -> int | str:
    """The first evaluated step from which the curve stays at the target."""
    reached: int | str = "never"
    for step, value in reversed(curve):
        if target is None or step == 0 or value < target:
            break
        reached = step
    return reached


def _overshot(run: Record) -> str:
    """How many slopes lie below -2, in bold where that is more than chance."""
    slopes = [slope for _, slope in run["advice/slope"]]
    count = sum(slope < -2 for slope in slopes)
    return f"**{count}**" if slopes and count >= alarm_from(len(slopes)) else str(count)


if __name__ == "__main__":
    flags.DEFINE_string("results", "experiments/studies/whitening/results/sst2", "Folder of the records.")
    command_line.run(main)
