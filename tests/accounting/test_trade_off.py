"""The trade-off curve against closed forms, an explicit test of a subsampled step, and one point of its own curve."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dp_rmt.accounting import Truncation, epsilon, largest_true_positive_rate, trade_off


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.7, 3.0])
@pytest.mark.parametrize("num_steps", [1, 100])
@pytest.mark.parametrize("false_positive_rate", [1e-3, 0.01, 0.1, 0.5, 0.9])
def test_full_batches_have_the_gaussian_trade_off_function(mu, num_steps, false_positive_rate):
    """Dong, Roth & Su 2022: 1 - G_mu(a) = Phi(mu + Phi^-1(a)) with mu = sqrt(T) / sigma."""
    exact = stats.norm.cdf(mu + stats.norm.ppf(false_positive_rate))
    rate = largest_true_positive_rate(
        false_positive_rate=false_positive_rate,
        noise_multiplier=math.sqrt(num_steps) / mu,
        sampling_probability=1.0,
        num_steps=num_steps,
    )
    assert exact - 1e-9 <= rate <= exact + 1e-3


def test_a_gaussian_of_epsilon_8_detects_a_quarter_not_all():
    """What one point (8, 1e-5) of the curve says is 100%; the curve itself says a quarter."""
    run = {"noise_multiplier": 1 / 1.66603, "sampling_probability": 1.0, "num_steps": 1}
    assert epsilon(delta=1e-5, **run) == pytest.approx(8.0, abs=0.01)
    assert largest_true_positive_rate(false_positive_rate=0.01, **run) == pytest.approx(0.2545, abs=1e-3)


def test_one_subsampled_step_is_met_by_the_likelihood_ratio_test():
    """Neyman & Pearson: its most powerful test thresholds z, as the ratio of densities grows with z."""
    sigma, q = 0.8, 0.2
    for a in (0.001, 0.01, 0.1):
        threshold = sigma * stats.norm.isf(a)
        power = (1 - q) * a + q * stats.norm.sf((threshold - 1) / sigma)
        rate = largest_true_positive_rate(
            false_positive_rate=a, noise_multiplier=sigma, sampling_probability=q, num_steps=1
        )
        assert power - 1e-9 <= rate <= power + 1e-4


@pytest.mark.parametrize("truncation", [None, pytest.param(Truncation(67_349, 1160), marks=pytest.mark.slow)])
def test_is_never_above_what_one_point_of_the_curve_allows(truncation):
    run = {"noise_multiplier": 0.7722, "sampling_probability": 1000 / 67_349, "num_steps": 202}
    run["truncation"] = truncation
    delta = 4.88e-6
    spent = epsilon(delta=delta, **run)
    rates = []
    for a in (0.001, 0.01, 0.1):
        rates.append(largest_true_positive_rate(false_positive_rate=a, **run))
        assert a < rates[-1] <= math.exp(spent) * a + delta
    assert np.all(np.diff(rates) > 0)


def test_without_noise_everything_is_detected():
    rate = largest_true_positive_rate(
        false_positive_rate=0.01, noise_multiplier=0.0, sampling_probability=0.1, num_steps=1
    )
    assert rate == 1.0


@pytest.mark.parametrize("false_positive_rate", [0.0, 1.0, -0.1, math.nan])
def test_refuses_what_is_no_rate(false_positive_rate):
    with pytest.raises(ValueError, match="false_positive_rate must be in"):
        largest_true_positive_rate(
            false_positive_rate=false_positive_rate, noise_multiplier=1.0, sampling_probability=0.1, num_steps=1
        )


def test_what_was_asked_before_is_not_composed_again(monkeypatch):
    """A run asks the same when it is announced, when it ends and when it is asked about."""
    run = {"noise_multiplier": 1.25, "sampling_probability": 0.25, "num_steps": 3, "false_positive_rate": 0.0125}
    found = largest_true_positive_rate(**run)
    monkeypatch.setattr(trade_off, "composed_privacy_loss", None)
    assert largest_true_positive_rate(**run) == found
    with pytest.raises(TypeError):
        largest_true_positive_rate(**run | {"num_steps": 4})
