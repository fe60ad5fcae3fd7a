"""The study of units of privacy: its table, from records made by hand."""

from __future__ import annotations

from typing import Any

from experiments.studies.units.table import COLUMNS, rows


def record(arm: str, rate: float, loss: float, *, steps: int = 6, column: str | None = None) -> dict[str, Any]:
    batch, per_user = (64, 4) if column else (256, 1)
    privacy = {"expected_batch_size": batch, "rows_per_user": per_user}
    return {
        "arm": arm,
        "seed": 0,
        "noise_multiplier": 0.64,
        "config": {"data": {"user_column": column}, "privacy": privacy, "train": {"learning_rate": rate}},
        "steps": steps,
        "steps_of_the_schedule": 6,
        "accuracy": [],
        "loss": [[0, 4.0], [steps, loss]],
        "nonprivate/loss": [[step, loss + 0.1] for step in range(1, steps + 1)],
    }


def test_the_table_has_a_row_for_each_whole_run_and_the_best_arm_first() -> None:
    records = [
        record("person", 0.2, 1.5, column="name"),
        record("person", 0.1, 1.9, steps=2, column="name"),
        record("row", 0.4, 1.0),
        record("under way", 0.4, 0.5, steps=2),
    ]
    cells = rows(records)
    assert cells == [
        ["row", "256", "1", "0.00250", "0.4 (0.4)", "1", "1.000", "1.100"],
        ["person", "64", "at most 4", "0.01000", "0.2 (0.1, 0.2)", "1", "1.500", "1.600"],
    ]
    assert {len(row) for row in cells} == {len(COLUMNS)}
