"""The verdict: what is said of which numbers, and how often it is said by chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from dp_rmt.reporting.advice import FALSE_ALARMS, advice, advice_lines, alarm_from
from dp_rmt.reporting.page import Run, write_report

FFN = "encoder/layers/intermediate/kernel"


def lines(slopes: list[float | None], ratio: float | None = None, **others: Any) -> list[dict[str, Any]]:
    found = [{"step": 0, "eval/dev/loss": 0.7} | others]
    for step, slope in enumerate([None, *slopes], start=1):
        found.append({"step": step, "advice/slope": slope})
        if ratio is not None:
            found[-1]["advice/top_over_edge"] = ratio
    return found


@pytest.mark.parametrize("steps", [1, 2, 7, 15, 30, 300, 3000])
def test_false_alarms_are_as_rare_as_promised_and_no_rarer_than_needed(steps: int) -> None:
    overshot = stats.binom(steps, stats.norm.cdf(-2.0))
    least = alarm_from(steps)
    assert overshot.sf(least - 1) <= FALSE_ALARMS
    assert overshot.sf(least - 2) > FALSE_ALARMS


def test_runs_of_noise_are_accused_at_the_stated_rate() -> None:
    """4000 runs of 30 slopes; the rate that the binomial gives is 0.46%, within 4 standard errors."""
    slopes = np.random.default_rng(0).standard_normal((4000, 30))
    accused = np.mean(np.sum(slopes < -2, axis=1) >= alarm_from(30))
    rate = stats.binom(30, stats.norm.cdf(-2.0)).sf(alarm_from(30) - 1)
    assert abs(accused - rate) < 4 * (rate / 4000) ** 0.5
    shown = [advice(lines(list(map(float, run)))) for run in slopes[:200]]
    assert sum(found.overshoots for found in shown if found) <= 5  # 0.9 are expected


WHITEN = "whiten the inputs (`config.whitening.where`), lower b1 (`config.optimizer`), average the iterates"


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (lines([-3.0] * 8 + [1.0] * 12), ["8 of 20 steps overshot (0.5 would by chance): " + WHITEN]),
        (
            lines([-3.0] * 8 + [1.0] * 12, 1.4),
            ["8 of 20", WHITEN, " or try half the learning rate (`config.train.learning_rate`)."],
        ),
        (
            lines([-3.0] * 8 + [1.0] * 12, **{"geometry/top_share": {FFN: [0.3, 0.9], "pooler/kernel": 0.7}}),
            [WHITEN, f"one direction has 90% of the inputs of `{FFN}`, so begin with whitening."],
        ),
        (
            lines([1.0] * 20, 1.4),
            ["None of 20 steps overshot and", "y₁/e is 1.4 or more in half", "can save steps (`config.denoise`)"],
        ),
        (
            lines([1.0] * 20, 1.4, **{"denoise/kept_rank": {FFN: [1]}}),
            ["denoising, which is on, can save steps (`config.denoise`)"],
        ),
        (
            lines([-2.5] * 3 + [1.0] * 17, 0.8),
            ["3 of 20 steps overshot (0.5 would by chance) and no gradient was seen", "0.8", "expected_batch_size"],
        ),
        (lines([1.0] * 20), ["None of 20 steps overshot; there is no matrix"]),
        (
            lines([], **{"geometry/top_share": {FFN: 0.9}}),
            [f"Before training: one direction has 90% of the inputs of `{FFN}`", "`config.whitening.where`"],
        ),
    ],
)
def test_what_is_said(metrics: list[dict[str, Any]], words: list[str]) -> None:
    found = advice(metrics)
    assert found is not None
    assert all(part in found.sentence for part in words), found.sentence


@pytest.mark.parametrize(
    ("config", "remedies"),
    [
        (
            {"whitening": {"where": "before_clipping"}, "optimizer": "adamw", "train": {"schedule": "constant"}},
            "lower b1 (`config.optimizer`), average the iterates (`config.train.average_iterates`) or try half "
            "the learning rate (`config.train.learning_rate`)",
        ),
        (
            {"optimizer": ["muon", {}], "train": {"average_iterates": 0.7}},
            "whiten the inputs (`config.whitening.where`) or try half the learning rate (`config.train.learning_rate`)"
            f"; one direction has 90% of the inputs of `{FFN}`, so begin with whitening",
        ),
        (
            {
                "whitening": {"where": "after_optimizer"},
                "optimizer": ["adamw", {"b1": 0.5}],
                "train": {"average_iterates": None, "schedule": "linear"},
            },
            "try half the learning rate (`config.train.learning_rate`)",
        ),
    ],
)
def test_what_is_switched_on_already_is_not_advised(config: dict[str, Any], remedies: str) -> None:
    metrics = lines([-3.0] * 8 + [1.0] * 12, **{"geometry/top_share": {FFN: 0.9}})
    assert advice_lines({"run": Run(metrics, config, {})}) == (
        f"Advice: 8 of 20 steps overshot (0.5 would by chance): {remedies}.\n"
    )
    of_layers = [{"step": 0, "geometry/top_share": {FFN: 0.9}}]
    assert bool(advice_lines({"run": Run(of_layers, config, {})})) == ("whitening" not in config)


@pytest.mark.parametrize(("where", "is_advised"), [("nowhere", True), ("before_clipping", False)])
def test_whitening_is_advised_below_the_noise_unless_it_is_on(where: str, is_advised: bool) -> None:
    (sentence,) = advice_lines({"run": Run(lines([1.0] * 20, 0.8), {"whitening": {"where": where}}, {})}).splitlines()
    whitening = "whiten the inputs (`config.whitening.where`); " if is_advised else ""
    assert f": {whitening}more data or a larger batch (`config.privacy.expected_batch_size`)" in sentence


def test_a_rate_is_called_too_high_where_two_fifths_of_the_steps_overshot() -> None:
    whitened = {
        "whitening": {"where": "before_clipping"},
        "optimizer": ["adamw", {"b1": 0.5}],
        "train": {"schedule": "linear"},
    }
    said = [advice(lines([-3.0] * count + [1.0] * (20 - count)), config=whitened) for count in (3, 4, 7, 8)]
    assert [found.overshoots for found in said] == [False, True, True, True]
    assert [found.is_too_fast for found in said] == [False, False, False, True]
    assert said[2].sentence.endswith("): at its best learning rate a run does so, too.")
    assert said[3].sentence.endswith("): try half the learning rate (`config.train.learning_rate`).")


def test_no_evidence_no_advice() -> None:
    assert advice([]) is None
    assert advice(lines([-9.0])) is None  # no number of slopes out of one is beyond chance
    assert advice([{"step": 0, "geometry/top_share": {FFN: 0.2}}]) is None
    assert advice(lines([None, None])) is None  # of a run whose updates were 0
    assert advice_lines({"plain": Run([{"step": 1, "seconds": 1.0}], {}, {})}) == ""


def test_a_few_gradients_above_the_noise_are_no_reason_to_denoise() -> None:
    metrics = lines([1.0] * 20, 0.8)
    for line in metrics[3:10]:
        line["advice/top_over_edge"] = 1.5
    assert "no gradient was seen to stand above the noise" in advice(metrics).sentence
    for line in metrics[10:16]:
        line["advice/top_over_edge"] = 1.5
    assert "can save steps" in advice(metrics).sentence


def test_shares_that_are_given_take_the_place_of_those_in_the_metrics() -> None:
    logged = lines([-3.0] * 20, **{"geometry/top_share": {FFN: 0.9}})
    assert advice(logged, {FFN: 0.2}).top_share == 0.2
    assert "begin with" not in advice(logged, {FFN: 0.2}).sentence


def test_two_arms_have_a_line_each_and_the_page_shows_the_sentences_and_the_slopes(tmp_path: Any) -> None:
    runs = {
        "plain": Run(lines([-3.0] * 8 + [1.0] * 12), {}, {}),
        "white": Run(lines([1.0] * 20, 1.4), {}, {}),
        "none": Run(lines([]), {}, {}),
    }
    first, second = advice_lines(runs).splitlines()
    assert first.startswith("Advice for plain: 8 of 20 steps overshot")
    assert second.startswith("Advice for white: None of 20 steps overshot")
    assert advice_lines({"plain": runs["plain"]}).startswith("Advice: 8 of 20")
    write_report(tmp_path / "report.html", runs)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "What limits the run" in page
    assert "<strong>plain</strong>: 8 of 20 steps overshot" in page
    assert "Line plot of z of the last step over updates. plain: -3 at update 2, 1 at update 21;" in page
    assert "overshot below: -2" in page
    write_report(tmp_path / "report.html", {"none": runs["none"]})
    assert "What limits the run" not in (tmp_path / "report.html").read_text(encoding="utf-8")
