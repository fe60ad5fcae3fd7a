"""The Renyi divergences of one step. For truncated batches they are a bound that is derived here."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import dp_accounting
import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import special

from dp_rmt.accounting.step import Step


@functools.lru_cache(maxsize=32)  # any number of equal steps has the divergences of one step
def renyi_divergences(step: Step) -> np.ndarray:
    """The Renyi divergences of one step at the accountant's orders a; with truncation, the following bound.

    D has one example x more than D'. S is the Poisson sample of the other N-1 examples, and M is the largest batch. S
    has the same law under D and D', and the moment exp((a-1) D_a(P||Q)) = E_Q[(P/Q)^a] is jointly convex in (P, Q), so
    the mean of the moments conditional on S bounds the moment, in both directions.

    - |S| < M: nothing overflows. D' releases sum(S) plus noise, D adds x with probability q: the subsampled
      Gaussian of sensitivity 1, with moment A_a(q, sigma).
    - |S| >= M, with probability p = P[Binomial(N-1, q) >= M]: D' releases a uniform M-subset T of S. D does
      so too, but with probability r = q M / (|S|+1) <= q it releases x and a uniform (M-1)-subset of S, which
      is T without a uniform element u of T. Condition on (T, u), too: the outputs are N(t) and
      (1-r) N(t) + r N(t - g_u + g_x), the subsampled Gaussian of sensitivity 2. Its moment A_a(r, sigma/2) is
      convex in r and smallest at r = 0, hence at most A_a(q, sigma/2).

    A_a bounds both directions of the divergence (Mironov, Talwar & Zhang 2019, arXiv 1908.10530). Hence
    exp((a-1) eps(a)) <= (1-p) exp((a-1) eps_1(a)) + p exp((a-1) eps_2(a)), and steps add up.
    """

    orders = rdp_privacy_accountant.RdpAccountant().orders
    if step.noise_multiplier == 0:
        return np.full(len(orders), np.inf)

    def log_moments(noise_multiplier: float) -> np.ndarray:
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        event = dp_accounting.PoissonSampledDpEvent(step.sampling_probability, gaussian)
        rdp = np.asarray(rdp_privacy_accountant.RdpAccountant().compose(event).rdp)
        moments: np.ndarray = (orders - 1.0) * rdp + _rounding_of_log_moments(orders)
        return moments

    log_moment = log_moments(step.noise_multiplier)
    if (overflow := step.overflow_probability) > 0.0:
        both = np.stack([log_moment, log_moments(step.noise_multiplier / 2)])
        # The weights enter as logarithms, not as `b=weights`: scipy divides by the smallest, which overflows at 1e-310.
        log_weights = np.array([[special.xlog1py(1.0, -overflow)], [np.log(overflow)]])
        log_moment = np.asarray(special.logsumexp(both + log_weights, axis=0))
    divergences: np.ndarray = log_moment / (orders - 1.0)
    divergences.flags.writeable = False
    return divergences


def composed_divergences(steps: Iterable[tuple[Step, int]]) -> np.ndarray:
    """The Renyi divergences of so many steps of each kind together, at the accountant's orders."""
    total: np.ndarray = np.sum([count * renyi_divergences(step) for step, count in steps], axis=0)
    return total


def epsilon_of_divergences(divergences: np.ndarray, delta: float) -> float:
    """The epsilon at `delta` of a run with these Renyi divergences at the accountant's orders."""
    orders = rdp_privacy_accountant.RdpAccountant().orders
    return float(rdp_privacy_accountant.compute_epsilon(orders, divergences, delta)[0])


def _rounding_of_log_moments(orders: np.ndarray) -> np.ndarray:
    """What dp_accounting's float64 may have taken from a log moment. It matters to steps of next to no divergence.

    The series of a fractional order ends at a term of exp(-30) = 9e-14. The logarithms of binomial coefficients are
    differences of log-gammas of size a log(a).
    """
    errors: np.ndarray = 2.0**-42 + 2.0**-50 * orders * np.log(orders)
    return errors
