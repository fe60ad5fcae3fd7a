"""The table of `experiments.structure`, from its records."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a column holds: a regular expression over the paths.
_KERNELS = {name: rf"attention/{name}/kernel" for name in ("query", "key", "value", "output")} | {
    "intermediate": "intermediate/kernel",
    "output of the layer": "layers/output/kernel",
    "all": "/kernel",
}
_FACTORS = {
    f"{factor}, {name}": rf"/{modules}_lora/{path}"
    for name, modules in (("query and value", "(query|value)"), ("all", r"\w+"))
    for factor, path in (("A", "lora_a/"), ("B", "lora_b/"), ("change of W", "product"))
}


def print_table(folder: Path, *, first_step: int) -> None:
    """Prints the records of a folder as Markdown, one table for LoRA and one without it.

    Args:
      folder: with the records.
      first_step: means are over the steps from this one on.
    """
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for columns, is_lora in ((_KERNELS, False), (_FACTORS, True)):
        chosen = {name: record for name, record in records.items() if ("_lora" in name) == is_lora}
        if chosen:
            print("\n| " + " | ".join(("run", "of the", "candidate", *columns)) + " |")
            print("|---|---|---|" + "--:|" * len(columns))
        for name, record in chosen.items():
            for row in rows(record, columns, first_step=first_step):
                print("| " + " | ".join((name, *row)) + " |")


def rows(record: dict[str, Any], columns: dict[str, str], *, first_step: int) -> Iterator[list[str]]:
    """A row for each candidate, of the gradient and of the first moment: mean cosines over matrices and steps."""
    steps = [step for step in record["steps"] if step["step"] >= first_step]
    for kind in ("gradient", "first_moment"):
        for candidate in steps[0][kind]:
            seen = [step[kind][candidate] for step in steps]
            means = [f"{mean_cosine(seen, pattern):.3f}" for pattern in columns.values()]
            yield [kind.replace("_", " "), candidate, *means]


def mean_cosine(seen: list[dict[str, list[float]]], pattern: str) -> float:
    """Over all matrices whose path has the pattern in it.

    >>> mean_cosine([{"layers/query/kernel": [0.1, 0.2]}, {"layers/query/kernel": [0.3, 0.4]}], "query")
    0.25
    """
    return statistics.fmean(
        cosine for step in seen for path, cosines in step.items() if re.search(pattern, path) for cosine in cosines
    )
