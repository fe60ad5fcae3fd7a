"""The epsilon of groups: closed forms, `dp_accounting`'s own event, and the bound that group privacy gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant
from scipy import stats

from dp_rmt import accounting
from dp_rmt.accounting import Truncation, epsilon, epsilon_of_group

RUN = {"noise_multiplier": 2.0, "delta": 1e-5, "sampling_probability": 0.02, "num_steps": 50}


def test_a_group_of_one_is_an_example():
    assert epsilon_of_group(group_size=1, **RUN) == pytest.approx(epsilon(**RUN), rel=1e-3)


@pytest.mark.parametrize("group_size", [2, 5])
def test_full_batches_are_the_gaussian_of_k_times_the_sensitivity(group_size):
    run = {"delta": 1e-5, "sampling_probability": 1.0, "num_steps": 4}
    of_group = epsilon_of_group(group_size=group_size, noise_multiplier=10.0, **run)
    assert of_group == pytest.approx(epsilon(noise_multiplier=10.0 / group_size, **run), rel=1e-3)


@pytest.mark.parametrize("group_size", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_it_is_the_mixture_of_gaussians_of_dp_accounting(group_size):
    weights = stats.binom.pmf(np.arange(group_size + 1), group_size, 0.02)
    accountant = pld_privacy_accountant.PLDAccountant()
    event = dp_event.MixtureOfGaussiansDpEvent(2.0, np.arange(group_size + 1.0), weights)
    accountant.compose(dp_event.SelfComposedDpEvent(event, 50))
    of_group = epsilon_of_group(group_size=group_size, **RUN)
    assert of_group == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert of_group > epsilon(**RUN)


@pytest.mark.thorough
def test_it_is_below_group_privacy_from_one_point_and_grows_with_the_group():
    """k epsilon holds at k exp((k - 1) epsilon) delta only (Vadhan 2017, lemma 2.2): the same delta of the group."""
    bounds = [epsilon_of_group(group_size=k, **RUN) for k in (1, 2, 4, 8)]
    assert bounds == sorted(bounds)
    for k, bound in zip((2, 4), bounds[1:]):
        small = 1e-5
        for _ in range(20):  # the delta of an example that gives the group 1e-5
            small = 1e-5 / (k * math.exp((k - 1) * epsilon(**RUN | {"delta": small})))
        assert bound < k * epsilon(**RUN | {"delta": small})


@pytest.mark.slow
def test_a_batch_that_can_overflow_costs_more_and_one_that_cannot_costs_nothing():
    roomy, tight = (epsilon_of_group(group_size=3, truncation=Truncation(1000, m), **RUN) for m in (1000, 24))
    assert roomy == pytest.approx(epsilon_of_group(group_size=3, **RUN), rel=1e-6)
    # Half of the batches or so leave no room for three more. At most every shift is doubled.
    doubled = epsilon_of_group(group_size=3, **RUN | {"noise_multiplier": 1.0})
    assert 1.02 * roomy < tight < doubled


@pytest.mark.slow
def test_the_end_of_the_noise_is_paid_for():
    run = RUN | {"group_size": 4}
    assert epsilon_of_group(noise_support=9.155, **run) == pytest.approx(epsilon_of_group(**run), rel=1e-3)
    assert epsilon_of_group(noise_support=5.22, **run) == math.inf
    assert epsilon_of_group(noise_support=9.155, **run | {"delta": 1e-14}) == math.inf


def test_bad_sizes_are_refused():
    for size in (0, 1.5):
        with pytest.raises(ValueError, match="group_size"):
            accounting.epsilon_of_group(group_size=size, **RUN)
    assert epsilon_of_group(group_size=2, **RUN | {"noise_multiplier": 0.0}) == math.inf
