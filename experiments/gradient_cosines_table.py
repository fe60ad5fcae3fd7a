"""The table of the cosines, from their records; prints Markdown.

python -m experiments.gradient_cosines_table --results=experiments/studies/gradient_cosines/results
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from absl import app, flags

_COLUMNS = (
    "batch",
    "candidate",
    "cosine to the clean gradient",
    "at step 1",
    "at the last step",
    "worst matrix, to noisy",
    "cosine to the clean first moment",
    "CPU seconds",
    "share of a step's",
)


def main(argv: list[str]) -> None:
    """Prints a row for each candidate of each record."""
    del argv
    records = [json.loads(path.read_text()) for path in sorted(Path(flags.FLAGS.results).glob("*.json"))]
    print("| " + " | ".join(_COLUMNS) + " |")
    print("|" + "---|" * len(_COLUMNS))
    for record in sorted(records, key=lambda record: record["description"]["batch_size"]):
        for name in record["steps"][0]["candidates"]:
            print("| " + " | ".join(row(record, name)) + " |")


def row(record: dict[str, Any], name: str) -> list[str]:
    """Means over the steps of what a record has of one candidate; processor seconds are medians without the first."""
    seen = [step["candidates"][name] for step in record["steps"]]
    cosines = [numbers["nonprivate/cosine"] for numbers in seen]
    # The first step compiles.
    seconds = statistics.median(numbers["cpu_seconds"] for numbers in seen[1:] or seen)
    whole = statistics.median(step["cpu_seconds"] for step in record["steps"][1:] or record["steps"])
    return [
        f"{record['description']['batch_size']:g}",
        name,
        *(f"{value:.3f}" for value in (statistics.fmean(cosines), cosines[0], cosines[-1])),
        f"{min(numbers['nonprivate/worst_gain'] for numbers in seen):+.3f}",
        f"{statistics.fmean(numbers['nonprivate/cosine_to_first_moment'] for numbers in seen):.3f}",
        f"{seconds:.2f}",
        f"{100 * seconds / whole:.1f}%",
    ]


if __name__ == "__main__":  # flags are defined here, so that other programs and tests can import the rest
    flags.DEFINE_string("results", "experiments/studies/gradient_cosines/results", "Folder of the records.")
    app.run(main)
