"""Learning rates by short runs: the best lies between others, nothing runs twice, private losses are not looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dp_rmt.finetuning import rate_search
from dp_rmt.finetuning.rate_search import best_rate, choose_rates
from dp_rmt.finetuning.settings import Settings
from dp_rmt.training.metrics import read_metrics

STEPS = 2


@pytest.fixture
def config(make_config: Callable[..., Settings]) -> Settings:
    rates = {"noisy": {"train": {"learning_rate": 0.1}}, "higher": {"train": {"learning_rate": 1.0}}}
    return make_config({"privacy.sampling_seed": None, "privacy.noise_seed": None, "arms": rates})


def choose(config: Settings, tmp_path: Path, names: list[str] | None = None) -> dict:
    record = tmp_path / "rates.json"
    given = {"workdir": tmp_path / "runs", "record": record, "factors": [0.01, 1.0], "steps": STEPS}
    choose_rates(config, names=names, **given)
    return json.loads(record.read_text("utf-8"))


@pytest.mark.slow
def test_a_rate_is_as_good_as_its_own_short_run(
    config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All meet the same samples and noise. Two rates, since how others are found is tested below."""

    def two_rates(score: Callable[[float], float], centre: float, factors: Sequence[float]) -> tuple[float, dict]:
        scores = {centre * factor: score(centre * factor) for factor in factors}
        return max(scores, key=lambda rate: scores[rate]), scores

    monkeypatch.setattr(rate_search, "best_rate", two_rates)
    found = choose(config, tmp_path, ["noisy"])
    assert found.keys() == {"noisy"}
    assert "for public data: compares raw training losses" in capsys.readouterr().out
    assert "for public data" in found["noisy"]["is"]
    for folder in (tmp_path / "runs").iterdir():
        assert "it is for public data only" in (folder / "privacy.md").read_text()
    losses = found["noisy"]["nonprivate/loss"]
    assert list(losses) == ["0.001", "0.1"]
    assert losses[f"{found['noisy']['best']:g}"] == min(losses.values()) < max(losses.values())
    runs = {}
    for rate, loss in losses.items():
        lines = read_metrics(tmp_path / "runs" / f"noisy_lr{rate}" / "metrics.jsonl")
        runs[rate] = [line for line in lines if "nonprivate/loss" in line]
        assert [line["step"] for line in runs[rate]] == [1, 2]
        assert loss == pytest.approx(sum(line["nonprivate/loss"] for line in runs[rate]) / STEPS, rel=1e-4)
    for key in ("nonprivate/loss", "nonprivate/batch_size", "nonprivate/cosine_noisy"):
        assert runs["0.001"][0][key] == runs["0.1"][0][key]


def test_a_rate_at_which_a_run_diverges_is_the_worst() -> None:
    best, scores = best_rate(lambda rate: rate if rate < 5 else math.nan, 1.0, [1.0])
    assert best == 4.0
    assert scores == {1.0: 1.0, 0.5: 0.5, 2.0: 2.0, 4.0: 4.0, 8.0: -math.inf}
    with pytest.raises(ValueError, match="no learning rate of 1, 2 gave a finite score"):
        best_rate(lambda rate: math.nan, 1.0, [1.0, 2.0])


def test_arms_of_the_record_are_left_alone(config: Settings, tmp_path: Path) -> None:
    known = {"noisy": {"best": 0.1}}
    (tmp_path / "rates.json").write_text(json.dumps(known))
    assert choose(config, tmp_path, ["noisy"]) == known
    assert not (tmp_path / "runs").exists()


def test_an_unknown_arm_is_named(config: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'other' is none of the config's arms, noisy, higher"):
        choose(config, tmp_path, ["other"])


def test_private_losses_choose_nothing(config: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nonprivate_metrics=False"):
        choose(config.changed({"privacy.nonprivate_metrics": False}), tmp_path)
