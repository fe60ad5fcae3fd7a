"""The epsilon of a run: published numbers, closed forms, dp_accounting, what grows with what."""

from __future__ import annotations

import math

import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from dp_rmt.accounting import (
    Step,
    Truncation,
    calibrate_noise_multiplier,
    dp_event,
    epsilon,
    epsilon_curve,
    epsilon_of_composition,
)
from dp_rmt.accounting.privacy_loss import _privacy_loss
from dp_rmt.batch_selection import max_batch_size_for

SST2 = {"delta": 67_349**-1.1, "sampling_probability": 1000 / 67_349, "num_steps": 202}
SST2_TRUNCATION = Truncation(67_349, max_batch_size_for(67_349, 1000 / 67_349))


@pytest.mark.parametrize(("accountant", "expected"), [("pld", 6.7688), ("rdp", 7.3293)])
def test_published_epsilon(accountant, expected):
    value = epsilon(noise_multiplier=1.5, delta=1e-5, sampling_probability=0.04, num_steps=2250, accountant=accountant)
    assert value == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("sigma", [0.7, 2.0, 10.0])
def test_one_full_batch_is_the_gaussian_mechanism(sigma):
    """Balle & Wang 2018: delta(epsilon) = Phi(1/2s - epsilon s) - exp(epsilon) Phi(-1/2s - epsilon s)."""

    def delta(value):
        lower, upper = 0.5 / sigma - value * sigma, -0.5 / sigma - value * sigma
        return stats.norm.cdf(lower) - math.exp(value) * stats.norm.cdf(upper)

    exact = optimize.brentq(lambda value: delta(value) - 1e-5, 1e-3, 50)
    common = {"noise_multiplier": sigma, "delta": 1e-5, "sampling_probability": 1.0, "num_steps": 1}
    # The slack of the upper bound is at most one bin of the privacy loss, 1e-4.
    assert exact - 1e-9 <= epsilon(**common) <= exact + 1e-4
    assert epsilon(accountant="rdp", **common) >= exact


@pytest.mark.parametrize("truncation", [None, pytest.param(Truncation(1000, 25), marks=pytest.mark.slow)])
def test_event_means_the_same_to_the_accountants_of_dp_accounting(truncation):
    run = {"noise_multiplier": 1.3, "sampling_probability": 0.01, "num_steps": 70, "truncation": truncation}
    event = dp_event(**run)
    ours = epsilon(delta=1e-5, **run)
    assert PLDAccountant().compose(event).get_epsilon(1e-5) == pytest.approx(ours, rel=1e-9)
    if truncation is None:
        ours = epsilon(delta=1e-5, accountant="rdp", **run)
        # Above theirs by what its float64 may have lost: at most 2^-42 of a log moment of order 2 and more a step.
        assert 0 <= ours - RdpAccountant().compose(event).get_epsilon(1e-5) <= 70 * 2.0**-42
    else:
        assert not RdpAccountant().supports(event)  # why this package derives a bound of its own


