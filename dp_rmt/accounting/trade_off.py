"""The trade-off curve of a run: what a test between neighbouring data sets can detect, at its rate of false alarms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from scipy import optimize

from dp_rmt.accounting.noise_support import delta_of_truncation
from dp_rmt.accounting.privacy_loss import composed_privacy_loss, rounding_allowance
from dp_rmt.accounting.step import Step, Truncation, validated_num_steps
from dp_rmt.arguments import real


def largest_true_positive_rate(
    *,
    false_positive_rate: float,
    noise_multiplier: float,
    sampling_probability: float,
    num_steps: int,
    truncation: Truncation | None = None,
    noise_support: float = math.inf,
) -> float:
    """An upper bound of the true positive rate of any membership test with a given false positive rate.

    The bound is ``inf over eps >= 0 of min(e^eps a + delta(eps), 1 - e^-eps (1 - delta(eps) - a))``. The curve
    delta(eps) is that of the whole run by its privacy loss distribution, for adding and for removing an example
    (Wasserman & Zhou 2010; Dong, Roth & Su 2022, proposition 6). One point (epsilon, delta) of that curve says far
    less: at epsilon 8 and a = 1% it allows a rate of 100%.

    Args:
      false_positive_rate: a, in (0, 1), the largest probability with which the test accuses an absent example.
      noise_multiplier, sampling_probability, num_steps, truncation, noise_support: as in `epsilon`.

    Returns:
      The rate with which a test detects a present example, in [a, 1].

    Raises:
      ValueError: an argument is out of its range.

    >>> run = {"noise_multiplier": 1.5, "sampling_probability": 0.04, "num_steps": 2250}
    >>> round(largest_true_positive_rate(false_positive_rate=0.01, **run), 2)
    0.18
    """
    step = Step(noise_multiplier, sampling_probability, truncation)
    num_steps = validated_num_steps(num_steps)
    alpha = real("false_positive_rate", false_positive_rate, "be in (0, 1)", lambda a: 0 < a < 1)
    return _largest(step, num_steps, alpha, noise_support)


@functools.lru_cache(maxsize=256)  # the statements of a run ask again when it stops, resumes, or is asked about
def _largest(step: Step, num_steps: int, alpha: float, noise_support: float) -> float:
    if step.noise_multiplier == 0:
        return 1.0
    missing = rounding_allowance(((step, num_steps),)) + delta_of_truncation(
        noise_support=noise_support,
        noise_multiplier=step.noise_multiplier,
        sampling_probability=step.sampling_probability,
        num_steps=num_steps,
        truncation=step.truncation,
    )
    distribution = composed_privacy_loss(((step, num_steps),))

    def delta(epsilon: float) -> float:
        return float(distribution.get_delta_for_epsilon(epsilon)) + missing

    # Both bounds are convex in e^eps or e^-eps. Above -log a the first exceeds 1.
    # The second is within e^-30 of 1 at 30.
    amplified = _least(lambda epsilon: math.exp(epsilon) * alpha + delta(epsilon), -math.log(alpha))
    mirrored = _least(lambda epsilon: 1.0 - math.exp(-epsilon) * (1.0 - delta(epsilon) - alpha), 30.0)
    return float(np.clip(min(amplified, mirrored), alpha, 1.0))


def _least(bound: Callable[[float], float], largest: float) -> float:
    """The smallest value that a search finds on [0, largest]. Any value that it finds is a bound."""
    found = optimize.minimize_scalar(bound, bounds=(0.0, largest), method="bounded", options={"xatol": 1e-4})
    return min(float(found.fun), bound(0.0))
