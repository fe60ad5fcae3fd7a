"""Lower bounds on epsilon: below the truth of mechanisms with a known epsilon, zero on null scores, the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dp_rmt.auditing.canaries import correct_guesses, guess_by_rank
from dp_rmt.auditing.lower_bounds import (
    Counts,
    best_threshold,
    clopper_pearson,
    count,
    one_run_epsilon,
    one_run_p_value,
    repeated_runs_epsilon,
)

DRAWS = 200
FALSE_BOUNDS = int(stats.binom.isf(1e-4, DRAWS, 0.05))
"""Of DRAWS bounds at 95% confidence so many may exceed the truth but once in 10,000 test suites."""


def gaussian_epsilon(mu, delta):
    """The epsilon of a Gaussian mechanism of sensitivity mu and noise 1 (Balle & Wang 2018, theorem 8)."""
    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        found = stats.norm.cdf(mu / 2 - middle / mu) - math.exp(middle) * stats.norm.cdf(-mu / 2 - middle / mu)
        low, high = (middle, high) if found > delta else (low, middle)
    return high


def test_p_value_is_the_binomial_tail_and_what_delta_adds():
    """Against the sum of the definition, term by term."""
    m, r, v, epsilon, delta = 40, 20, 15, 0.7, 1e-3
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    tail = [sum(math.comb(r, k) * right**k * (1 - right) ** (r - k) for k in range(v - i, r + 1)) for i in range(v + 1)]
    expected = tail[0] + 2 * m * delta * max((tail[i] - tail[0]) / i for i in range(1, v + 1))
    assert one_run_p_value(m, r, v, epsilon=epsilon, delta=delta) == pytest.approx(expected, rel=1e-9)
    assert one_run_p_value(m, r, v, epsilon=epsilon, delta=0.0) == pytest.approx(tail[0], rel=1e-9)


def test_bound_is_where_the_p_value_is_what_confidence_leaves():
    for delta in (0.0, 1e-5):
        bound = one_run_epsilon(500, 300, 280, delta=delta, confidence=0.9)
        assert one_run_p_value(500, 300, 280, epsilon=bound, delta=delta) == pytest.approx(0.1, abs=1e-6)
    assert one_run_epsilon(500, 300, 280, delta=1e-5) < one_run_epsilon(500, 300, 280, delta=0.0)
    assert one_run_epsilon(10, 0, 0, delta=1e-5) == 0.0


def test_clopper_pearson_covers_whatever_the_probability():
    """Exactly, by summing over all outcomes: never less than the confidence; and each end errs as often as it may."""
    low, high = clopper_pearson(np.arange(31), 30, confidence=0.9)
    for p in np.linspace(0.01, 0.99, 50):
        covered = stats.binom.pmf(np.arange(31), 30, p)[(low <= p) & (p <= high)].sum()
        assert covered >= 0.9
    assert stats.binom.sf(20 - 1, 30, low[20]) == pytest.approx(0.05)
    assert stats.binom.cdf(20, 30, high[20]) == pytest.approx(0.05)


def test_null_scores_of_one_run_give_about_zero():
    """Scores that know nothing: a positive bound at most in 5% of the draws, and then a small one."""
    rng = np.random.default_rng(0)
    bounds = []
    for _ in range(DRAWS):
        guesses = guess_by_rank(rng.standard_normal(400), num_in=150, num_out=150)
        bounds.append(one_run_epsilon(400, *correct_guesses(guesses, rng.random(400) < 0.5), delta=1e-5))
    assert np.sum(np.array(bounds) > 0) <= FALSE_BOUNDS
    assert max(bounds) < 0.3


def test_null_scores_of_repeated_runs_give_about_zero():
    rng = np.random.default_rng(1)
    bounds = []
    for _ in range(DRAWS):
        tuning, counted = rng.standard_normal((2, 2, 500))
        threshold, _ = best_threshold(*tuning, delta=1e-5)
        bounds.append(repeated_runs_epsilon(count(*counted, threshold), delta=1e-5))
    assert np.sum(np.array(bounds) > 0) <= FALSE_BOUNDS
    assert max(bounds) < 1.0


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 4.0])
def test_randomised_response_is_bounded_below_its_epsilon_and_nearly(epsilon):
    """The best mechanism there is against one-run guesses: each is right with probability e^eps / (1 + e^eps)."""
    rng, num = np.random.default_rng(2), 10_000
    right = 1 / (1 + math.exp(-epsilon))
    bounds = np.array([one_run_epsilon(num, num, int(k), delta=0.0) for k in rng.binomial(num, right, DRAWS)])
    assert np.sum(bounds > epsilon) <= FALSE_BOUNDS
    assert np.median(bounds) > 0.92 * epsilon


@pytest.mark.parametrize("mu", [0.5, 1.0])
def test_gaussian_mechanism_is_bounded_below_its_epsilon_and_nearly(mu):
    """By repeated runs, the threshold from others; epsilon at 1e-5 is 1.9 and 4.4; 10^6 runs see most of it."""
    rng, delta = np.random.default_rng(3), 1e-5
    truth = gaussian_epsilon(mu, delta)
    for runs, share in ((2_000, 0.15), (1_000_000, 0.55)):
        tuning, counted = (rng.standard_normal((2, n)) + np.array([[mu], [0]]) for n in (min(runs, 20_000), runs))
        threshold, _ = best_threshold(*tuning, delta=delta)
        bound = repeated_runs_epsilon(count(*counted, threshold), delta=delta)
        assert share * truth < bound < truth


def test_false_bounds_of_a_gaussian_mechanism_are_as_rare_as_stated():
    """With the true epsilon at delta = 0.1, which a single threshold reaches, and a threshold near the best one."""
    rng, mu, delta = np.random.default_rng(4), 1.0, 0.1
    truth = gaussian_epsilon(mu, delta)
    threshold = mu / 2 + truth / mu  # where the likelihood ratio is e^eps, the inequality of the definition is tight
    bounds = []
    for _ in range(DRAWS):
        outs, ins = rng.standard_normal((2, 3000))
        bounds.append(repeated_runs_epsilon(count(ins + mu, outs, threshold), delta=delta))
    assert np.sum(np.array(bounds) > truth) <= FALSE_BOUNDS
    assert np.median(bounds) > 0.6 * truth


def test_both_directions_count():
    """An attack that is sure of "out" only bounds as much as one that is sure of "in" only."""
    sure_in = repeated_runs_epsilon(Counts(500, 1000, 0, 1000), delta=1e-5)
    sure_out = repeated_runs_epsilon(Counts(1000, 1000, 500, 1000), delta=1e-5)
    assert sure_in == pytest.approx(sure_out)
    assert sure_in == pytest.approx(math.log((0.4685 - 1e-5) / 0.00368), abs=0.01)


def test_best_threshold_separates_what_can_be_separated():
    rng = np.random.default_rng(5)
    ins, outs = 10 + rng.random(3000), rng.random(3000)
    threshold, epsilon = best_threshold(ins, outs, delta=0.0)
    assert outs.max() < threshold < ins.min()
    assert epsilon == repeated_runs_epsilon(Counts(3000, 3000, 0, 3000), delta=0.0)
    assert best_threshold(np.ones(3), np.ones(4), delta=0.0) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_run_epsilon(10, 11, 3, delta=0.0), "num_canaries >= num_guesses"),
        (lambda: one_run_epsilon(10, 5, 6, delta=0.0), "num_guesses >= num_correct"),
        (lambda: one_run_epsilon(10, 5, 3, delta=1.0), r"delta must be in \[0, 1\)"),
        (lambda: one_run_epsilon(10, 5, 3, delta=0.0, confidence=95), "such as 0.95; got 95"),
        (lambda: one_run_p_value(10, 5, 3, epsilon=-1.0, delta=0.0), "epsilon must be at least 0"),
        (lambda: clopper_pearson(4, 3), "4 successes of 3 trials"),
        (lambda: repeated_runs_epsilon(Counts(0, 0, 0, 1), delta=0.0), "of 0 trials"),
    ],
)
def test_refuses_numbers_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class TestAgainstJaxPrivacy:
    """Its estimators on the same scores; installed by the extra "peers"."""

    @pytest.fixture
    def auditing(self):
        return pytest.importorskip("jax_privacy.auditing", reason="the extra 'peers' is not installed")

    @pytest.fixture
    def scores(self):
        rng = np.random.default_rng(6)
        return rng.standard_normal(300) + 2.5, rng.standard_normal(300)

    @pytest.mark.parametrize("delta", [1e-6, 1e-3])
    def test_one_run(self, auditing, scores, delta):
        threshold = 2.0
        theirs = auditing.CanaryScoreAuditor(*scores).epsilon_one_run(
            0.05, delta, threshold_strategy=auditing.Explicit(threshold)
        )
        counts = count(*scores, threshold)
        guesses = counts.true_positives + counts.false_positives
        assert one_run_epsilon(600, guesses, counts.true_positives, delta=delta) == pytest.approx(theirs, abs=1e-5)
        assert theirs > 1

    @pytest.mark.parametrize("delta", [0.0, 1e-3])
    def test_repeated_runs(self, auditing, scores, delta):
        theirs = auditing.CanaryScoreAuditor(*scores).epsilon_clopper_pearson(
            0.05, delta, one_sided=False, threshold_strategy=auditing.Explicit(1.7)
        )
        assert repeated_runs_epsilon(count(*scores, 1.7), delta=delta) == pytest.approx(theirs, rel=1e-9)
        assert theirs > 1

    def test_why_its_gaussian_bound_is_not_used(self, auditing):
        """Null scores, one draw after another: it reports epsilons that nothing supports, far oftener than in 5%."""
        rng, false_bounds = np.random.default_rng(7), 0
        for _ in range(20):
            theirs = auditing.CanaryScoreAuditor(*rng.standard_normal((2, 100)))
            false_bounds += theirs.epsilon_from_gdp(0.05, 1e-5) > 0
        assert false_bounds >= 10
