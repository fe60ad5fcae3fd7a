"""Learning rates by short runs: the best lies between others, nothing runs twice, private losses are not looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments.learning_rates import choose_rates

STEPS = 2


@pytest.fixture
def config(make_config: Callable[..., ConfigDict]) -> ConfigDict:
    config = make_config({"optimizer.learning_rate": 0.05}).unlock()
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
