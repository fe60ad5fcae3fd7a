"""What noise without tails costs: published figures, integration in one dimension, search over directions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dp_rmt import accounting
from dp_rmt.accounting import Truncation, calibrate_noise_multiplier, delta_of_truncation, epsilon
from dp_rmt.accounting.noise_support import _escape, largest_escape
from dp_rmt.batch_selection import max_batch_size_for

# jax.random.normal in float32 ends at 5.2201 standard deviations above (and at 5.42 below).
OLD = {"noise_support": 5.2201, "num_parameters": 1}


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "num_steps", "sigma", "times_delta"),
    # SST-2 at epsilon 3 and 8, MNLI at epsilon 8; the noise that calibration finds for batches of this shape.
    [(67_349, 1000, 202, 0.7722, 27), (67_349, 1000, 202, 0.5504, 204), (392_702, 4096, 1726, 0.6744, 2382)],
)
def test_what_a_float32_inverse_error_function_costs(num_examples, batch_size, num_steps, sigma, times_delta):
    """The detection of one pushed coordinate, ``1 - (1 - q Phi_c(5.2201 - 1 / sigma))^T``, in units of delta."""
    delta, q = num_examples**-1.1, batch_size / num_examples
    run = {"sampling_probability": q, "num_steps": num_steps}
    truncation = Truncation(num_examples, max_batch_size_for(num_examples, q))
    detected = -math.expm1(num_steps * math.log1p(-q * stats.norm.sf(5.2201 - 1 / sigma)))
    # As published: to its last digit, or to that of a noise multiplier in four.
    assert detected / delta == pytest.approx(times_delta, abs=max(0.5, 0.003 * times_delta))
    # What holds in both directions and for batches that overflow, too, is a little more.
    bound = delta_of_truncation(noise_multiplier=sigma, truncation=truncation, **run, **OLD)
    assert detected * (1 - 1e-3) <= bound <= 1.02 * detected


def hockey_stick(upper, lower, epsilon_):
    return np.sum(np.maximum(upper - math.exp(epsilon_) * lower, 0.0))


@pytest.mark.parametrize("q", [0.01, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("sigma", [0.4, 0.7, 1.0, 3.0])
def test_covers_what_truncated_noise_adds_in_one_dimension(q, sigma):
    """Both directions, every real epsilon: what the composition of steps needs, not only one at epsilon >= 0."""
    support, shift = 4.0, 1 / sigma
    width = 1e-3
    z = np.arange(-support - shift - 1, support + shift + 1, width) + width / 2
    inside = 1 - 2 * stats.norm.sf(support)

    def density(mean, end):
        return np.where(np.abs(z - mean) <= end, stats.norm.pdf(z - mean), 0.0) * width

    without, with_x = density(0, support) / inside, density(shift, support) / inside
    gaussian = density(0, math.inf), density(shift, math.inf)
    p, p_gauss = (1 - q) * without + q * with_x, (1 - q) * gaussian[0] + q * gaussian[1]
    bound = delta_of_truncation(
        noise_support=support, noise_multiplier=sigma, sampling_probability=q, num_steps=1, num_parameters=1
    )
    largest = 0.0
    for eps in np.concatenate([np.linspace(-12, 12, 121), np.linspace(-0.02, 0.02, 41)]):
        removed = hockey_stick(p, without, eps) - hockey_stick(p_gauss, gaussian[0], eps)
        added = hockey_stick(without, p, eps) - hockey_stick(gaussian[0], p_gauss, eps)
        assert max(removed, added) <= bound * (1 + 1e-3) + 2 * stats.norm.pdf(support) * width
        largest = max(largest, removed, added)
    both_ways = 1 if q == 1 else 1 / (1 - q * (1 - math.exp(-(shift**2) / 2)))
    assert largest >= 0.5 * bound / both_ways  # it is no gross overstatement


@settings(max_examples=60, deadline=None)
@given(
    shift=st.floats(0.01, 4.0), support=st.floats(5.0, 9.5), count=st.integers(1, 50), seed=st.integers(0, 2**32 - 1)
)
def test_no_direction_is_pushed_out_more_often(shift, support, count, seed):
    rng = np.random.default_rng(seed)
    bound = largest_escape(shift, support, count)
    for concentration in (0.05, 0.3, 1.0, 10.0):
        shares = rng.gamma(concentration, size=(200, count)) + 1e-300
        directions = shift * np.sqrt(shares / shares.sum(axis=1, keepdims=True))
        assert _escape(directions, support).sum(axis=1).max() <= bound * (1 + 1e-9)
    equal = [k * _escape(np.array(shift / math.sqrt(k)), support) for k in range(1, count + 1)]
    assert max(equal) <= bound * (1 + 1e-9)
    assert bound <= 1.02 * max(max(equal), max(mixed(shift, support, count)))


def mixed(shift, support, count):
    """One entry of any size, the others equal: where the maximum is."""
    one = np.linspace(0.0, shift, 2001)
    rest = np.sqrt(np.maximum(shift**2 - one**2, 0) / max(count - 1, 1))
    return _escape(one, support) + (count - 1) * _escape(rest, support)


def test_grows_with_what_it_should():
    run = {"noise_support": 9.155, "noise_multiplier": 0.8, "sampling_probability": 0.02, "num_steps": 100}
    base = delta_of_truncation(**run)
    assert 0 < base < 1e-11
    assert delta_of_truncation(**run | {"num_steps": 200}) == pytest.approx(2 * base, rel=1e-9)
    assert delta_of_truncation(**run | {"noise_support": 9.0}) > base
    assert delta_of_truncation(**run | {"noise_multiplier": 0.7}) > base
    assert delta_of_truncation(**run | {"sampling_probability": 0.03}) > base
    assert delta_of_truncation(**run, truncation=Truncation(1000, 20)) > 1.3 * base
    assert delta_of_truncation(**run, num_parameters=10**8) < 0.02 * base
    assert delta_of_truncation(**run | {"noise_support": math.inf}) == 0.0
    assert delta_of_truncation(**run | {"noise_multiplier": 0.0}) == 1.0
    assert delta_of_truncation(**run | {"noise_multiplier": 0.1, "num_steps": 10**4}) == 1.0


def test_is_a_part_of_delta():
    run = {"noise_multiplier": 1.5, "sampling_probability": 0.04, "num_steps": 2250}
    missing = delta_of_truncation(noise_support=5.2201, num_parameters=accounting.MAX_PARAMETERS, **run)
    assert missing == 1.0
    assert epsilon(delta=1e-5, noise_support=5.2201, **run) == math.inf
    missing = delta_of_truncation(noise_support=8.5, **run)
    assert 1e-9 < missing < 1e-7
    with_end = epsilon(delta=1e-6, noise_support=8.5, **run)
    assert with_end == pytest.approx(epsilon(delta=1e-6 - missing, **run), abs=1e-12)
    assert epsilon(delta=1e-5, noise_support=9.155, **run) == pytest.approx(6.7688, abs=5e-5)


@pytest.mark.thorough
def test_calibration_gives_it_one_percent_of_delta_at_most():
    run = {"delta": 1e-6, "sampling_probability": 0.04, "num_steps": 500}
    free = calibrate_noise_multiplier(epsilon=8.0, **run)
    held = calibrate_noise_multiplier(epsilon=8.0, noise_support=8.5, **run)
    one = {"sampling_probability": 0.04, "num_steps": 500, "noise_support": 8.5}
    assert delta_of_truncation(noise_multiplier=free, **one) <= 1e-8
    assert held == pytest.approx(free, rel=1e-3)
    run["delta"] = 1e-7
    free = calibrate_noise_multiplier(epsilon=8.0, **run)
    held = calibrate_noise_multiplier(epsilon=8.0, noise_support=8.5, **run)
    assert held > 1.05 * free
    assert delta_of_truncation(noise_multiplier=held, **one) == pytest.approx(1e-9, rel=1e-5)
    assert delta_of_truncation(noise_multiplier=held, **one) <= 1e-9
    assert epsilon(noise_multiplier=held, noise_support=8.5, **run) < 8.0


def test_a_delta_below_what_the_end_costs_says_what_to_give():
    run = {"sampling_probability": 0.01, "num_steps": 1000, "noise_support": 9.155}
    with pytest.raises(ValueError, match=r"delta=1e-14 is too small for noise that ends at 9\.155 .*Raise delta above"):
        calibrate_noise_multiplier(epsilon=1.0, delta=1e-14, **run)


@pytest.mark.parametrize("noise_support", [math.nan, 2.0, -9.0, "9", True])
def test_refuses_what_is_no_end(noise_support):
    with pytest.raises(ValueError, match="noise_support must be above 3"):
        delta_of_truncation(noise_support=noise_support, noise_multiplier=1.0, sampling_probability=0.1, num_steps=1)
