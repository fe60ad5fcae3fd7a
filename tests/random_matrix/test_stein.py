"""Stein's estimate: its divergence against finite differences, its limits, and the blend that it chooses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import integrate

from dp_rmt.random_matrix import marchenko_pastur, shrinkage, stein

SHRINKERS = [
    shrinkage.frobenius,
    shrinkage.operator,
    shrinkage.operator_rectangular,
    shrinkage.nuclear,
    shrinkage.hard_threshold,
]
# Compiled as one program: operation by operation takes most of the time of these tests.
divergence = jax.jit(stein.divergence, static_argnames=("rows", "cols"))


@functools.partial(jax.jit, static_argnames=("shrinker", "rows", "cols"))
def shrunken_and_slope(y, *, shrinker, rows, cols, noise_std):
    shape = {"rows": rows, "cols": cols, "noise_std": noise_std}
    return shrinker(y, **shape), stein.slope_of(shrinker)(y, **shape)


def with_values(values, rows, cols, seed=0):
    """A matrix of these singular values and random singular vectors, float64."""
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.standard_normal((rows, rows)))[0]
    right = np.linalg.qr(generator.standard_normal((cols, cols)))[0]
    return left[:, : len(values)] * values @ right[:, : len(values)].T


def differenced_divergence(function, matrix, step=1e-5):
    """Sum over all entries of the central difference of `D_ij` in `Y_ij`, D with the values `function(y)`."""

    def spectral(y):
        left, values, right = np.linalg.svd(y, full_matrices=False)
        return left * function(values) @ right

    total = 0.0
    for i, j in np.ndindex(matrix.shape):
        shift = np.zeros_like(matrix)
        shift[i, j] = step
        total += (spectral(matrix + shift) - spectral(matrix - shift))[i, j] / (2 * step)
    return total


def smooth(values):
    return values**3 / (1 + values**2)


def smooth_slope(values):
    return (3 * values**2 + values**4) / (1 + values**2) ** 2


@pytest.mark.parametrize(("rows", "cols"), [(5, 5), (4, 7), (7, 4), (1, 6), (6, 1)])
def test_divergence_of_a_smooth_spectral_function(rows, cols):
    matrix = np.random.default_rng(1).standard_normal((rows, cols))
    y = np.linalg.svd(matrix, compute_uv=False)
    claimed = divergence(y, smooth(y), smooth_slope(y), rows=rows, cols=cols, noise_std=1.0)
    assert float(claimed) == pytest.approx(differenced_divergence(smooth, matrix), rel=2e-5)


@pytest.mark.parametrize("shrinker", SHRINKERS)
@pytest.mark.parametrize(("rows", "cols"), [(5, 5), (4, 7), (8, 4)])
def test_divergence_of_shrunken_matrices(shrinker, rows, cols):
    # Some values above the edge, some below, none so near that a difference would reach across.
    shape = {"rows": rows, "cols": cols, "noise_std": 0.2}
    y = np.array([2.5, 1.7, 1.3, 0.3, 0.1])[: min(rows, cols)] * marchenko_pastur.bulk_edge(**shape)

    def shrink(values):
        with jax.enable_x64(True):
            return np.asarray(shrunken_and_slope(values, shrinker=shrinker, **shape)[0])

    expected = differenced_divergence(shrink, with_values(y, rows, cols))
    claimed = divergence(y, *shrunken_and_slope(y, shrinker=shrinker, **shape), **shape)
    assert float(claimed) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5, 3e-4, 1e-3, 1e-2])
def test_values_that_are_equal_or_nearly(gap):
    def of_smooth(y):
        return float(divergence(y, smooth(y), smooth_slope(y), rows=4, cols=6, noise_std=1.0))

    y = np.array([2.0 + gap, 2.0, 2.0 - gap, 0.7])
    with jax.enable_x64(True):
        exact = of_smooth(y + np.array([1e-5, 0, -1e-5, 0]))
    # Where the quotient takes over, at a relative gap of 3e-4, rounding costs 1e-7 / 3e-4.
    assert of_smooth(np.float32(y)) == pytest.approx(exact, rel=5e-4)


@pytest.mark.parametrize(("rows", "cols"), [(30, 30), (30, 70), (70, 30)])
def test_the_identity_has_one_for_each_entry_and_nothing_has_none(rows, cols):
    y = np.linspace(3.0, 0.1, 30) + np.array([[0.0], [0.3], [1.0]])
    shape = {"rows": rows, "cols": cols, "noise_std": 1.0}
    np.testing.assert_allclose(divergence(y, y, np.ones_like(y), **shape), rows * cols, rtol=1e-5)
    np.testing.assert_array_equal(divergence(y, 0 * y, 0 * y, **shape), 0)
    # A component kept as it is: f = y for the first five.
    first = np.arange(30) < 5
    kept, dropped = (divergence(y, y * part, part + 0 * y, **shape) for part in (first, ~first))
    np.testing.assert_allclose(kept + dropped, rows * cols, rtol=1e-5)


@pytest.mark.parametrize(("rows", "cols"), [(200, 200), (100, 400)])
def test_the_law_stands_in_for_values_that_are_not_given(rows, cols):
    shape = {"rows": rows, "cols": cols, "noise_std": 0.4}
    threshold = marchenko_pastur.detection_threshold(**shape)
    noisy = 0.4 * np.random.default_rng(3).standard_normal((rows, cols))
    noisy[range(4), range(4)] += np.array([8.0, 4.0, 2.0, 1.5]) * threshold
    y = np.linalg.svd(noisy, compute_uv=False)
    f, slope = shrunken_and_slope(y, shrinker=shrinkage.frobenius, **shape)
    whole = divergence(y, f, slope, **shape)
    leading = divergence(y[:6], f[:6], slope[:6], **shape)
    # Four components are (m + n) each, about; the law is off by the fluctuation of the bulk, and rank / min(m, n).
    assert float(leading) == pytest.approx(float(whole), rel=0.02)
    # Ritz values in the bulk are not singular values; they are not counted.
    ritz = y[:6] * np.array([1, 1, 1, 1, 0.9, 0.4])
    assert float(divergence(ritz, f[:6], slope[:6], **shape)) == pytest.approx(float(leading), rel=1e-6)


@pytest.mark.parametrize(("rows", "cols"), [(50, 50), (20, 300), (300, 20)])
def test_mean_inverse_gap_of_the_law(rows, cols):
    # One value given, of which nothing but the tail is left by a slope that cancels the rest.
    shape = {"rows": rows, "cols": cols, "noise_std": 0.7}
    edge, lower = marchenko_pastur.bulk_edge(**shape), marchenko_pastur.lower_edge(**shape)
    y = 1.2 * edge
    slope = -abs(rows - cols) / y
    tail = float(divergence([y], [1.0], [slope], **shape))

    def integrand(x):
        return float(marchenko_pastur.singular_value_density(x, **shape)) / (y**2 - x**2)

    mean = integrate.quad(integrand, lower, edge, epsrel=1e-6, limit=200)[0]
    others = min(rows, cols) - 1
    # The slope and the ratio cancel to float32 of |m - n| / y.
    assert tail == pytest.approx(2 * y * others * mean, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    ratios=st.lists(st.floats(0.0, 3.0, width=32) | st.sampled_from([0.0, 1.0]), min_size=8, max_size=8),
    noise_std=st.sampled_from([0.0, 1e-25, 1e-6, 1.0, 1e12]),
    count=st.sampled_from([3, 8]),
    shrinker=st.sampled_from(SHRINKERS),
)
@example(ratios=[1.0, 1.5e-23, *[0.0] * 6], noise_std=0.0, count=3, shrinker=SHRINKERS[0])  # where a square underflows
@example(ratios=[1.0, 1.5e-23, *[0.0] * 6], noise_std=0.0, count=8, shrinker=SHRINKERS[0])
def test_always_finite_and_never_beyond_the_bound(ratios, noise_std, count, shrinker):
    shape = {"rows": 8, "cols": 12, "noise_std": np.float32(noise_std)}
    edge = np.float32(marchenko_pastur.bulk_edge(**shape)) or np.float32(1.0)
    y = np.sort(np.array(ratios, np.float32))[::-1] * edge
    y[0] = np.nextafter(y[0], np.float32(np.inf))  # where y is e: the next value above it
    y = y[:count]
    f, slope = shrunken_and_slope(y, shrinker=shrinker, **shape)
    div_d = divergence(y, f, slope, **shape)
    # 8 single terms and 28 pairs, twice, each at most sqrt(m n); the tail of all others is within them.
    assert abs(float(div_d)) <= 8 * (96**0.5 + 4) + 2 * 28 * 96**0.5 + 8 * 16
    weight = float(stein.blend_weight(np.sum((f - y) ** 2), div_d, **shape))
    assert 0 <= weight <= 1


@pytest.mark.parametrize("shrinker", SHRINKERS)
def test_slope_is_the_derivative(shrinker):
    shape = {"rows": 30, "cols": 50, "noise_std": 0.5}
    y = np.linspace(0.5, 4.0, 41) * marchenko_pastur.bulk_edge(**shape)
    with jax.enable_x64(True):
        above, below = (shrunken_and_slope(y + step, shrinker=shrinker, **shape)[0] for step in (1e-6, -1e-6))
        _, slope = shrunken_and_slope(y, shrinker=shrinker, **shape)
    difference = (np.asarray(above) - np.asarray(below)) / 2e-6
    np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-7)


def test_an_estimate_from_divergence_and_distance():
    # Of Y itself the error is the noise, m n s^2; of the zero matrix it is |G|^2, and |Y|^2 - m n s^2 estimates that.
    shape = {"rows": 6, "cols": 7, "noise_std": 0.5}
    assert float(stein.risk(0.0, 42.0, **shape)) == pytest.approx(42 * 0.25)
    assert float(stein.risk(30.0, 0.0, **shape)) == pytest.approx(30.0 - 42 * 0.25)


@settings(max_examples=30, deadline=None)
@given(distance=st.floats(0.1, 100.0), div_d=st.floats(-20.0, 60.0), std=st.floats(0.1, 2.0))
def test_the_blend_minimises_the_estimate(distance, div_d, std):
    # (1 - a) Y + a D has the distance a^2 |D - Y|^2 and the divergence m n - a (m n - div D).
    shape = {"rows": 6, "cols": 7, "noise_std": std}
    a = np.linspace(0, 1, 1001)
    risks = stein.risk(a**2 * distance, 42 - a * (42 - div_d), **shape)
    chosen = float(stein.blend_weight(distance, div_d, **shape))
    assert chosen == pytest.approx(a[np.argmin(risks)], abs=0.1)
    own = stein.risk(chosen**2 * distance, 42 - chosen * (42 - div_d), **shape)
    assert float(own) <= float(np.min(risks)) + 1e-5 * (distance + 42 * std**2)


def test_without_noise_or_difference_the_matrix_stays():
    shape = {"rows": 6, "cols": 7}
    assert float(stein.blend_weight(3.0, 10.0, **shape, noise_std=0.0)) == 0
    assert float(stein.blend_weight(0.0, 42.0, **shape, noise_std=0.0)) == 0
    assert float(stein.blend_weight(0.0, 10.0, **shape, noise_std=1.0)) == 0


def test_where_nothing_is_kept_the_blend_is_the_james_stein_estimator():
    shape = {"rows": 6, "cols": 7, "noise_std": jnp.float32(0.5)}
    squared_norm = jnp.array([5.0, 20.0])  # less than the noise has, and more
    weight = jax.jit(lambda norm: stein.blend_weight(norm, jnp.zeros(2), **shape))(squared_norm)
    np.testing.assert_allclose(1 - weight, [0.0, 1 - 42 * 0.25 / 20], rtol=1e-6)


def test_what_does_not_fit_is_refused():
    y = jnp.ones(5)
    with pytest.raises(ValueError, match="at most"):
        divergence(y, y, y, rows=4, cols=9, noise_std=1.0)
    with pytest.raises(ValueError, match="one shape"):
        divergence(y, y[:4], y, rows=9, cols=9, noise_std=1.0)
