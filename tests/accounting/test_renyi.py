"""The Renyi divergences of a truncated step against brute force over all batches."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from scipy import special, stats

from dp_rmt import accounting
from dp_rmt.accounting import Truncation


def log_density(z, examples, sampling_probability, max_batch_size, sigma):
    """Log density at z of one truncated Poisson step over scalar examples, by enumeration of every batch."""
    weights: Counter[float] = Counter()
    for size in range(len(examples) + 1):
        probability = sampling_probability**size * (1 - sampling_probability) ** (len(examples) - size)
        for sample in itertools.combinations(examples, size):
            batches = list(itertools.combinations(sample, min(size, max_batch_size)))
            for batch in batches:
                weights[round(sum(batch), 9)] += probability / len(batches)
    means = np.array(list(weights))
    log_densities = stats.norm.logpdf(z[:, None], means, sigma)
    return special.logsumexp(log_densities, b=list(weights.values()), axis=1)


def exact_renyi(others, sampling_probability, max_batch_size, sigma, orders):
    """Larger one of the two Renyi divergences between data with and without the example 1, by integration."""
    # The trapezoidal rule is accurate to all digits for smooth integrands that decay on both sides.
    z = np.linspace(-100.0, 100.0, 20_001)
    without = log_density(z, others, sampling_probability, max_batch_size, sigma)
    with_x = log_density(z, (*others, 1.0), sampling_probability, max_batch_size, sigma)

    def divergence(log_p, log_q, a):
        return (special.logsumexp(a * log_p + (1 - a) * log_q) + math.log(z[1] - z[0])) / (a - 1)

    return np.array([max(divergence(with_x, without, a), divergence(without, with_x, a)) for a in orders])


ORDERS = [2.0, 3.0, 5.0, 8.0, 16.0]
OTHERS = [(-1.0,) * 7, (1.0,) * 7, (-1.0, 1.0, -1.0, 0.0, -1.0, 0.5, -0.5)]


def renyi_bound(sigma, sampling_probability, truncation):
    step = accounting.Step(sigma, sampling_probability, truncation)
    return accounting.renyi_divergences(step)[np.isin(RdpAccountant().orders, ORDERS)]


@pytest.mark.parametrize(
    ("sigma", "sampling_probability", "max_batch_size"),
    [(1.5, 0.5, 5), (3.0, 0.5, 5), (3.0, 0.5, 4), (2.0, 0.2, 2), (1.5, 0.8, 7), (2.0, 0.1, 1)],
)
def test_truncated_renyi_bound_holds_by_brute_force(sigma, sampling_probability, max_batch_size):
    bound = renyi_bound(sigma, sampling_probability, Truncation(8, max_batch_size))
    for others in OTHERS:
        assert (exact_renyi(others, sampling_probability, max_batch_size, sigma, ORDERS) <= bound).all()


def test_ignoring_truncation_would_promise_too_much():
    """What the bound is for: here, the exact divergence exceeds that of plain Poisson sampling."""
    exact = exact_renyi(OTHERS[0], 0.5, 5, 3.0, ORDERS)
    assert (exact[:3] > 1.04 * renyi_bound(3.0, 0.5, None)[:3]).all()


@pytest.mark.parametrize("sigma", [1.5, 3.0])
def test_brute_force_is_the_textbook_mechanism_where_nothing_overflows(sigma):
    exact = exact_renyi((0.0,) * 7, 0.2, 8, sigma, ORDERS)
    np.testing.assert_allclose(exact, renyi_bound(sigma, 0.2, None), rtol=1e-9)
