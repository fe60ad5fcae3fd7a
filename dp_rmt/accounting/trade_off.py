"""The trade-off curve of a run: what a test between neighbouring data sets can detect at a rate of false alarms."""

from __future__ import annotations

import math

import numpy as np

from dp_rmt.accounting.privacy_loss import composed_privacy_loss
from dp_rmt.accounting.step import Step, Truncation, validate_num_steps

# Any epsilon gives a bound; these are close enough that the best of them is within 1e-5 of the infimum.
_NUM_EPSILONS = 1000


def largest_true_positive_rate(
    *,
    false_positive_rate: float,
    noise_multiplier: float,
    sampling_probability: float,
    num_steps: int,
    truncation: Truncation | None = None,
) -> float:
    """The largest true positive rate, at a false positive rate, of any membership test; an upper bound.

    ``inf over eps of min(e^eps a + delta(eps), 1 - e^-eps (1 - delta(eps) - a))`` with the curve delta(eps) of the
    whole run by its privacy loss distribution, for adding and for removing an example (Wasserman & Zhou 2010; Dong,
    Roth & Su 2022, proposition 6). One point (epsilon, delta) of that curve says far less: at epsilon 8 and a = 1% it
    allows a rate of 100%.

    Args:
      false_positive_rate: a, in (0, 1): with this probability, at most, the test accuses an absent example.
      noise_multiplier, sampling_probability, num_steps, truncation: as in `epsilon`.

    Returns:
      The rate with which a test detects a present example, in [a, 1].

    Raises:
      ValueError: an argument is out of its range.

    >>> run = {"noise_multiplier": 1.5, "sampling_probability": 0.04, "num_steps": 2250}
    >>> round(largest_true_positive_rate(false_positive_rate=0.01, **run), 2)
    0.18
    """
    step = Step(float(noise_multiplier), float(sampling_probability), truncation)
    validate_num_steps(num_steps)
    alpha = float(false_positive_rate)
    if not 0 < alpha < 1:
        raise ValueError(f"false_positive_rate must be in (0, 1), got {false_positive_rate}.")
    if step.noise_multiplier == 0:
        return 1.0
    # Beyond these, either bound is at least 1: e^eps a above the first, e^-eps (1 - a) hardly anything at the second.
    largest = max(-math.log(alpha), math.log1p(-alpha) + math.log(1e9))
    epsilons = np.linspace(0.0, largest, _NUM_EPSILONS)
    deltas = composed_privacy_loss(step, num_steps).get_delta_for_epsilon(epsilons)
    amplified = np.exp(epsilons) * alpha + deltas
    mirrored = 1.0 - np.exp(-epsilons) * (1.0 - deltas - alpha)
    return float(np.clip(min(amplified.min(), mirrored.min()), alpha, 1.0))
