"""The study of whitened coordinates: its table, its check of the advisor and its figures, from records made by hand."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from dp_rmt.reporting.palette import PICTURE_STYLE
from experiments.studies.methods.score import score_at
from experiments.studies.whitening import figures
from experiments.studies.whitening.advisor import AVERAGE, HALF_RATE, WHITENING, cases, contingency
from experiments.studies.whitening.table import best_runs, rows


def record(arm: str, rate: float, curve: list[float], *, seed: int = 0, steps: int | None = None) -> dict[str, Any]:
    """A run that was evaluated at every step; its last iterate is .1 worse than its average."""
    return {
        "arm": arm,
        "noise_multiplier": 0.5,
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


CALM = {"advice/slope": [(2, 1.0), (3, 0.5), (4, 1.0)]}


def test_the_advisor_is_right_where_half_the_rate_is_better() -> None:
    """Alarms: two of three slopes. They are compared at the last step that both runs have reached."""
    low, middle, high, lone = (
        record("dp_adam", 1.0, [0.5, 0.8, 0.7], steps=4),
        record("dp_adam", 2.0, [0.6, 0.7, 0.75, 0.9]) | CALM,
        record("dp_adam", 4.0, [0.6, 0.7, 0.5, 0.6]),
        record("whitened", 4.0, [0.6], steps=4),
    )
    found = [case for case in cases([low, middle, high, lone]) if case.remedy == HALF_RATE]
    assert [(case.rate, case.num_steps, case.num_overshot) for case in found] == [(2.0, 2, 0), (4.0, 3, 2)]
    np.testing.assert_allclose([case.gain for case in found], [-0.05, 0.3])
    assert contingency(found) == [
        [HALF_RATE, "yes", "1", "0", "2 of 2"],
        [HALF_RATE, "no", "0", "1", ""],
    ]


def test_the_advisor_is_right_where_whitening_or_the_average_is_better() -> None:
    """Whitening is compared at the best rates, seed by seed; the average with the last iterate of its own run."""
    worse = record("whitened", 4.0, [0.6, 0.6, 0.6, 0.6]) | CALM
    found = cases([*RECORDS[:2], RECORDS[2] | CALM, RECORDS[4], worse])
    whitening = [case for case in found if case.remedy == WHITENING]
    assert [(case.arm, case.rate, case.num_overshot) for case in whitening] == [("dp_adam", 1.0, 2)]
    np.testing.assert_allclose(whitening[0].gain, 0.1)
    averages = [case for case in found if case.remedy == AVERAGE]
    np.testing.assert_allclose([case.gain for case in averages], 0.1)
    assert [row[2:] for row in contingency(averages)] == [["3", "0", "3 of 5"], ["2", "0", ""]]
    text = record("dp_adam", 1.0, [0.0] * 6) | {"accuracy": [], "accuracy_of_last_iterate": []}
    np.testing.assert_allclose([case.gain for case in cases([text])], 0.1)  # of losses, less is better


def test_a_rate_that_is_half_of_another_by_its_digits_is_half_of_it() -> None:
    three = 0.1 + 0.2  # not twice .15
    found = cases([record("dp_adam", 0.15, [0.5]), record("dp_adam", three, [0.6])])
    assert [case.remedy for case in found].count(HALF_RATE) == 1


def test_the_figure_of_steps_has_every_arm_and_seed() -> None:
    assert figures.draw_steps([record("whitened", 8.0, [0.9])]) is None  # no baseline, no target
    figure = figures.draw_steps(RECORDS)
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")}
    assert set(lines) == {"dp_adam", "whitened"}
    assert lines["dp_adam"].get_xydata().tolist() == [[0.5 / 1024, 3.5]]  # steps 3 and 4
    assert list(lines["whitened"].get_ydata()) == [3]


def test_the_figure_of_curves_and_of_the_advisor() -> None:
    curves = figures.draw_curves(RECORDS)
    assert curves is not None
    assert {line.get_label() for line in curves.axes[0].lines} == {"dp_adam", "whitened"}
    assert figures.draw_advisor({"sst2": [RECORDS[2]]}) is None
    advisor = figures.draw_advisor({"sst2": RECORDS})
    assert advisor is not None
    alarms, calm = advisor.axes[0].lines[:2]
    np.testing.assert_allclose(alarms.get_xydata(), [[2 / 3, 0.1]])
    assert len(calm.get_xydata()) == 0


def test_the_figure_of_spectra_shows_the_matrix_that_whitening_changes_most() -> None:
    matrices = [{"path": f"layers/{name}/kernel", "layer": 0, "rows": 20, "cols": 20} for name in ("query", "value")]
    below, above = np.linspace(8, 1, 20), np.linspace(30, 1, 20)  # the edge is about 8.9

    def spectra(*noisy: Any) -> dict[str, Any]:
        step = {"step": 1, "noisy": [list(x) for x in noisy], "nonprivate/clean": [[1.0] * 20] * 2}
        return {"description": {"batch_size": 8}, "matrices": matrices, "spectra": [step]}

    with mpl.rc_context(PICTURE_STYLE):  # which puts titles to the left
        figure = figures.draw_spectra(spectra(below, below), spectra(below, above))
        titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.split(",")[0] for title in titles] == ["raw: value", "whitened: value"]
