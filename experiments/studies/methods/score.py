"""What a learning rate is chosen by, and what the best of several runs is."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from typing import Any

LAST_STEPS = 5
"""The number of last steps whose training losses are averaged where there is no accuracy."""


def score_at(record: Mapping[str, Any], step: int) -> float:
    """What a rate is chosen by: accuracy at a step; of a text task minus the mean training loss of five steps to it."""
    accuracy = dict(record["accuracy"])
    if step in accuracy:
        return float(accuracy[step])
    return -statistics.fmean(loss for at, loss in record["nonprivate/loss"] if step - LAST_STEPS < at <= step)


def scored_split(evaluated: Collection[str]) -> str:
    """The split whose scores a record has: dev, or the first that is evaluated where dev is trained on (DART)."""
    return "dev" if "dev" in evaluated else next(iter(evaluated))
