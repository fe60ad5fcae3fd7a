"""The best of a random number of runs, against dp-accounting and the definition of the distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import special, stats

from dp_rmt import accounting
from dp_rmt.accounting import Repetitions, Step, divergences_of_best, epsilon_of_best
from dp_rmt.auditing import lower_bounds

ORDERS = np.asarray(rdp_privacy_accountant.RdpAccountant().orders)


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("mean", [1.5, 6.0, 40.0])
def test_repetition_is_bounded_as_dp_accounting_does(mean: float, shape: float) -> None:
    gaussian = dp_accounting.PoissonSampledDpEvent(0.02, dp_accounting.GaussianDpEvent(1.2))
    once = dp_accounting.SelfComposedDpEvent(gaussian, 200)
    best = dp_event.RepeatAndSelectDpEvent(once, mean, shape)
    expected = rdp_privacy_accountant.RdpAccountant().compose(best)
    divergences = np.asarray(rdp_privacy_accountant.RdpAccountant().compose(once).rdp)
    bounds = divergences_of_best(divergences, Repetitions(mean, shape))
    np.testing.assert_allclose(bounds, expected.rdp, rtol=1e-6)
    epsilon = rdp_privacy_accountant.compute_epsilon(ORDERS, bounds, 1e-5)[0]
    assert epsilon == pytest.approx(expected.get_epsilon(1e-5), rel=1e-6)


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 3.0, math.inf])
def test_the_number_of_runs_has_its_distribution(shape: float) -> None:
    repetitions, rng = Repetitions(6.0, shape), np.random.default_rng(0)
    drawn = np.array([repetitions.draw(rng) for _ in range(4000)])
    assert drawn.mean() == pytest.approx(6.0, abs=5 * drawn.std() / math.sqrt(len(drawn)))
    assert drawn.min() == (0 if math.isinf(shape) else 1)
    if not math.isinf(shape):  # P[2] / P[1], of the definition
        ratio = np.sum(drawn == 2) / np.sum(drawn == 1)
        assert ratio == pytest.approx((1 - repetitions.gamma) * (1 + shape) / 2, rel=0.25)


@pytest.mark.parametrize(("mean", "shape"), [(1.0, 1.0), (math.inf, 1.0), (2.0, -0.1), (2.0, math.nan)])
def test_a_distribution_that_is_none_is_refused(mean: float, shape: float) -> None:
    with pytest.raises(ValueError, match="the mean must be above 1"):
        Repetitions(mean, shape)


@pytest.mark.parametrize("shape", [0.0, 1.0, math.inf])
def test_the_epsilon_of_the_best_is_what_dp_accounting_says(shape: float) -> None:
    gaussians = [(1.2, 0.02, 200), (2.0, 0.05, 50)]
    once = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z)), count
            )
            for z, q, count in gaussians
        ]
    )
    best = dp_event.RepeatAndSelectDpEvent(once, 6.0, shape)
    expected = rdp_privacy_accountant.RdpAccountant().compose(best).get_epsilon(1e-5)
    steps = {Step(z, q): count for z, q, count in gaussians}
    assert epsilon_of_best(steps, Repetitions(6.0, shape), delta=1e-5) == pytest.approx(expected, rel=1e-6)


# ---- The winner's own law --------------------------------------------------------------------------------------------

SIGMA, DELTA = 1.0, 1e-3
ONE_RUN = {Step(SIGMA, sampling_probability=1.0): 1}


def of_one_run() -> float:
    """The epsilon of one run at DELTA: what whoever forgets the price of the choice would claim for the winner."""
    return accounting.epsilon(noise_multiplier=SIGMA, delta=DELTA, sampling_probability=1.0, num_steps=1)


def winners_density(x: np.ndarray, shift: float, repetitions: Repetitions) -> np.ndarray:
    """Density of the largest of K releases ``shift + SIGMA N(0, 1)``: ``f'(Phi) phi``, f K's generating function."""
    u, phi = special.ndtr((x - shift) / SIGMA), stats.norm.pdf(x, shift, SIGMA)
    shape, mean = repetitions.shape, repetitions.mean
    if math.isinf(shape):
        return mean * np.exp(mean * (u - 1)) * phi
    gamma = repetitions.gamma
    if shape == 0:
        return (1 - gamma) / (1 - (1 - gamma) * u) / -math.log(gamma) * phi
    return shape * (1 - gamma) * (1 - (1 - gamma) * u) ** (-shape - 1) / math.expm1(-shape * math.log(gamma)) * phi


def winners_delta(epsilon: float, repetitions: Repetitions) -> float:
    """The smallest delta that the winner has at this epsilon, by integration; the larger one of both directions."""
    x = np.linspace(-9, 10, 200_001)
    p, q = (winners_density(x, shift, repetitions) for shift in (1.0, 0.0))
    return max(np.trapezoid(np.maximum(a - math.exp(epsilon) * b, 0), x) for a, b in ((p, q), (q, p)))


@pytest.mark.parametrize("shape", [0.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("mean", [2.0, 30.0])
def test_the_winners_own_law_is_within_the_bound_and_beyond_that_of_one_run(mean: float, shape: float) -> None:
    repetitions = Repetitions(mean, shape)
    assert winners_delta(epsilon_of_best(ONE_RUN, repetitions, delta=DELTA), repetitions) <= DELTA
    assert winners_delta(of_one_run(), repetitions) > 1.2 * DELTA


def audited(repetitions: Repetitions, runs: int = 60_000) -> float:
    """The lower bound that an attack on the winner's score shows; the largest of k uniforms is ``u^(1/k)``."""
    rng = np.random.default_rng(0)
    counts = np.array([repetitions.draw(rng) for _ in range(2 * runs)]).reshape(2, runs)
    scores = np.array([[1.0], [0.0]]) + SIGMA * special.ndtri(rng.random((2, runs)) ** (1 / counts))
    tuning = runs // 10
    threshold, _ = lower_bounds.best_threshold(scores[0][:tuning], scores[1][:tuning], delta=DELTA)
    counted = lower_bounds.count(scores[0][tuning:], scores[1][tuning:], threshold)
    return lower_bounds.repeated_runs_epsilon(counted, delta=DELTA)


