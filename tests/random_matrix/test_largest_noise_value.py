"""The exact distribution of the largest noise value against closed forms, its limit and its definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, special

from dp_rmt.random_matrix import largest_noise_value, tracy_widom


@pytest.mark.parametrize(("value", "cols"), [(0.3, 1), (2.0, 1), (3.0, 7), (20.0, 300), (64.9, 4096), (224.0, 50257)])
def test_one_row_is_the_chi_distribution(value, cols):
    expected = special.gammainc(cols / 2, value**2 / 2)
    assert largest_noise_value.cdf(value, rows=1, cols=cols) == pytest.approx(expected, abs=1e-11)
    assert largest_noise_value.cdf(value, rows=cols, cols=1) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(("rows", "cols", "value"), [(2, 2, 1.5), (2, 5, 3.0), (3, 3, 2.5), (3, 6, 3.5)])
def test_small_matrices_by_integration_of_the_joint_density(rows, cols, value):
    def density(*y):
        y = np.array(y)
        differences = np.prod([abs(a**2 - b**2) for i, a in enumerate(y) for b in y[:i]])
        return differences * np.prod(y ** (cols - rows) * np.exp(-(y**2) / 2))

    def mass(end):  # over 0 < y_1 < y_2 < ... < end, where the density is smooth
        inner = [lambda *outer: (0, outer[0])] * (rows - 1)
        return integrate.nquad(density, [*inner, (0, end)], opts={"epsabs": 1e-7, "epsrel": 1e-7})[0]

    expected = mass(value) / mass(cols**0.5 + rows**0.5 + 4)
    assert largest_noise_value.cdf(value, rows=rows, cols=cols) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("rows", "cols"), [(8, 4096), (16, 16), (63, 65), (64, 4096)])
def test_quantile_inverts_the_cdf(rows, cols):
    for probability in (0.1, 0.5, 0.9, 0.99, 1 - 1e-6, 1 - 1e-9):
        value = largest_noise_value.quantile(probability, rows=rows, cols=cols)
        assert largest_noise_value.cdf(value, rows=rows, cols=cols) == pytest.approx(probability, abs=2e-10)


def test_cdf_is_monotone_and_bounded():
    values = np.linspace(0, 40, 300)
    probabilities = np.array([largest_noise_value.cdf(x, rows=5, cols=300) for x in values])
    assert probabilities[0] == 0
    assert probabilities[-1] == 1
    assert np.diff(probabilities).min() > -1e-11


@pytest.mark.parametrize(("rows", "cols"), [(65, 65), (65, 4096), (80, 320)])
@pytest.mark.parametrize(("false_alarm", "tolerance"), [(0.1, 0.02), (0.01, 0.03), (1e-3, 0.12)])
def test_tracy_widom_takes_over_where_it_is_right(rows, cols, false_alarm, tolerance):
    limit = tracy_widom.largest_singular_value_quantile(1 - false_alarm, rows=rows, cols=cols, noise_std=1.0)
    exact = 1 - largest_noise_value.cdf(limit, rows=rows, cols=cols)
    assert exact == pytest.approx(false_alarm, rel=tolerance)
