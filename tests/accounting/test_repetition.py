"""The best of a random number of runs, against dp-accounting and the definition of the distribution."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import rdp_privacy_accountant

from dp_rmt.accounting import Repetitions, Step, divergences_of_best, epsilon_of_best

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
