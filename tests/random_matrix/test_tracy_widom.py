"""The Tracy-Widom law against published values, and the finite-size quantile against simulation."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dp_rmt.random_matrix import marchenko_pastur, tracy_widom


@pytest.mark.parametrize(
    ("probability", "expected"),
    [(0.05, -3.1804), (0.5, -1.2686), (0.9, 0.4501), (0.95, 0.9793), (0.99, 2.0234)],
)
def test_published_quantiles(probability, expected):
    # Johnstone 2001; Bejan 2005.
    assert tracy_widom.quantile(probability) == pytest.approx(expected, abs=6e-5)


def test_published_mean_and_variance():
    # Bornemann 2010. Moments by parts: E[x] = b - int F, E[x^2] = b^2 - 2 int x F, with F(b) = 1.
    start, end = -10.0, 13.0
    nodes, weights = np.polynomial.legendre.leggauss(60)
    points, weights = start + (end - start) * (nodes + 1) / 2, weights * (end - start) / 2
    probabilities = np.array([tracy_widom.cdf(x) for x in points])
    mean = end - weights @ probabilities
    second_moment = end**2 - 2 * weights @ (points * probabilities)
    assert mean == pytest.approx(-1.2065335745820, abs=1e-11)
    assert second_moment - mean**2 == pytest.approx(1.6077810345810, abs=1e-10)


def test_cdf_is_monotone_and_bounded():
    probabilities = np.array([tracy_widom.cdf(x) for x in np.linspace(-20, 20, 81)])
    assert probabilities[0] == 0
    assert probabilities[-1] == 1
    assert np.diff(probabilities).min() > -1e-13


@pytest.mark.parametrize("probability", [1e-12, 1e-6, 0.3, 1 - 1e-6, 1 - 1e-12])
def test_quantile_inverts_the_cdf(probability):
    assert tracy_widom.cdf(tracy_widom.quantile(probability)) == pytest.approx(probability, abs=1e-13)


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_quantile_refuses_what_it_cannot_resolve(probability):
    with pytest.raises(ValueError, match="must lie in"):
        tracy_widom.quantile(probability)


@pytest.mark.parametrize(("rows", "cols"), [(8, 8), (8, 32), (64, 16), (2, 300)])
def test_false_alarm_rate_of_simulated_noise(rows, cols):
    trials = 4000
    short, long = min(rows, cols), max(rows, cols)
    generator = np.random.default_rng(rows)
    # The triangular factor of the LQ decomposition has the singular values of the noise (Bartlett 1933).
    factor = np.tril(generator.standard_normal((trials, short, short)), -1)
    diagonal = np.sqrt(generator.chisquare(long - np.arange(short), (trials, short)))
    factor[:, np.arange(short), np.arange(short)] = diagonal
    largest = 0.2 * np.linalg.svd(factor, compute_uv=False)[:, 0]
    for rate in (0.05, 0.01):
        limit = tracy_widom.largest_singular_value_quantile(1 - rate, rows=rows, cols=cols, noise_std=0.2)
        alarms = np.mean(largest > limit)
        # Three standard errors, and the finite-size error of the law: within a fifth of the rate here.
        assert abs(alarms - rate) < 3 * np.sqrt(rate / trials) + rate / 5


def test_quantile_scales_with_the_noise_and_treats_rows_and_columns_alike():
    one = tracy_widom.largest_singular_value_quantile(0.99, rows=10, cols=40, noise_std=1.0)
    assert isinstance(one, float)
    two = tracy_widom.largest_singular_value_quantile(0.99, rows=40, cols=10, noise_std=2.0)
    assert two == pytest.approx(2 * one, rel=1e-12)
    traced = jax.jit(lambda s: tracy_widom.largest_singular_value_quantile(0.99, rows=10, cols=40, noise_std=s))
    assert float(traced(2.0)) == pytest.approx(two, rel=1e-6)


def test_quantile_approaches_the_bulk_edge():
    shape = {"rows": 10**6, "cols": 10**6, "noise_std": 1.0}
    ratio = tracy_widom.largest_singular_value_quantile(0.99, **shape) / marchenko_pastur.bulk_edge(**shape)
    assert ratio == pytest.approx(1.0, abs=1e-4)
    assert ratio > 1


def test_a_tiny_matrix_has_no_negative_singular_value():
    assert tracy_widom.largest_singular_value_quantile(1e-12, rows=1, cols=1, noise_std=1.0) >= 0


def test_a_shape_without_entries_is_refused():
    with pytest.raises(ValueError, match="at least one row and one column"):
        tracy_widom.largest_singular_value_quantile(0.5, rows=0, cols=3, noise_std=1.0)
