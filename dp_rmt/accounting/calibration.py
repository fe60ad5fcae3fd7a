"""The noise that a target epsilon needs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from scipy import optimize

from dp_rmt.accounting.composition import composed_epsilon
from dp_rmt.accounting.privacy_loss import BIN, SEARCH_BIN
from dp_rmt.accounting.step import Accountant, Step, Truncation

# Calibration gives up outside: below, the guarantee says nothing; above, bounds are mostly their own slack.
_MIN_NOISE_MULTIPLIER, _MAX_NOISE_MULTIPLIER = 0.2, 1e4


@functools.lru_cache(maxsize=32)  # the arms of an experiment ask the same question
def calibrate_noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sampling_probability: float,
    num_steps: int,
    accountant: Accountant = "pld",
    truncation: Truncation | None = None,
) -> float:
    """The smallest noise multiplier whose run is (epsilon, delta)-differentially private.

    Args:
      epsilon: the target, above 0. The others are as in the function `epsilon`.

    Returns:
      noise multiplier: std of the noise in the sum of clipped gradients, over the clip norm. Its epsilon is
      never above the target and at most 1e-4 of it below.

    Raises:
      ValueError: an argument is out of its range, or no noise multiplier from 0.2 to 10,000 fits.

    >>> sigma = calibrate_noise_multiplier(epsilon=3, delta=1e-5, sampling_probability=0.01, num_steps=1000)
    >>> round(sigma, 3)
    0.814
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"calibrate_noise_multiplier: epsilon must be positive and finite, got {epsilon}.")

    def solve(guess: float, factor: float, unspent: float, pld_bin: float) -> float:
        def epsilon_of(noise_multiplier: float) -> float:
            step = Step(noise_multiplier, float(sampling_probability), truncation, accountant)
            return composed_epsilon(step, num_steps, delta, pld_bin)

        return _solve(epsilon_of, epsilon, guess, factor, unspent)

    sigma = solve(guess=1.0, factor=2.0, unspent=1e-5, pld_bin=SEARCH_BIN)
    return solve(guess=sigma, factor=1.001, unspent=1e-4, pld_bin=BIN)


def _solve(epsilon_of: Callable, target: float, guess: float, factor: float, unspent: float) -> float:
    """The noise multiplier that spends from (1 - unspent) to 1 times `target`, bracketed from `guess`."""

    @functools.cache
    def gap(log_sigma: float) -> float:  # log epsilon is nearly linear in log sigma
        # The floor and the ceiling keep an epsilon of 0 or infinity from the interpolation.
        log_ratio = min(math.log(max(epsilon_of(math.exp(log_sigma)) / target, 1e-20)), 50.0)
        # Zero on the whole band of accepted answers: the root finder stops at an exact zero.
        return 0.0 if -unspent <= log_ratio <= 0 else log_ratio + unspent / 2

    low = high = math.log(guess)
    stride = math.log(factor)
    while gap(low) < 0:
        if low < math.log(_MIN_NOISE_MULTIPLIER):
            raise ValueError(
                f"calibrate_noise_multiplier: epsilon={target} is met by a noise multiplier below "
                f"{_MIN_NOISE_MULTIPLIER} and guarantees next to nothing. Lower epsilon."
            )
        high, low, stride = low, low - stride, min(2 * stride, math.log(2))
    while gap(high) > 0:
        if high > math.log(_MAX_NOISE_MULTIPLIER):
            raise ValueError(
                f"calibrate_noise_multiplier: epsilon={target} needs a noise multiplier above "
                f"{_MAX_NOISE_MULTIPLIER:g}. Raise epsilon or delta, or lower num_steps or "
                "sampling_probability; if batches overflow often, raise max_batch_size."
            )
        low, high, stride = high, high + stride, min(2 * stride, math.log(2))
    log_sigma = float(optimize.brentq(gap, low, high, xtol=1e-9)) if low < high else low
    while gap(log_sigma) > 0:  # a jump of the discretised bound: step over it, to the private side
        log_sigma += 1e-7
    return math.exp(log_sigma)
