"""Prints the table of the study of methods, from its records, as Markdown.

python -m experiments.studies.methods.table --results=experiments/studies/methods/results/sst2
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dp_rmt.finetuning import command_line
from dp_rmt.reporting.records import learning_rate, markdown_table, read_records

_SHARE = 0.95
_COLUMNS = (
    "batch",
    "epsilon",
    "arm",
    "learning rate (tried)",
    "seeds",
    "final accuracy",
    "steps to the target",
    "cosine of gradient, denoised, step",
    "seconds per step",
)

Record = dict[str, Any]


def main(argv: list[str]) -> None:
    """Prints a row for each arm, at the learning rate that was chosen for it."""
    del argv
    records, baseline = read_records(Path(flags.FLAGS.results)), flags.FLAGS.baseline
    rates = chosen_rates(records)
    cells = []
    for (batch, epsilon), group in sorted(_grouped(records, lambda r: (_batch(r), r["epsilon"])).items(), reverse=True):
        arms = _grouped(group, lambda r: r["arm"])
        target = _target(arms.get(baseline, []), rates[batch, baseline])
        cells += [
            [f"{batch:g}", f"{epsilon:g}", arm, *row(runs, target, rates[batch, arm])] for arm, runs in arms.items()
        ]
    print(markdown_table(_COLUMNS, cells))
    print(f"\nThe target is {_SHARE:.0%} of the final accuracy of {baseline} at the same batch and epsilon.")


def chosen_rates(records: Sequence[Record]) -> dict[tuple[float, str], float]:
    """The learning rates that `experiments.studies.methods.study` chose, ``(batch size, arm) -> rate``.

    The study chooses at one epsilon and one seed, those of the records with the most rates, after the steps that all of
    these runs have.
    """
    chosen = {}
    for key, runs in _grouped(records, lambda r: (_batch(r), r["arm"])).items():
        candidates = max(_grouped(runs, lambda r: (r["epsilon"], r["seed"])).values(), key=len)
        step = min(run["accuracy"][-1][0] for run in candidates)
        reached = {_rate(run): dict(run["accuracy"]).get(step, 0.0) for run in candidates}
        chosen[key] = max(reached, key=reached.__getitem__)
    return chosen


def row(runs: Sequence[Record], target: float | None, rate: float) -> list[str]:
    """The cells of an arm after its name.

    Args:
      runs: runs of one arm, batch size and epsilon: whole runs, and those that stopped where the rate was chosen.
      target: the accuracy whose first step is looked for; None where there is no baseline.
      rate: the chosen learning rate; runs at other rates are only named as tried.

    Returns:
      One text for each column.
    """
    rates = sorted({_rate(run) for run in runs})
    whole = _whole(runs, rate)
    tried = ", ".join(f"{rate:g}" for rate in rates)
    if not whole:
        return [f"{rate:g} ({tried})", "0", *["not run to the end"] * 2, "", ""]
    finals = [run["accuracy"][-1][1] for run in whole]
    reached = [_first_step(run["accuracy"], target) for run in whole] if target is not None else []
    spread = f" ± {statistics.stdev(finals):.3f}" if len(finals) > 1 else ""
    cosines = [_mean([value for run in whole for _, value in run[f"nonprivate/cosine_{x}"]]) for x in _STAGES]
    return [
        f"{rate:g} ({tried})",
        str(len(whole)),
        f"{statistics.fmean(finals):.3f}{spread}",
        ", ".join("never" if step is None else str(step) for step in reached),
        ", ".join(cosines),
        f"{statistics.median(value for run in whole for _, value in run['seconds_per_step']):.0f}",
    ]


_STAGES = ("noisy", "denoised", "update")


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}" if values else "-"


def _whole(runs: Sequence[Record], rate: float) -> list[Record]:
    return [run for run in runs if run["steps"] == run["steps_of_the_schedule"] and _rate(run) == rate]


def _target(runs: Sequence[Record], rate: float) -> float | None:
    finals = [run["accuracy"][-1][1] for run in _whole(runs, rate)]
    return _SHARE * statistics.fmean(finals) if finals else None


def _first_step(curve: Sequence[tuple[int, float]], target: float) -> int | None:
    return next((step for step, value in curve if step > 0 and value >= target), None)


def _batch(record: Record) -> float:
    return record["config"]["privacy"]["expected_batch_size"]


def _rate(record: Record) -> float:
    return learning_rate(record["config"])


def _grouped(records: Sequence[Record], key: Any) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


if __name__ == "__main__":
    flags.DEFINE_string("results", "experiments/studies/methods/results/sst2", "Folder of the records.")
    flags.DEFINE_string("baseline", "dp_adam", "The arm whose final accuracy sets the target.")
    command_line.run(main)
