"""The noise that a target epsilon needs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

from scipy import optimize

from dp_rmt.accounting.composition import composed_epsilon, validated_accountant
from dp_rmt.accounting.noise_support import delta_of_truncation
from dp_rmt.accounting.step import Accountant, Step, Truncation, validated_delta, validated_num_steps
from dp_rmt.arguments import real

# Calibration gives up outside of these. Below, the guarantee says nothing; above, bounds are mostly their own slack.
_MIN_NOISE_MULTIPLIER, _MAX_NOISE_MULTIPLIER = 0.2, 1e4
# The search has bins this many times wider than results have, which takes a tenth of the time.
_COARSE = 10.0
# The part of delta that the end of the noise's support may take.
_SHARE_OF_TRUNCATION = 0.01


def calibrate_noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sampling_probability: float,
    num_steps: int,
    accountant: Accountant = "pld",
    truncation: Truncation | None = None,
    noise_support: float = math.inf,
) -> float:
    """Finds the smallest noise multiplier whose run is (epsilon, delta)-differentially private.

    Args:
      epsilon: the target, above 0. The other arguments are those of the function `epsilon`.

    Returns:
      The noise multiplier: std of the noise in the sum of clipped gradients, over the clip norm. Its epsilon is never
      above the target, and at most 1e-4 of the target below it. It is lower only where more noise is needed to keep
      `delta_of_truncation` below 1% of delta, and for a delta below 1e-10: there the rounding of the accountant's FFT
      moves epsilon by up to 1% from one noise multiplier to the next. Every epsilon is an upper bound all the same,
      because three times the largest rounding is taken from delta before it is read (`rounding_allowance`).

    Raises:
      ValueError: an argument is out of its range, or no noise multiplier from 0.2 to 10,000 fits.

    >>> sigma = calibrate_noise_multiplier(epsilon=3, delta=1e-5, sampling_probability=0.01, num_steps=1000)
    >>> round(sigma, 3)
    0.814
    """
    step = Step(1.0, sampling_probability, truncation)
    target = real("epsilon", epsilon, "be positive and finite", lambda x: 0 < x < math.inf)
    num_steps, delta = validated_num_steps(num_steps), validated_delta(delta)
    accountant = validated_accountant(accountant)
    return _calibrated(_Run(step.sampling_probability, truncation, num_steps, delta, accountant, noise_support), target)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Everything about a run but its noise."""

    sampling_probability: float
    truncation: Truncation | None
    num_steps: int
    delta: float
    accountant: Accountant
    noise_support: float

    def epsilon(self, noise_multiplier: float, coarseness: float = 1.0) -> float:
        steps = ((Step(noise_multiplier, self.sampling_probability, self.truncation), self.num_steps),)
        return composed_epsilon(steps, self.delta, self.accountant, self.noise_support, coarseness)

    def delta_of_truncation(self, noise_multiplier: float) -> float:
        return delta_of_truncation(
            noise_support=self.noise_support,
            noise_multiplier=noise_multiplier,
            sampling_probability=self.sampling_probability,
            num_steps=self.num_steps,
            truncation=self.truncation,
        )


@functools.lru_cache(maxsize=32)  # the arms of an experiment ask the same question
def _calibrated(run: _Run, target: float) -> float:
    least = _least_for_support(run)
    coarse = _solve(lambda sigma: run.epsilon(sigma, _COARSE), run, target, guess=1.0, factor=2.0, unspent=1e-5)
    return max(least, _solve(run.epsilon, run, target, guess=coarse, factor=1.001, unspent=1e-4))


