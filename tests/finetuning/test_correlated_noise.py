"""The program with correlated noise: its plan, what it refuses, and a run that is asked again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dp_rmt import accounting
from dp_rmt.accounting import Repetitions
from dp_rmt.correlated_noise import CorrelatedNoiseLevel, square_root
from dp_rmt.finetuning.bands import compared_bands
from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.door import finetune_with, load_finetuned
from dp_rmt.finetuning.plan import build_mechanism, plan
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.sweep.privacy import cost_of_choosing
from dp_rmt.finetuning.sweep.spent_runs import SpentRun

QUICK = {"privacy.accountant": "rdp", "privacy.epsilon": 8.0, "privacy.noise_bands": 4}


def test_the_plan_says_that_noise_is_correlated() -> None:
    settings = Settings().changed(QUICK)
    mechanism, delta = build_mechanism(settings, 600)
    assert mechanism.noise_strategy == square_root(4)
    assert mechanism.epsilon(28, delta) == pytest.approx(8.0, rel=1e-3)
    assert f"noise {mechanism.noise_multiplier:.3g} correlated over 4 steps, epsilon 8" in plan(settings, 600)
    without, _ = build_mechanism(settings.changed({"privacy.epsilon": float("inf")}), 600)
    assert without.noise_strategy is None


@pytest.mark.parametrize(
    "change", [{"data.user_column": "who", "data.task": "labelled_table"}, {"privacy.clip_quantile": 0.5}]
)
def test_what_is_not_derived_is_refused_by_its_key(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"config\.privacy\.noise_bands=4 .*{re.escape(next(iter(change)))}"):
        arm_settings(Settings().changed({**QUICK, **change}))


def test_more_bands_than_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="let it have at most 9 bands"):
        build_mechanism(Settings().changed({**QUICK, "privacy.noise_bands": 10}), 600)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_a_run_is_trained_and_asked_again(make_config: Callable[..., Settings], tmp_path: Path) -> None:
    settings = make_config({"privacy.noise_bands": 2, "train.advice": True})
    tuned = finetune_with(settings, tmp_path / "run")
    again = load_finetuned(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, tuned.params, again.params)
    assert tuned.privacy["noise_coefficients"] == [1.0, 0.5]
    assert "advice/slope" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_the_table_of_bands_is_that_of_the_mechanisms() -> None:
    run = {"num_examples": 800, "batch_size": 200, "num_steps": 16, "epsilon": 4.0, "delta": 1e-4}
    head, *lines = [re.split(r"\s{2,}", line.strip()) for line in compared_bands(**run).splitlines() if line.strip()]
    rows = {row[0]: row for row in lines if row[0].isdigit()}
    assert head[0] == "bands"
    assert list(rows) == ["1", "2", "4"]
    assert rows["1"][2:5] == ["1.000"] * 3
    strategy, multipliers = square_root(4), [float(rows[bands][1]) for bands in ("4", "1")]
    gain = multipliers[0] * strategy.prefix_sum_error(16) / (multipliers[1] * 8.5**0.5)
    assert float(rows["4"][2]) == pytest.approx(gain, rel=2e-3)
    moment = CorrelatedNoiseLevel(strategy.column_norm, strategy, 16).of_decayed_sum(0.9)(15)
    alone = sum(0.81**k for k in range(16)) ** 0.5
    assert float(rows["4"][4]) == pytest.approx(multipliers[0] * float(moment) / (multipliers[1] * alone), rel=2e-3)


def test_runs_with_correlated_noise_are_composed_of_their_rounds(statement: dict[str, Any]) -> None:
    correlated = {**statement, "noise_coefficients": [1.0, 0.5], "delta_of_truncation": 0.0}
    run = SpentRun("job", correlated, {"privacy": {}})
    rounds = -(-statement["num_steps"] // 2)
    assert run.num_rounds == rounds
    choice = cost_of_choosing([run, run])
    expected = accounting.epsilon(
        noise_multiplier=statement["noise_multiplier"],
        delta=statement["delta"],
        sampling_probability=2 * statement["sampling_probability"],
        num_steps=2 * rounds,
    )
    assert choice.epsilon == pytest.approx(expected, rel=1e-3)
    assert "not derived" in cost_of_choosing([run, run], Repetitions(3.0, 1.0)).text
