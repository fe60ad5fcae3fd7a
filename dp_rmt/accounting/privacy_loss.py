"""The privacy loss distribution of a run, discretised so that every bound from it is an upper bound."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from dp_accounting.pld import privacy_loss_distribution

from dp_rmt.accounting.step import Step, Steps

# The widest bin is that of dp_accounting, so that numbers agree with those of others.
_WIDEST_BIN = 1e-4
# The most bins of a step's distribution and of the run's. They hold time to seconds, memory to some hundred megabytes.
_MOST_BINS_OF_STEP, _MOST_BINS_OF_RUN = 2**20, 2**21
# dp_accounting keeps so many standard deviations on either side: a step to a mass of exp(-50), a run to 1e-15.
_STEP_REACH, _RUN_REACH = 10.0, 8.5


@functools.lru_cache(maxsize=2)  # epsilon and the trade-off curve of a run ask for the same distribution
def composed_privacy_loss(steps: Steps, coarseness: float = 1.0) -> Any:
    """The privacy loss distribution of all these steps together, both for adding and for removing an example."""
    width = bin_width(steps) * coarseness
    losses = (_privacy_loss(step, width).self_compose(count) for step, count in steps)
    return functools.reduce(lambda loss, other: loss.compose(other), losses)


def rounding_allowance(steps: Steps) -> float:
    """What float64 may have taken from a delta of the composed distribution; it is part of every delta read from it.

    The FFT that composes has an absolute error. Against the closed form for full batches it is below 7e-17 a step at 1
    to 10^6 steps, alike or of several kinds. Deltas of that size cannot be read from the distribution at all.
    """
    return sum(count for _, count in steps) * 2.0**-52


def is_nearly_exact(steps: Steps, delta: float) -> bool:
    """Whether an epsilon read at this delta is close to the exact one, so that no looser accountant can be below it."""
    few_digits = rounding_allowance(steps) > 0.01 * delta
    return not few_digits and bin_width(steps) <= 0.1 * _scale_of_run(steps)


def bin_width(steps: Steps) -> float:
    """The width of the bins in which the privacy loss is counted, in nats.

    A step's loss has the scale ``w = sqrt(D_2)``, ``D_2 = log(1 + q^2 (e^(1/sigma^2) - 1))`` its Renyi divergence of
    order 2; w is 1 / sigma for full batches and q / sigma for large sigma. Bins of width h add about h^2 / 6 to the
    variance of the loss (a loss between two bins counts as either), so h is a small part of w. It must not be too
    small: the masses of bins are differences of float64 numbers, with errors of 1e-16 / h, and negative ones become 0.
    That adds 1e-13 w / h^2 of the variance, and 4e-16 w / h^2 to the mass in each of T steps. The best w / h is about
    (w min(1e12, 4e15 / T))^(1/4) where this is below 30. Variances add up, so for steps of several kinds w is the root
    of the mean of w^2 over all steps. Wide distributions have wider bins, so that the number of bins stays bounded.
    """
    num_steps, scale = sum(count for _, count in steps), _scale_of_run(steps)
    wanted = min(_WIDEST_BIN, scale / min(30.0, (scale * min(1e12, 4e15 / num_steps)) ** 0.25))
    widths = [_width(step) for step, _ in steps]
    # The Chernoff bounds of the composition are taken at moments that see a range 1.75 times that of one step.
    width_of_run = math.fsum(
        2 * _RUN_REACH * math.sqrt(count) * _scale(step) + 3.5 * width
        for (step, count), width in zip(steps, widths, strict=True)
    )
    width: float = max(wanted, max(widths) / _MOST_BINS_OF_STEP, width_of_run / _MOST_BINS_OF_RUN)
    return width


def _width(step: Step) -> float:
    """The width of the range in which the privacy loss of one step is kept."""
    sigma, q = step.noise_multiplier, step.sampling_probability
    # Overflow doubles the sensitivity and looks both ways.
    sensitivity = 2.0 if step.overflow_probability > 0 else 1.0
    reach = sensitivity * _STEP_REACH / sigma + sensitivity**2 / (2 * sigma**2)
    return 2 * max(_log_mixture(q, reach), reach if q == 1 else -math.log1p(q * math.expm1(-reach)))


def _scale_of_run(steps: Steps) -> float:
    """The root mean square of the steps' scales."""
    mean_square = math.fsum(count * _scale(step) ** 2 for step, count in steps) / sum(count for _, count in steps)
    return math.sqrt(mean_square)


def _scale(step: Step) -> float:
    return math.sqrt(_log_mixture(step.sampling_probability**2, 1 / step.noise_multiplier**2))


def _log_mixture(weight: float, exponent: float) -> float:
    """log(1 - weight + weight exp(exponent)), without overflow."""
    if exponent < 500:
        return math.log1p(weight * math.expm1(exponent))
    return float(np.logaddexp(0.0, math.log(weight) + exponent))


@functools.lru_cache(maxsize=4)  # one distribution takes megabytes
def _privacy_loss(step: Step, pld_bin: float) -> Any:
    """The privacy loss distribution of one step, pessimistic, both for adding and for removing an example."""
    sigma, q = step.noise_multiplier, step.sampling_probability
    if step.truncation is None:
        return privacy_loss_distribution.from_gaussian_mechanism(
            sigma, value_discretization_interval=pld_bin, sampling_prob=q
        )
    num_examples, max_batch_size = step.truncation.num_examples, step.truncation.max_batch_size
    return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
        num_examples, q, max_batch_size, sigma, value_discretization_interval=pld_bin
    )
