"""Learning rates by short runs: the best lies between others, nothing runs twice, private losses are not looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments.learning_rates import choose_rates
from experiments.rate_search import best_rate

STEPS = 2


@pytest.fixture
def config(make_config: Callable[..., ConfigDict]) -> ConfigDict:
    config = make_config({"optimizer.learning_rate": 0.05, "privacy.sampling_seed": None, "privacy.noise_seed": None})
    config = config.unlock()
    config.arms = {"noisy": {}, "higher": {"optimizer": {"learning_rate": 0.1}}}
    return config.lock()


def choose(config: ConfigDict, tmp_path: Path, names: list[str] | None = None) -> dict:
    record = tmp_path / "rates.json"
    choose_rates(
        config, names=names, workdir=tmp_path / "runs", record=record, factors=[0.5, 1.0], steps=STEPS
    )
    return json.loads(record.read_text("utf-8"))


def test_the_best_has_the_lowest_loss_and_a_worse_one_on_either_side(config: ConfigDict, tmp_path: Path) -> None:
    found = choose(config, tmp_path, ["noisy"])
    assert found.keys() == {"noisy"}
    losses = {float(rate): loss for rate, loss in found["noisy"]["nonprivate/loss"].items()}
    assert {0.025, 0.05} <= losses.keys()
    assert losses[found["noisy"]["best"]] == min(losses.values())
    assert min(losses) < found["noisy"]["best"] < max(losses)
    for rate, loss in losses.items():  # what the short run itself has written
        lines = (tmp_path / "runs" / f"noisy_lr{rate:g}" / "metrics.jsonl").read_text().splitlines()
        seen = [line["nonprivate/loss"] for line in map(json.loads, lines) if "nonprivate/loss" in line]
        assert len(seen) == STEPS
        assert loss == pytest.approx(sum(seen) / STEPS, rel=1e-4)


def test_a_rate_at_which_a_run_diverges_is_the_worst() -> None:
    best, scores = best_rate(lambda rate: rate if rate < 5 else math.nan, 1.0, [1.0])
    assert best == 4.0
    assert scores == {1.0: 1.0, 0.5: 0.5, 2.0: 2.0, 4.0: 4.0, 8.0: -math.inf}
    with pytest.raises(ValueError, match="no learning rate of 1, 2 gave a finite score"):
        best_rate(lambda rate: math.nan, 1.0, [1.0, 2.0])


def test_all_rates_meet_the_same_samples_and_noise(config: ConfigDict, tmp_path: Path) -> None:
    choose(config, tmp_path, ["noisy"])
    first = [
        next(line for line in map(json.loads, path.read_text().splitlines()) if line.get("step") == 1)
        for path in sorted((tmp_path / "runs").glob("*/metrics.jsonl"))
    ]
    assert len(first) > 2
    for key in ("nonprivate/loss", "nonprivate/batch_size", "nonprivate/cosine_noisy"):
        assert len({line[key] for line in first}) == 1


def test_arms_of_the_record_are_left_alone(config: ConfigDict, tmp_path: Path) -> None:
    known = {"noisy": {"best": 0.1}}
    (tmp_path / "rates.json").write_text(json.dumps(known))
    assert choose(config, tmp_path, ["noisy"]) == known
    assert not (tmp_path / "runs").exists()


def test_an_unknown_arm_is_named(config: ConfigDict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'other' is none of the config's arms, higher, noisy"):
        choose(config, tmp_path, ["other"])


def test_private_losses_choose_nothing(config: ConfigDict, tmp_path: Path) -> None:
    config.privacy.nonprivate_metrics = False
    with pytest.raises(ValueError, match="nonprivate_metrics=False"):
        choose(config, tmp_path)