def _least_for_support(run: _Run) -> float:
    """The smallest noise multiplier from 0.2 on with which the end of the noise's support keeps to its share."""
    share = _SHARE_OF_TRUNCATION * run.delta
    if (missing := run.delta_of_truncation(_MAX_NOISE_MULTIPLIER)) > share:
        raise ValueError(
            f"calibrate_noise_multiplier: delta={run.delta} is too small for noise that ends at {run.noise_support:g} "
            f"standard deviations: at a noise multiplier of {_MAX_NOISE_MULTIPLIER:g} the end costs {missing:.2g}, "
            f"and at most 1% of delta may go there. Raise delta above {100 * missing:.2g}, or lower num_steps or "
            "sampling_probability."
        )
    if run.delta_of_truncation(_MIN_NOISE_MULTIPLIER) <= share:
        return _MIN_NOISE_MULTIPLIER

    def excess(log_sigma: float) -> float:
        return math.log(run.delta_of_truncation(math.exp(log_sigma)) / share)

    low, high = math.log(_MIN_NOISE_MULTIPLIER), math.log(_MAX_NOISE_MULTIPLIER)
    log_sigma = float(optimize.brentq(excess, low, high, xtol=1e-9))
    while excess(log_sigma) > 0:
        log_sigma += 1e-8
    return math.exp(log_sigma)


def _solve(
    epsilon_of: Callable[[float], float], run: _Run, target: float, guess: float, factor: float, unspent: float
) -> float:
    """Finds a noise multiplier that spends from (1 - unspent) to 1 times `target`; the bracket starts at `guess`."""

    @functools.cache
    def gap(log_sigma: float) -> float:  # log epsilon is nearly linear in log sigma
        # The floor and the ceiling keep an epsilon of 0 or infinity from the interpolation.
        log_ratio = min(math.log(max(epsilon_of(math.exp(log_sigma)) / target, 1e-20)), 50.0)
        # The gap is zero on the whole band of accepted answers, because the root finder stops at an exact zero.
        return 0.0 if -unspent <= log_ratio <= 0 else log_ratio + unspent / 2

    low = high = math.log(guess)
    least, most = math.log(_MIN_NOISE_MULTIPLIER), math.log(_MAX_NOISE_MULTIPLIER)
    stride = math.log(factor)
    while gap(low) < 0:
        if low <= least:
            raise ValueError(_too_easy(run, target))
        high, low, stride = low, max(low - stride, least), min(2 * stride, math.log(2))
    while gap(high) > 0:
        if high >= most:
            raise ValueError(_too_hard(run, target))
        low, high, stride = high, min(high + stride, most), min(2 * stride, math.log(2))
    log_sigma = float(optimize.brentq(gap, low, high, xtol=1e-9)) if low < high else low
    while gap(log_sigma) > 0:  # the discretised bound jumps here: step over it, to the private side
        log_sigma += 1e-7
    return math.exp(log_sigma)


def _too_easy(run: _Run, target: float) -> str:
    """Says what to do about a target that next to no noise meets: lower what binds it."""
    met = f"calibrate_noise_multiplier: epsilon={target} is met by a noise multiplier below {_MIN_NOISE_MULTIPLIER}"
    smallest = run.epsilon(_MIN_NOISE_MULTIPLIER)
    if smallest > 0:
        return f"{met} and guarantees next to nothing. Lower epsilon below {smallest:.3g}, its value there."
    used = -math.expm1(run.num_steps * math.log1p(-run.sampling_probability)) if run.sampling_probability < 1 else 1.0
    return (
        f"{met}, and so is every smaller epsilon: the run uses an example at all with probability {used:.2g}, and "
        f"delta={run.delta} lets the guarantee fail as often. Lower delta (usual: less than 1 / (data size)), or raise "
        "num_steps or sampling_probability."
    )


def _too_hard(run: _Run, target: float) -> str:
    """Says what to do about a target that no noise meets."""
    there = run.epsilon(_MAX_NOISE_MULTIPLIER)
    advice = "Raise epsilon or delta, or lower num_steps or sampling_probability."
    if run.accountant == "rdp":
        advice += " accountant='pld' is tighter."
    if Step(1.0, run.sampling_probability, run.truncation).overflow_probability > 0.01:
        advice += " Batches overflow often: raise max_batch_size."
    return (
        f"calibrate_noise_multiplier: epsilon={target} needs a noise multiplier above {_MAX_NOISE_MULTIPLIER:g}; "
        f"there, epsilon is {there:.3g}. {advice}"
    )