@pytest.mark.parametrize(
    ("sigma", "sampling_probability", "num_steps"),
    [
        (1.0, 0.01, 1000),
        (888.0, 0.01, 10**5),  # a long run of small steps; bins of 1e-4 make ten times as much of it
        (0.15, 1.0, 50),
    ],
)
def test_equal_runs_together_are_one_long_run(sigma, sampling_probability, num_steps):
    """Up to what the transforms lose, each of which leaves out tails of 1e-15 and gives them to an infinite loss."""
    run = {"sampling_probability": sampling_probability, "delta": 1e-5}
    whole = epsilon(noise_multiplier=sigma, num_steps=num_steps, **run)
    alike = Step(sigma, sampling_probability)
    assert epsilon_of_composition({alike: num_steps}, delta=1e-5) == whole
    other = Step(sigma * (1 + 1e-12), sampling_probability)  # another kind of step, and the same to 12 digits
    together = epsilon_of_composition({alike: num_steps // 2, other: num_steps // 2}, delta=1e-5)
    assert whole * (1 - 1e-6) <= together <= whole * (1 + 2e-4)


@pytest.mark.parametrize(
    "kinds",
    [
        {1.0: 1, 2.0: 3, 5.0: 10},
        {0.3: 1, 50.0: 1000},
        {1.0: 2, 1000.0: 10**6},  # a rare kind that decides, with losses a thousand times those of the others
        {3e3: 10**4, 1e4: 10**5},
    ],
)
def test_full_batches_of_several_kinds_are_one_gaussian_mechanism(kinds):
    """Of ``mu^2 = sum of n / sigma^2``: Dong, Roth & Su 2022, corollary 2."""
    mu = math.sqrt(math.fsum(count / sigma**2 for sigma, count in kinds.items()))
    steps = {Step(sigma, 1.0): count for sigma, count in kinds.items()}
    for delta in (1e-3, 1e-5):

        def excess(value, delta=delta):
            return stats.norm.cdf(mu / 2 - value / mu) - math.exp(value) * stats.norm.cdf(-mu / 2 - value / mu) - delta

        exact = optimize.brentq(excess, 1e-4, 50)
        assert exact * (1 - 1e-9) <= epsilon_of_composition(steps, delta=delta) <= exact * (1 + 3e-4)


def test_a_composition_of_nothing_or_without_noise():
    with pytest.raises(ValueError, match="steps is empty"):
        epsilon_of_composition({}, delta=1e-5)
    with pytest.raises(ValueError, match="num_steps must be"):
        epsilon_of_composition({Step(1.0, 0.1): 0}, delta=1e-5)
    assert epsilon_of_composition({Step(1.0, 0.1): 1, Step(0.0, 0.1): 1}, delta=1e-5) == math.inf


def test_the_end_of_the_noise_is_a_part_of_delta_in_a_composition():
    steps = {Step(2.0, 0.01): 20, Step(3.0, 0.01): 20}
    ended = [epsilon_of_composition(steps, delta=1e-5, noise_support=support) for support in (math.inf, 8.0, 5.3)]
    assert ended[0] < ended[1] < ended[2] == math.inf


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_curve_is_epsilon_at_each_point(accountant):
    run = {"noise_multiplier": 2.0, "delta": 1e-6, "sampling_probability": 0.05, "accountant": accountant}
    steps = (400, 1, 50)
    curve = epsilon_curve(steps=steps, **run)
    assert curve.tolist() == [epsilon(num_steps=num_steps, **run) for num_steps in steps]
    assert curve[1] < curve[2] < curve[0]


def test_one_step_is_analysed_once_for_a_whole_curve():
    _privacy_loss.cache_clear()
    epsilon_curve(noise_multiplier=3.0, delta=1e-6, sampling_probability=0.05, steps=range(1, 20))
    assert _privacy_loss.cache_info().misses == 1


def assert_monotone(run):
    base = epsilon(**run)
    assert epsilon(**run | {"noise_multiplier": 1.2 * run["noise_multiplier"]}) < base
    assert epsilon(**run | {"sampling_probability": 1.2 * run["sampling_probability"]}) > base
    assert epsilon(**run | {"num_steps": run["num_steps"] + 50}) > base
    assert epsilon(**run | {"delta": 10 * run["delta"]}) < base


@settings(max_examples=8, deadline=None)
@given(
    sigma=st.floats(0.8, 5.0),
    sampling_probability=st.floats(1e-3, 0.2),
    num_steps=st.integers(1, 500),
    truncation=st.sampled_from([None, Truncation(1000, 250)]),
)
# Of a batch larger than 250 the probability is 1e-319 here.
@example(sigma=1.0, sampling_probability=0.0057757347929704205, num_steps=10, truncation=Truncation(1000, 250))
def test_monotone_under_rdp(sigma, sampling_probability, num_steps, truncation):
    run = {"noise_multiplier": sigma, "sampling_probability": sampling_probability, "num_steps": num_steps}
    assert_monotone(run | {"delta": 1e-5, "accountant": "rdp", "truncation": truncation})


@pytest.mark.parametrize("truncation", [None, pytest.param(Truncation(1000, 90), marks=pytest.mark.slow)])
def test_monotone_under_pld(truncation):
    run = {"noise_multiplier": 2.0, "sampling_probability": 0.05, "num_steps": 100}
    assert_monotone(run | {"delta": 1e-5, "truncation": truncation})


@pytest.mark.slow
def test_truncation_at_five_standard_deviations_costs_little_under_pld():
    plain = epsilon(noise_multiplier=0.7718, **SST2)
    truncated = epsilon(noise_multiplier=0.7718, truncation=SST2_TRUNCATION, **SST2)
    assert plain < truncated < 1.002 * plain


def test_truncation_costs_much_under_rdp_but_is_accounted():
    plain = epsilon(noise_multiplier=1.1, accountant="rdp", **SST2)
    truncated = epsilon(noise_multiplier=1.1, accountant="rdp", truncation=SST2_TRUNCATION, **SST2)
    roomy = Truncation(67_349, 2000)  # 32 standard deviations above the mean
    assert 1.5 * plain < truncated < 2.5 * plain
    roomy_epsilon = epsilon(noise_multiplier=1.1, accountant="rdp", truncation=roomy, **SST2)
    assert roomy_epsilon == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_a_batch_that_holds_all_examples_is_not_truncated(accountant):
    run = {"noise_multiplier": 1.0, "delta": 1e-3, "sampling_probability": 0.1, "num_steps": 10}
    plain = epsilon(accountant=accountant, **run)
    assert epsilon(accountant=accountant, truncation=Truncation(40, 40), **run) == plain
    assert epsilon(accountant=accountant, truncation=Truncation(40, 6), **run) > plain


def test_no_noise_is_no_privacy():
    run = {"delta": 1e-5, "sampling_probability": 0.1, "num_steps": 1}
    assert epsilon(noise_multiplier=0.0, **run) == math.inf
    assert epsilon(noise_multiplier=0.0, accountant="rdp", **run) == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be"),
        ({"noise_multiplier": math.nan}, "noise_multiplier must be"),
        ({"delta": 0.0}, "delta must be"),
        ({"delta": 1.0}, "delta must be"),
        ({"sampling_probability": 0.0}, r"sampling_probability .* must be"),
        ({"sampling_probability": 1.1}, r"sampling_probability .* must be"),
        ({"num_steps": 0}, "num_steps must be"),
        ({"accountant": "moments"}, "accountant must be"),
    ],
)
def test_errors_name_the_argument(change, message):
    run = {"noise_multiplier": 1.0, "delta": 1e-5, "sampling_probability": 0.1, "num_steps": 10} | change
    with pytest.raises(ValueError, match=message):
        epsilon(**run)
    if "noise_multiplier" not in change:
        del run["noise_multiplier"]
        with pytest.raises(ValueError, match=message):
            calibrate_noise_multiplier(epsilon=1.0, **run)


def test_dp_event_validates():
    with pytest.raises(ValueError, match="num_steps must be"):
        dp_event(noise_multiplier=1.0, sampling_probability=0.1, num_steps=0)
    with pytest.raises(ValueError, match="at least 1"):
        Truncation(num_examples=0, max_batch_size=1)
