"""The bulk and the spiked model against their defining equations and against simulation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from dp_rmt.random_matrix import marchenko_pastur

SHAPES = [(200, 200), (100, 400), (400, 100), (4, 4096), (1, 7)]
LARGE_SHAPES = [(200, 200), (100, 400), (400, 100)]


@functools.lru_cache
def noise_singular_values(rows, cols):
    """Singular values of eight draws of noise of standard deviation 0.3."""
    noise = 0.3 * np.random.default_rng(0).standard_normal((8, rows, cols))
    return np.linalg.svd(noise, compute_uv=False)


@pytest.mark.parametrize(("rows", "cols"), LARGE_SHAPES)
def test_edges_and_median_of_simulated_noise(rows, cols):
    values = noise_singular_values(rows, cols)
    shape = {"rows": rows, "cols": cols, "noise_std": 0.3}
    # At these sizes the mean of the largest value is 1.1% below the edge (Tracy-Widom), and one draw scatters
    # as much. The smallest is about s / sqrt(n) for square matrices, and a few % inside the bulk for others.
    assert values[:, 0].mean() == pytest.approx(marchenko_pastur.bulk_edge(**shape), rel=0.02)
    assert values[:, -1].mean() == pytest.approx(marchenko_pastur.lower_edge(**shape), abs=0.15)
    # The spectrum is rigid: the median fluctuates by O(1/n) of the edge.
    median = np.median(values, axis=1).mean()
    assert median == pytest.approx(marchenko_pastur.median_singular_value(**shape), rel=5e-3)


@pytest.mark.parametrize(("rows", "cols"), LARGE_SHAPES)
def test_density_matches_the_histogram_of_simulated_noise(rows, cols):
    values = noise_singular_values(rows, cols)
    shape = {"rows": rows, "cols": cols, "noise_std": 0.3}
    ends = np.linspace(0, 1.1 * marchenko_pastur.bulk_edge(**shape), 12)
    observed = np.histogram(values, ends)[0] / values.size
    for i, share in enumerate(observed):
        points = np.linspace(ends[i], ends[i + 1], 2001)
        density = marchenko_pastur.singular_value_density(points, **shape)
        assert share == pytest.approx(integrate.simpson(density, x=points), abs=0.01)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_density_integrates_to_one_with_its_median_at_a_half(rows, cols):
    shape = {"rows": rows, "cols": cols, "noise_std": 2.0}
    edge, lower = marchenko_pastur.bulk_edge(**shape), marchenko_pastur.lower_edge(**shape)
    # Cosine nodes: the density has square roots at both ends.
    angle = np.linspace(0, np.pi, 4001)
    points = (edge + lower) / 2 - (edge - lower) / 2 * np.cos(angle)
    density = np.asarray(marchenko_pastur.singular_value_density(points, **shape), np.float64)
    cumulative = integrate.cumulative_simpson(density * (edge - lower) / 2 * np.sin(angle), x=angle)
    # The thin bulk of 4 x 4096 has its ends rounded in float32.
    assert cumulative[-1] == pytest.approx(1.0, abs=1e-3)
    if min(rows, cols) > 1:
        at_median = np.interp(marchenko_pastur.median_singular_value(**shape), points[1:], cumulative)
        assert at_median == pytest.approx(0.5, abs=2e-3)


def test_density_of_square_noise_is_the_quarter_circle():
    points = [0.0, 10.0, 20.0, 21.0]
    density = marchenko_pastur.singular_value_density(points, rows=100, cols=100, noise_std=1.0)
    np.testing.assert_allclose(density, [2 / (np.pi * 10), np.sqrt(300) / (np.pi * 100), 0, 0], rtol=1e-6)


def test_median_of_square_noise():
    median = marchenko_pastur.median_singular_value(rows=100, cols=100, noise_std=0.1)
    # The quarter circle in closed form: F(2 sin(u)) = (2 u + sin(2 u)) / pi, which is 1/2 at 2 u = pi / 2 - D
    # with D = cos(D).
    assert median == pytest.approx(2 * np.sin((np.pi / 2 - 0.7390851332151607) / 2), rel=1e-12)
    # Gavish & Donoho 2014 publish the hard threshold over the median as 2.8582, from a coarser integration.
    assert 4 / np.sqrt(3) / median == pytest.approx(2.8582, rel=1e-4)


@pytest.mark.parametrize(("rows", "cols"), LARGE_SHAPES)
def test_noise_level_is_estimated_under_a_low_rank_signal(rows, cols):
    generator = np.random.default_rng(1)
    signal = 5 * generator.standard_normal((rows, 2)) @ generator.standard_normal((2, cols))
    noisy = signal + 0.02 * generator.standard_normal((rows, cols))
    values = np.linalg.svd(noisy, compute_uv=False)
    batch = marchenko_pastur.estimate_noise_std(np.stack([values, 3 * values]), rows=rows, cols=cols)
    np.testing.assert_allclose(batch, [0.02, 0.06], rtol=0.02)


def test_noise_level_needs_the_whole_spectrum():
    with pytest.raises(ValueError, match="last axis must have length"):
        marchenko_pastur.estimate_noise_std(np.ones(3), rows=4, cols=5)


@pytest.mark.parametrize(("rows", "cols"), LARGE_SHAPES)
@pytest.mark.parametrize("strength", [1.5, 4.0])
def test_forward_map_predicts_a_simulated_spike(rows, cols, strength):
    shape = {"rows": rows, "cols": cols, "noise_std": 0.3}
    signal = strength * marchenko_pastur.detection_threshold(**shape)
    noisy = 0.3 * np.random.default_rng(2).standard_normal((16, rows, cols))
    noisy[:, 0, 0] += signal  # Gaussian noise looks alike in every basis
    observed = np.linalg.svd(noisy, compute_uv=False)[:, 0].mean()
    # One outlier fluctuates by about s, the mean of 16 by a quarter of that.
    expected = float(marchenko_pastur.observed_singular_value(signal, **shape))
    assert observed == pytest.approx(expected, abs=3 * 0.3 / 4)


@given(
    rows=st.integers(1, 5000),
    cols=st.integers(1, 5000),
    noise_std=st.floats(1e-9, 1e3),
    strength=st.floats(1.05, 1e3),
)
@settings(max_examples=50, deadline=None)
def test_maps_are_inverse_and_equal_their_textbook_forms(rows, cols, noise_std, strength):
    shape = {"rows": rows, "cols": cols, "noise_std": noise_std}
    signal = strength * marchenko_pastur.detection_threshold(**shape)
    variance = noise_std**2
    expected = np.sqrt((signal + variance * rows / signal) * (signal + variance * cols / signal))
    observed = marchenko_pastur.observed_singular_value(signal, **shape)
    np.testing.assert_allclose(observed, expected, rtol=1e-6)

    a = expected**2 - variance * (rows + cols)
    textbook = np.sqrt((a + np.sqrt(a**2 - 4 * variance**2 * rows * cols)) / 2)
    np.testing.assert_allclose(textbook, signal, rtol=1e-6)
    # dl/dy = 1 / (1 - (t/l)^2) or so near the edge, and faster for thin matrices: rounding of y is amplified.
    edge = marchenko_pastur.bulk_edge(**shape)
    amplification = 1 + edge / (expected - edge)
    back = marchenko_pastur.signal_singular_value(observed, **shape)
    np.testing.assert_allclose(back, signal, rtol=4e-7 * amplification)


def test_maps_at_and_below_their_thresholds():
    shape = {"rows": 30, "cols": 50, "noise_std": 0.1}
    edge = np.float32(marchenko_pastur.bulk_edge(**shape))
    threshold = marchenko_pastur.detection_threshold(**shape)
    np.testing.assert_array_equal(marchenko_pastur.signal_singular_value([0.0, edge / 2, edge], **shape), 0.0)
    just_above = marchenko_pastur.signal_singular_value(np.nextafter(edge, np.float32(9)), **shape)
    assert float(just_above) == pytest.approx(threshold, rel=2e-3)
    below = marchenko_pastur.observed_singular_value([0.0, threshold / 2, threshold], **shape)
    np.testing.assert_allclose(below, edge, rtol=1e-6)


def test_noise_std_may_be_traced_and_zero():
    @jax.jit
    def edges_and_maps(noise_std):
        shape = {"rows": 3, "cols": 8, "noise_std": noise_std}
        values = jnp.array([0.0, 1.0, 5.0])
        return (
            marchenko_pastur.bulk_edge(**shape),
            marchenko_pastur.observed_singular_value(values, **shape),
            marchenko_pastur.signal_singular_value(values, **shape),
        )

    edge, observed, signal = edges_and_maps(0.0)
    assert edge == 0
    np.testing.assert_array_equal(observed, [0, 1, 5])
    np.testing.assert_array_equal(signal, [0, 1, 5])


def test_bfloat16_is_computed_in_float32():
    observed = jnp.array([5.0], jnp.bfloat16)
    signal = marchenko_pastur.signal_singular_value(observed, rows=4, cols=4, noise_std=1.0)
    assert signal.dtype == jnp.float32
    assert signal == 4.0


@pytest.mark.parametrize(("rows", "cols"), [(0, 3), (3, -1)])
def test_a_shape_without_entries_is_refused(rows, cols):
    for function in (
        marchenko_pastur.bulk_edge,
        marchenko_pastur.lower_edge,
        marchenko_pastur.detection_threshold,
        marchenko_pastur.median_singular_value,
    ):
        with pytest.raises(ValueError, match="at least one row and one column"):
            function(rows=rows, cols=cols, noise_std=1.0)
