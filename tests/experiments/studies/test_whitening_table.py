"""The table of whitened coordinates: rates, targets, steps and overshooting, from records made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.studies.methods.score import score_at
from experiments.studies.whitening.table import best_runs, rows


def record(arm: str, rate: float, curve: list[float], *, seed: int = 0, steps: int | None = None) -> dict[str, Any]:
    """A run that was evaluated at every step; its last iterate is .1 worse than its average."""
    return {
        "arm": arm,
        "epsilon": 8.0,
        "seed": seed,
        "config": {"privacy": {"expected_batch_size": 1024}, "train": {"learning_rate": rate}},
        "steps": len(curve),
        "steps_of_the_schedule": steps or len(curve),
        "accuracy": list(enumerate([0.5, *curve])),
        "accuracy_of_last_iterate": list(enumerate([0.5, *(value - 0.1 for value in curve)])),
        "loss": [(len(curve), 1.0)],
        "loss_of_last_iterate": [(len(curve), 1.1)],
        "nonprivate/loss": [(step, 2.0 - step / 10) for step in range(1, len(curve) + 1)],
        "advice/slope": [(2, -3.0), (3, -4.0), (4, 1.0)],
    }


RECORDS = [
    record("dp_adam", 1.0, [0.6, 0.7, 0.8, 0.8]),
    record("dp_adam", 2.0, [0.6, 0.7, 0.7, 0.7]),
    record("dp_adam", 1.0, [0.6, 0.78, 0.7, 0.82], seed=1),
    record("dp_adam_b5", 4.0, [0.5, 0.6], steps=4),
    record("whitened", 8.0, [0.77, 0.7, 0.8, 0.9]),
]


def test_rows_say_rates_scores_steps_and_overshooting() -> None:
    """The target is 95% of .81, the baseline's mean final accuracy: .7695."""
    table = rows(RECORDS)
    assert [row[2] for row in table] == ["dp_adam", "dp_adam_b5", "whitened"]
    assert table[0] == [
        *("1024", "8", "dp_adam", "1 (1, 2)", "2", "0.810 ± 0.014", "0.710 ± 0.014"),
        *("3, 4; never, never", "**2**, **2**"),
    ]
    assert table[1][3:6] == ["(4)", "0", "not run to the end"]
    assert table[2][5:8] == ["0.900", "0.800", "3; 4"]


def test_the_rate_is_chosen_by_the_first_seed() -> None:
    runs = [run for run in RECORDS if run["arm"] == "dp_adam"]
    assert [(run["seed"], run["config"]["train"]["learning_rate"]) for run in best_runs(runs)] == [(0, 1.0), (1, 1.0)]


def test_a_text_task_is_scored_by_its_last_training_losses() -> None:
    text = record("dp_adam", 1.0, [0.0] * 6) | {"accuracy": [], "accuracy_of_last_iterate": []}
    assert score_at(text, 6) == pytest.approx(-(2.0 - 0.4))  # steps 2 to 6
    assert rows([text])[0][5:8] == ["1.000", "1.100", ""]
