"""Membership scores and rates with their intervals; exposure."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dp_rmt.auditing import exposure, membership

DRAWS = 300
TOO_MANY = int(stats.binom.isf(1e-4, DRAWS, 0.06))
"""Intervals at 95% may miss as often as one at 94% does but once in 10,000 test suites: DeLong's is asymptotic."""


def test_scores():
    losses, base = np.array([1.0, 3.0]), np.array([4.0, 3.5])
    np.testing.assert_array_equal(membership.loss_scores(losses), [-1.0, -3.0])
    np.testing.assert_array_equal(membership.relative_loss_scores(losses, base), [3.0, 0.5])
    with pytest.raises(ValueError, match=r"losses of shape \(2,\) against base losses of shape \(1,\)"):
        membership.relative_loss_scores(losses, base[:1])


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_min_k_is_the_mean_of_the_least_probable_tokens(share):
    rng = np.random.default_rng(0)
    log_probabilities, is_target = -rng.exponential(size=(8, 30)), rng.random((8, 30)) < 0.7
    log_probabilities[~is_target] = -1e9  # whatever stands where nothing counts
    found = membership.min_k_scores(log_probabilities, is_target, share=share)
    for row in range(8):
        values = sorted(log_probabilities[row][is_target[row]])
        assert found[row] == pytest.approx(np.mean(values[: max(int(share * len(values)), 1)]))


def test_min_k_refuses_examples_without_targets():
    with pytest.raises(ValueError, match="example 1 has no target token"):
        membership.min_k_scores(np.zeros((2, 2)), np.array([[True, False], [False, False]]))
    with pytest.raises(ValueError, match="share must be in"):
        membership.min_k_scores(np.zeros((1, 2)), np.ones((1, 2), bool), share=0.0)


def test_auc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(1)
    members, others = rng.integers(0, 6, 40) + 1.0, rng.integers(0, 6, 30)
    pairs = np.sign(members[:, None] - others)
    assert membership.auc(members, others).value == pytest.approx(np.mean((pairs + 1) / 2), rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_auc_interval_holds_the_true_area_as_often_as_stated(shift):
    rng, missed = np.random.default_rng(2), 0
    truth = stats.norm.cdf(shift / np.sqrt(2))
    for _ in range(DRAWS):
        interval = membership.auc(rng.standard_normal(80) + shift, rng.standard_normal(120))
        missed += not interval.low <= truth <= interval.high
        assert interval.low < interval.value < interval.high
    assert 2 <= missed <= TOO_MANY


def test_auc_of_separated_scores_is_not_called_certain():
    interval = membership.auc(np.arange(10) + 100.0, np.arange(50))
    assert interval == (1.0, pytest.approx(0.025 ** (1 / 10)), 1.0)
    assert membership.auc(np.arange(10) - 100.0, np.arange(50)).high == pytest.approx(1 - 0.025**0.1)
    with pytest.raises(ValueError, match="two scores or more on either side, got 1"):
        membership.auc(np.ones(1), np.ones(5))


@pytest.mark.parametrize("fpr", [0.001, 0.01])
def test_rates_at_a_low_false_positive_rate(fpr):
    """Against the definition; 20,000 scores, so that 0.1% is 20 of them."""
    rng = np.random.default_rng(3)
    members, others = rng.standard_normal(5000) + 2, rng.standard_normal(20_000)
    found = membership.tpr_at_fpr(members, others, fpr)
    assert found.false_positive_rate.value == fpr
    assert np.sum(others > found.threshold) == round(20_000 * fpr)
    expected = stats.norm.sf(stats.norm.isf(fpr) - 2)
    assert found.true_positive_rate.value == pytest.approx(expected, rel=0.15)  # the threshold's own error
    at_threshold = stats.norm.sf(found.threshold - 2)
    assert found.true_positive_rate.low < at_threshold < found.true_positive_rate.high
    assert found.false_positive_rate.low < stats.norm.sf(found.threshold) < found.false_positive_rate.high


def test_false_positive_interval_holds_the_rate_of_a_chosen_threshold_as_often_as_stated():
    rng, missed = np.random.default_rng(4), 0
    for _ in range(DRAWS):
        found = membership.tpr_at_fpr(np.zeros(1), rng.random(500), 0.01)
        rate = found.false_positive_rate
        missed += not rate.low <= 1 - found.threshold <= rate.high
    assert missed <= stats.binom.isf(1e-4, DRAWS, 0.05)


def test_few_others_prove_little():
    found = membership.tpr_at_fpr(np.ones(50), np.zeros(100), 0.001)
    assert found.true_positive_rate.value == 1
    assert found.false_positive_rate == (0.0, 0.0, pytest.approx(1 - 0.025 ** (1 / 100)))
    with pytest.raises(ValueError, match="with scores on both sides"):
        membership.tpr_at_fpr(np.ones(50), np.zeros(0), 0.01)


def test_exact_exposure_is_the_bits_of_the_rank():
    others = np.arange(1.0, 1024)
    assert exposure.exact_exposure(0.5, others) == 10.0
    assert exposure.exact_exposure(1.5, others) == 9.0
    assert exposure.exact_exposure(1.0, others) == 9.0  # a tie counts against the canary
    assert exposure.exact_exposure(5000.0, others) == 0.0


@pytest.mark.parametrize("shape", [-4.0, 0.0, 3.0])
def test_sampled_exposure_extends_beyond_the_samples(shape):
    """5,000 samples of a skew-normal, and a canary as rare as one of a million: 20 bits where ranks show 12."""
    rng = np.random.default_rng(5)
    losses = 70 + 9 * stats.skewnorm.rvs(shape, size=5000, random_state=rng)
    rare = 70 + 9 * stats.skewnorm.ppf(2.0**-20, shape)
    assert exposure.sampled_exposure(rare, losses) == pytest.approx(20, abs=3)
    assert exposure.sampled_exposure(float(np.median(losses)), losses) == pytest.approx(1, abs=0.1)
    assert exposure.exact_exposure(float(np.quantile(losses, 0.01)), losses) == pytest.approx(
        exposure.sampled_exposure(float(np.quantile(losses, 0.01)), losses), abs=0.4
    )


def test_exposure_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="losses of 100 other secrets or more, got 3"):
        exposure.sampled_exposure(1.0, np.ones(3))
    with pytest.raises(ValueError, match="all sampled losses are equal"):
        exposure.sampled_exposure(1.0, np.ones(200))
    with pytest.raises(ValueError, match="not finite"):
        exposure.exact_exposure(np.nan, np.ones(3))