def test_an_audit_of_the_winner_lies_below_the_bound_and_above_the_price_of_one_run() -> None:
    """The typical mistake is to publish the best of many at the epsilon of one."""
    repetitions = Repetitions(300.0, 1.0)
    assert of_one_run() < audited(repetitions) < epsilon_of_best(ONE_RUN, repetitions, delta=DELTA)


def delta_of_losing(epsilon: float, generating_function: Callable[[np.ndarray], np.ndarray]) -> float:
    """The delta that the event "the winner's score is below t" needs: all runs are, ``f(Phi(t))``; over all t."""
    t = np.linspace(-2.0, 8.0, 20_001)
    without, with_example = (generating_function(special.ndtr(t - shift)) for shift in (0.0, 1.0))
    return float(np.max(without - math.exp(epsilon) * with_example))


def test_a_fixed_number_of_runs_is_beyond_the_bound_of_a_random_one() -> None:
    """The typical mistake of a grid: of many runs one at least has a high score, and with the example surely."""
    mean = 3000.0
    repetitions = Repetitions(mean, 1.0)
    bound = epsilon_of_best(ONE_RUN, repetitions, delta=DELTA)
    gamma = repetitions.gamma
    assert delta_of_losing(bound, lambda u: gamma * u / (1 - (1 - gamma) * u)) <= DELTA
    assert delta_of_losing(bound, lambda u: u**mean) > 10 * DELTA


def test_the_end_of_the_noise_is_paid_for_by_each_of_the_runs() -> None:
    repetitions, step = Repetitions(6.0, 1.0), Step(1.0, sampling_probability=0.02)
    short = 8.0
    ends = accounting.delta_of_truncation(
        noise_support=short, noise_multiplier=1.0, sampling_probability=0.02, num_steps=100
    )
    delta = 6.0 * ends / 0.02 + 1e-9
    whole = epsilon_of_best({step: 100}, repetitions, delta=1e-9)
    assert epsilon_of_best({step: 100}, repetitions, delta=delta, noise_support=short) >= whole * (1 - 1e-9)
    assert math.isinf(epsilon_of_best({step: 100}, repetitions, delta=delta - 2e-9, noise_support=short))
    barely = epsilon_of_best({step: 100}, repetitions, delta=1e-6, noise_support=9.155)
    assert barely == pytest.approx(epsilon_of_best({step: 100}, repetitions, delta=1e-6), rel=1e-4)
