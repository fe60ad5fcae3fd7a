"""The part of delta that pays for the noise's support having an end, unlike a Gaussian's."""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from dp_rmt.accounting.step import AT_LEAST_1, Step, Truncation, validated_num_steps
from dp_rmt.arguments import integer, real

# 10^12 is more trainable parameters than any model has. What is missing grows with the square root of their number.
MAX_PARAMETERS = 2**40
_CELLS = 4096


def delta_of_truncation(
    *,
    noise_support: float,
    noise_multiplier: float,
    sampling_probability: float,
    num_steps: int,
    truncation: Truncation | None = None,
    num_parameters: int = MAX_PARAMETERS,
) -> float:
    """What noise that ends at S standard deviations adds to the delta of a Gaussian's guarantee.

    An example's gradient g pushes entry i beyond what noise alone can reach with probability ``h(|g_i| / sigma)``,
    where ``h(x) = Phi_c(S - x) - Phi_c(S)``. Whoever sees such an entry knows that the example was there. Over T steps

        delta <= T q k b / (1 - 2 Phi_c(S)),      b = max sum_i h(x_i),  |x|_2 <= 1 / sigma,
        k = 1 / (1 - q (1 - exp(-1 / (2 sigma^2)))),   1 for q = 1,

    with 2 / sigma in the place of 1 / sigma where the batch overflows. The derivation is in docs/math.md.

    Args:
      noise_support: S, above 3; infinite for a Gaussian in exact arithmetic.
      noise_multiplier, sampling_probability, num_steps, truncation: as in `epsilon`.
      num_parameters: how many trainable numbers get noise. The default is more than any model has.

    Returns:
      The part of delta, in [0, 1].

    Raises:
      ValueError: an argument is out of its range.

    >>> run = {"noise_multiplier": 0.7722, "sampling_probability": 1000 / 67_349, "num_steps": 202}
    >>> f"{delta_of_truncation(noise_support=5.2201, num_parameters=1, **run):.1e}"  # a float32 inverse error function
    '1.3e-04'
    >>> f"{delta_of_truncation(noise_support=9.155, **run):.1e}"
    '1.0e-12'
    """
    support = real("noise_support", noise_support, "be above 3 standard deviations, or infinite", lambda s: s > 3)
    step = Step(noise_multiplier, sampling_probability, truncation)
    num_steps = validated_num_steps(num_steps)
    num_parameters = integer("num_parameters", num_parameters, AT_LEAST_1, lambda n: n >= 1)
    if math.isinf(support):
        return 0.0
    if step.noise_multiplier == 0:
        return 1.0
    overflow, q = step.overflow_probability, step.sampling_probability
    of_step = (1 - overflow) * _of_shift(1 / step.noise_multiplier, support, q, num_parameters)
    if overflow > 0:
        of_step += overflow * _of_shift(2 / step.noise_multiplier, support, q, num_parameters)
    return min(1.0, float(num_steps * of_step / (1 - 2 * special.ndtr(-support))))


def log_of_inverse_box(noise_support: float, num_parameters: int = MAX_PARAMETERS) -> float:
    """``-log gamma(B)``: what a density gains that is a Gaussian's within S standard deviations in every coordinate.

    >>> f"{log_of_inverse_box(9.155):.0e}"
    '6e-08'
    """
    return float(-num_parameters * special.log1p(-2 * special.ndtr(-noise_support)))


def _of_shift(shift: float, support: float, sampling_probability: float, num_parameters: int) -> float:
    """``q k b`` for gradients of this many standard deviations of the noise."""
    q = sampling_probability
    unsampled = 1.0 if q == 1 else 1 + q * math.expm1(-(shift**2) / 2)
    return min(1.0, q * largest_escape(shift, support, num_parameters) / unsampled)


def largest_escape(shift: float, support: float, num_parameters: int) -> float:
    """b: the largest ``sum_i h(x_i)`` over vectors of norm `shift`.

    As a function of x^2, h is concave up to x (S - x) = 1 and convex from there to the other root. So in a maximum at
    most one entry lies in the convex part, and the others share the rest of the norm equally. The size of that entry is
    the only unknown. Each cell of a grid of sizes is bounded by its ends, because h grows.
    """
    if shift >= (support + math.sqrt(support**2 - 4)) / 2:
        return 1.0
    largest = np.linspace(0.0, shift, _CELLS + 1)
    others = num_parameters - 1
    shared = np.sqrt((shift - largest) * (shift + largest) / max(others, 1))
    return float(np.max(_escape(largest[1:], support) + others * _escape(shared[:-1], support)))


def _escape(shift: np.ndarray, support: float) -> np.ndarray:
    """``h(x) = Phi_c(S - x) - Phi_c(S)``, without cancellation at small x."""
    log_tail = special.log_ndtr(shift - support)
    escape: np.ndarray = np.exp(log_tail) * -np.expm1(special.log_ndtr(-support) - log_tail)
    return escape
