"""What choosing the best of several runs costs, against dp-accounting and the definition of the distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import rdp_privacy_accountant

from dp_rmt import accounting
from experiments import sweep_privacy
from experiments.sweep_privacy import Repetitions, cost_of_choosing, repeated

ORDERS = np.asarray(rdp_privacy_accountant.RdpAccountant().orders)


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("mean", [1.5, 6.0, 40.0])
def test_repetition_is_bounded_as_dp_accounting_does(mean: float, shape: float) -> None:
    gaussian = dp_accounting.PoissonSampledDpEvent(0.02, dp_accounting.GaussianDpEvent(1.2))
    once = dp_accounting.SelfComposedDpEvent(gaussian, 200)
    best = dp_event.RepeatAndSelectDpEvent(once, mean, shape)
    expected = rdp_privacy_accountant.RdpAccountant().compose(best)
    divergences = np.asarray(rdp_privacy_accountant.RdpAccountant().compose(once).rdp)
    bounds = repeated(divergences, Repetitions(mean, shape))
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


Choices = Callable[..., list[sweep_privacy.Run]]


@pytest.fixture
def choices(statement: dict[str, Any]) -> Choices:
    """``(count, seed=, **changes of the statement) -> runs``."""

    def make(count: int, seed: int | None = None, **changes: Any) -> list[sweep_privacy.Run]:
        config = {"privacy": {"noise_seed": seed}}
        return [sweep_privacy.Run(f"job{n}", {**statement, **changes}, config) for n in range(count)]

    return make


def test_a_fixed_number_of_runs_costs_their_composition(choices: Choices) -> None:
    choice = cost_of_choosing(choices(3))
    settings: dict[str, Any] = {"noise_multiplier": 2.0, "delta": 1e-5, "sampling_probability": 0.02}
    truncation = accounting.Truncation(10_000, 400)
    expected = accounting.epsilon(**settings, num_steps=12, truncation=truncation)
    assert choice.rule == "composition"
    assert choice.epsilon == pytest.approx(expected, rel=1e-3)
    assert f"ε = {expected:.4g}"[:6] in choice.text
    assert "does not apply" in choice.text
    mixed = cost_of_choosing([*choices(2), *choices(1, noise_multiplier=4.0)])
    assert mixed.epsilon is not None
    assert mixed.epsilon < choice.epsilon  # type: ignore[operator]


def test_a_random_number_of_runs_costs_repeat_and_select(choices: Choices) -> None:
    repetitions = Repetitions(6.0, 1.0)
    choice = cost_of_choosing(choices(5, max_batch_size=10_000), repetitions)  # all fit, so this is the mechanism:
    once = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.02, dp_accounting.GaussianDpEvent(2.0)), 4
    )
    best = dp_event.RepeatAndSelectDpEvent(once, 6.0, 1.0)
    expected = rdp_privacy_accountant.RdpAccountant().compose(best).get_epsilon(1e-5)
    assert (choice.rule, choice.delta) == ("repeat and select", 1e-5)
    assert choice.epsilon == pytest.approx(expected, rel=1e-6)
    assert "geometric, mean 6; it came out as 5" in choice.text
    truncated = cost_of_choosing(choices(5), repetitions)
    assert truncated.epsilon is not None
    assert truncated.epsilon > expected
    longer = choices(1, num_steps=9)[0]._replace(job="other")
    unlike = cost_of_choosing([*choices(2), longer], repetitions)
    assert unlike.rule == "composition"
    assert "differ in noise" in unlike.text


def test_no_bound_is_claimed_for_runs_that_share_noise_or_have_none(choices: Choices) -> None:
    assert cost_of_choosing(choices(2, seed=7)).rule == "none"
    assert cost_of_choosing([*choices(1), *choices(1, is_private=False, epsilon=None)]).epsilon is None
    distinct = [*choices(1, seed=7), *choices(1, seed=8)]
    assert "seeds were given" in cost_of_choosing(distinct).text
