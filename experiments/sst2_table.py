"""The table of the SST-2 study, from its records; prints Markdown.

python -m experiments.sst2_table --results=experiments/results/sst2_minilm
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from absl import app, flags

_RESULTS = flags.DEFINE_string("results", "experiments/results/sst2_minilm", "Folder of the records.")

_COLUMNS = (
    "epsilon", "arm", "learning rate", "seed", "steps", "final accuracy", "best accuracy", "steps to 75%",
    "cosine, noisy", "cosine, denoised", "seconds per step",
)  # fmt: skip


def main(argv: list[str]) -> None:
    """Prints a row for each record."""
    del argv
    records = [json.loads(path.read_text()) for path in sorted(Path(_RESULTS.value).glob("*.json"))]
    records.sort(key=_order)
    print("| " + " | ".join(_COLUMNS) + " |")
    print("|" + "---|" * len(_COLUMNS))
    for record in records:
        print("| " + " | ".join(_row(record)) + " |")


def _order(record: dict[str, Any]) -> tuple[float, bool, float]:
    config = record["config"]
    return -record["epsilon"], not config["denoise"]["enabled"], config["optimizer"]["learning_rate"]


def _row(record: dict[str, Any]) -> list[str]:
    accuracy = [(step, value) for step, value in record["accuracy"] if step > 0]
    reached = next((str(step) for step, value in accuracy if value >= 0.75), "not reached")
    total, done = record["steps_of_the_schedule"], record["steps"]
    return [
        f"{record['epsilon']:g}",
        "denoised" if record["config"]["denoise"]["enabled"] else "noisy",
        f"{record['config']['optimizer']['learning_rate']:g}",
        str(record["seed"]),
        str(done) if done == total else f"{done} of {total}",
        f"{accuracy[-1][1]:.3f}",
        f"{max(value for _, value in accuracy):.3f}",
        reached,
        *(f"{_mean(record[f'nonprivate/cosine_{stage}']):.3f}" for stage in ("noisy", "denoised")),
        f"{statistics.median(value for _, value in record['seconds_per_step']):.0f}",
    ]


def _mean(curve: list[tuple[int, float]]) -> float:
    return statistics.fmean(value for _, value in curve)


if __name__ == "__main__":
    app.run(main)
