"""The discretised privacy loss in the corners: an upper bound, close to the truth, bounded in time and memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from dp_rmt.accounting import Step, epsilon, epsilon_by_accountant
from dp_rmt.accounting.privacy_loss import (
    bin_width,
    composed_privacy_loss,
    is_nearly_exact,
    rounding_allowance,
)


def log_delta(mu, epsilon_):
    """Balle & Wang 2018, in logarithms: Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)."""
    upper = special.log_ndtr(mu / 2 - epsilon_ / mu)
    lower = epsilon_ + special.log_ndtr(-mu / 2 - epsilon_ / mu)
    return upper + np.log(-np.expm1(lower - upper))


def exact_epsilon(mu, delta):
    return optimize.brentq(lambda x: log_delta(mu, x) - math.log(delta), 1e-7, 10 * mu + mu**2)


@pytest.mark.parametrize("num_steps", [1, 202, 10**4, pytest.param(10**6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mu", [0.01, 1.0, 3.0])
def test_full_batches_are_one_gaussian_mechanism_down_to_the_smallest_delta(num_steps, mu):
    run = {"noise_multiplier": math.sqrt(num_steps) / mu, "sampling_probability": 1.0, "num_steps": num_steps}
    steps = ((Step(run["noise_multiplier"], 1.0), num_steps),)
    for delta in (1e-3, 1e-5, 1e-8, 1e-10, 1e-12, 1e-14, 1e-15, 1e-16, 1e-20):
        if delta > 0.1 * mu:
            continue
        exact = exact_epsilon(mu, delta)
        bounds = epsilon_by_accountant(delta=delta, **run)
        assert min(bounds.values()) >= exact * (1 - 1e-9)
        assert epsilon(delta=delta, **run) == pytest.approx(min(bounds.values()), rel=1e-3)
        if rounding_allowance(steps) < 1e-3 * delta:
            assert bounds["pld"] <= exact * (1 + 2e-3) + 1e-6


def test_tiny_deltas():
    """The Fourier transform has no digits left there: 8.58 at 1e-14, infinity at 1e-15."""
    run = {"noise_multiplier": 1.0, "sampling_probability": 0.01, "num_steps": 1000}
    curve = [epsilon(delta=10.0**-x, **run) for x in range(5, 21)]
    assert np.all(np.diff(curve) > 0)
    assert curve[14 - 5] == pytest.approx(4.976, abs=1e-3)
    assert curve[15 - 5] == pytest.approx(5.284, abs=1e-3)
    assert curve[20 - 5] == epsilon(delta=1e-20, accountant="rdp", **run)
    assert epsilon_by_accountant(delta=1e-15, **run)["pld"] == math.inf


@pytest.mark.parametrize(
    ("sigma", "sampling_probability", "num_steps"),
    [
        (0.3, 1, 10**4),
        (0.3, 0.01, 10**4),
        (1e4, 1e-4, 10**6),
        pytest.param(0.05, 1, 10**6, marks=pytest.mark.slow),
        pytest.param(0.5, 1e-6, 10**6, marks=pytest.mark.slow),
        pytest.param(1.0, 1e-3, 10**7, marks=pytest.mark.slow),
    ],
)
def test_time_and_memory_are_bounded(sigma, sampling_probability, num_steps):
    """Both follow the number of bins. The first of these once had 53 million: over 90 seconds, and 4.4 GB."""
    step = Step(sigma, sampling_probability)
    distribution = composed_privacy_loss(((step, num_steps),))
    assert max(distribution._pmf_remove.size, distribution._pmf_add.size) <= 2**22
    bounds = epsilon_by_accountant(
        noise_multiplier=sigma, delta=1e-5, sampling_probability=sampling_probability, num_steps=num_steps
    )
    assert bounds["pld"] <= 1.02 * bounds["rdp"] + 1e-6


CORNERS = {
    "noise_multiplier": st.floats(-0.3, 3.5).map(lambda x: 10**x),
    "sampling_probability": st.floats(-4, 0).map(lambda x: 10**x),
    "num_steps": st.floats(0, 5).map(lambda x: round(10**x)),
    "delta": st.floats(-12, -2).map(lambda x: 10**x),
}


def cost_of_bins(step, num_steps, width):
    """The most that bins of a width add to an epsilon near 0, beside a share of it, in nats.

    Bins of width h add h^2 / 6 to the variance w^2 of a step's loss, and so (h / w)^2 / 12 of the run's standard
    deviation s = w sqrt(T). By `log_delta`, epsilon moves with s by phi(x) / Phi(-x) <= x + .8 where
    x = s / 2 + epsilon / s. Where delta is just below what epsilon = 0 takes, epsilon is the small difference of large
    numbers, so that this is no small share of it.
    """
    scale = math.sqrt(math.log1p(step.sampling_probability**2 * math.expm1(step.noise_multiplier**-2)))
    deviation = scale * math.sqrt(num_steps)
    return (width / scale) ** 2 / 12 * deviation * (deviation / 2 + 0.8)


NEAR_ZERO = {"noise_multiplier": 10**2.34375, "sampling_probability": 10**-0.84375, "num_steps": 1540, "delta": 0.01}
"""Delta is 1% below what epsilon = 0 takes."""


@pytest.mark.parametrize("cases", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_accountants_and_bins_agree_in_the_corners(cases):
    test = example(**NEAR_ZERO)(given(**CORNERS)(accountants_and_bins_agree))
    settings(max_examples=cases, deadline=None)(test)()


def accountants_and_bins_agree(**run):
    delta = run["delta"]
    bounds = epsilon_by_accountant(**run)
    best = epsilon(**run)
    steps = ((Step(run["noise_multiplier"], run["sampling_probability"]), run["num_steps"]),)
    if is_nearly_exact(steps, delta):
        assert best == bounds["pld"] <= bounds["rdp"] * (1 + 1e-3) + 1e-6
    else:
        assert best == min(bounds.values())
    if rounding_allowance(steps) < 1e-2 * delta:
        left = delta - rounding_allowance(steps)
        wider = composed_privacy_loss(steps, 3.0).get_epsilon_for_delta(left)
        more = cost_of_bins(steps[0][0], run["num_steps"], 3 * bin_width(steps)) + 1e-6
        assert bounds["pld"] * (1 - 1e-3) - 1e-6 <= wider <= bounds["pld"] * 1.02 + more


@pytest.mark.parametrize("cases", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_more_noise_and_less_of_everything_else_is_more_private(cases):
    test = example(**NEAR_ZERO)(given(**CORNERS)(is_more_private_with_more_noise_and_less_else))
    settings(max_examples=cases, deadline=None)(test)()


def is_more_private_with_more_noise_and_less_else(**run):
    base = epsilon(**run)
    step = Step(run["noise_multiplier"], run["sampling_probability"])
    width = bin_width(((step, run["num_steps"]),))  # which follows the run
    slack = 1e-3 * base + cost_of_bins(step, run["num_steps"], width) + 1e-6
    assert epsilon(**run | {"noise_multiplier": 1.3 * run["noise_multiplier"]}) <= base + slack
    assert epsilon(**run | {"sampling_probability": 0.7 * run["sampling_probability"]}) <= base + slack
    assert epsilon(**run | {"num_steps": max(1, run["num_steps"] // 2)}) <= base + slack
    assert epsilon(**run | {"delta": 2 * run["delta"]}) <= base + slack
