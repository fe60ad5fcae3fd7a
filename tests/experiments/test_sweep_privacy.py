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
from experiments import shared_samples, sweep_privacy
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
    """``(count, seed=, sampling_seed=, **changes of the statement) -> runs``; `seed` is the noise's."""

    def make(
        count: int, seed: int | None = None, sampling_seed: int | None = None, **changes: Any
    ) -> list[sweep_privacy.Run]:
        config = {"privacy": {"noise_seed": seed, "sampling_seed": sampling_seed}}
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


SST2: dict[str, Any] = {
    "noise_multiplier": 0.7722, "delta": 67_349**-1.1, "sampling_probability": 1000 / 67_349,
    "num_examples": 67_349, "max_batch_size": 1177, "num_steps": 202, "epsilon": 3.0,
}  # fmt: skip


def epsilon_of(choice: sweep_privacy.Choice) -> float:
    assert choice.epsilon is not None
    return choice.epsilon


@pytest.mark.parametrize(("count", "independent", "shared"), [(2, 3.76, 8.19), (8, 6.76, 58)])
def test_runs_that_share_samples_cost_more_than_independent_ones(
    choices: Choices, count: int, independent: float, shared: float
) -> None:
    """SST-2 at epsilon 3: given the sample, k sums of one noise are one sum of noise 1/sqrt(k)."""
    together = cost_of_choosing(choices(count, sampling_seed=5, **SST2))
    assert epsilon_of(cost_of_choosing(choices(count, **SST2))) == pytest.approx(independent, rel=5e-3)
    assert epsilon_of(together) == pytest.approx(shared, rel=1e-2)
    step = dp_accounting.PoissonSampledDpEvent(
        SST2["sampling_probability"], dp_accounting.GaussianDpEvent(SST2["noise_multiplier"] / math.sqrt(count))
    )  # of batches that never overflow
    once = dp_accounting.pld.PLDAccountant().compose(step, SST2["num_steps"]).get_epsilon(SST2["delta"])
    assert epsilon_of(together) == pytest.approx(once, rel=1e-2)
    assert "share a sampling seed" in together.text
    assert "seeds were given" in together.text


def test_a_run_that_ends_leaves_the_others_that_share_its_samples(choices: Choices) -> None:
    short = choices(1, sampling_seed=5, noise_multiplier=3.0)
    long = choices(1, sampling_seed=5, noise_multiplier=2.0, num_steps=10)
    assert shared_samples.released([*short, *long]) == {
        shared_samples.Mechanism(1 / math.sqrt(1 / 9 + 1 / 4), 0.02, 10_000, 400): 4,
        shared_samples.Mechanism(2.0, 0.02, 10_000, 400): 6,
    }
    alone = [run._replace(config={"privacy": {}}) for run in (*short, *long)]
    assert epsilon_of(cost_of_choosing([*short, *long])) > epsilon_of(cost_of_choosing(alone))


def test_a_sampling_seed_of_its_own_or_full_batches_cost_nothing_more(choices: Choices) -> None:
    own = [*choices(1, sampling_seed=5), *choices(1, sampling_seed=6), *choices(1)]
    assert cost_of_choosing(own).epsilon == cost_of_choosing(choices(3)).epsilon
    everybody = {"sampling_probability": 1.0, "max_batch_size": 10_000}
    shared, apart = choices(3, sampling_seed=5, **everybody), choices(3, **everybody)
    assert cost_of_choosing(shared).epsilon == cost_of_choosing(apart).epsilon


def test_no_bound_is_claimed_where_one_seed_takes_other_samples(choices: Choices) -> None:
    first = choices(1, sampling_seed=5)[0]
    for other in (
        choices(1, sampling_seed=5, sampling_probability=0.03)[0],
        choices(1, sampling_seed=5, max_batch_size=300)[0],
        first._replace(config={**first.config, "data": {"task": "another"}}),
    ):
        choice = cost_of_choosing([first, other])
        assert (choice.rule, choice.epsilon) == ("none", None)
        assert "differ in sampling probability, batch shape or data" in choice.text


def test_jobs_that_share_samples_are_no_independent_draws(choices: Choices) -> None:
    repetitions = Repetitions(6.0, 1.0)
    shared = cost_of_choosing(choices(3, sampling_seed=5), repetitions)
    assert shared.rule == "composition"
    assert "they share samples" in shared.text
    assert shared.epsilon == cost_of_choosing(choices(3, sampling_seed=5)).epsilon
    within = [run._replace(job=f"job{seed}") for seed in (5, 6) for run in choices(2, sampling_seed=seed)]
    assert cost_of_choosing(within, repetitions).rule == "repeat and select"
