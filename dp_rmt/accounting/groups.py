"""The epsilon of a group of examples: what a person with several rows has where the unit of privacy is a row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from scipy import stats

from dp_rmt.accounting.noise_support import MAX_PARAMETERS, largest_escape
from dp_rmt.accounting.privacy_loss import bin_width, rounding_allowance
from dp_rmt.accounting.step import AT_LEAST_1, Step, Truncation, validated_delta, validated_num_steps
from dp_rmt.arguments import integer

# Wider than for one example, because each bin of a mixture is found by a search. Over 1,000 steps it adds .03 at most.
_WIDEST_BIN = 5e-4


def epsilon_of_group(
    *,
    group_size: int,
    noise_multiplier: float,
    delta: float,
    sampling_probability: float,
    num_steps: int,
    truncation: Truncation | None = None,
    noise_support: float = math.inf,
) -> float:
    """The epsilon of (epsilon, delta)-differential privacy for k examples that are added or removed together.

    A step samples j of the k examples with probability ``Bin(j; k, q)``, and they move the sum by at most j clip norms.
    The pair ``sum_j Bin(j; k, q) N(j, sigma^2)`` and ``N(0, sigma^2)`` dominates it (Ganesh 2024, arXiv 2401.10294,
    theorem 3.1), and its privacy loss is composed over the steps. Where the other examples can overflow the batch, the
    shifts are 2 j (docs/math.md). The usual bound, k epsilon at a delta of about ``k exp((k - 1) epsilon) delta``, is
    far above this one.

    Args:
      group_size: k, the most examples of one person, at least 1 (`dp_rmt.batch_selection.bounded_rows`).
      noise_multiplier, delta, sampling_probability, num_steps, truncation, noise_support: as in `epsilon`, of the
        mechanism whose unit is an example.

    Returns:
      The epsilon, in nats; infinite where no finite bound is known.

    Raises:
      ValueError: an argument is out of its range.

    >>> run = {"noise_multiplier": 2.0, "delta": 1e-5, "sampling_probability": 0.01, "num_steps": 50}
    >>> [round(epsilon_of_group(group_size=k, **run), 2) for k in (1, 4)]
    [0.14, 0.62]
    """
    step = Step(noise_multiplier, sampling_probability, truncation)
    size = integer("group_size", group_size, AT_LEAST_1, lambda k: k >= 1)
    num_steps, delta = validated_num_steps(num_steps), validated_delta(delta)
    if step.noise_multiplier == 0:
        return math.inf
    whole = ((Step(step.noise_multiplier / size, step.sampling_probability, truncation), num_steps),)
    ends = num_steps * _escape_of_group(step, size, noise_support)
    if (left := delta - rounding_allowance(whole) - ends) <= 0:
        return math.inf
    # A thirtieth of the scale of a step's loss, which is k q / sigma or more, adds 2e-4 of its variance.
    wanted = min(_WIDEST_BIN, size * step.sampling_probability / step.noise_multiplier / 30)
    loss = _privacy_loss(step, size, max(bin_width(whole), wanted))
    return float(loss.self_compose(num_steps).get_epsilon_for_delta(left))


def _sampled(step: Step, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """How many of a group a step can sample, and with what probabilities; those of zero are left out."""
    counts = np.arange(group_size + 1)
    weights = stats.binom.pmf(counts, group_size, step.sampling_probability)
    return counts[weights > 0], weights[weights > 0] / weights.sum()


def _overflow_probability(step: Step, group_size: int) -> float:
    """The probability that the other examples leave room for fewer than the whole group."""
    if step.truncation is None:
        return 0.0
    others, room = step.truncation.num_examples - group_size, step.truncation.max_batch_size - group_size
    return float(stats.binom.sf(room, max(others, 0), step.sampling_probability)) if room >= 0 else 1.0


def _privacy_loss(step: Step, group_size: int, width: float) -> Any:
    counts, weights = _sampled(step, group_size)

    def of_shifts(per_example: float) -> Any:
        if len(counts) == 1:  # full batches: all of the group, in every step
            return privacy_loss_distribution.from_gaussian_mechanism(
                step.noise_multiplier / (per_example * counts[0]), value_discretization_interval=width
            )
        return privacy_loss_distribution.from_mixture_gaussian_mechanism(
            step.noise_multiplier, per_example * counts, weights, value_discretization_interval=width
        )

    overflow = _overflow_probability(step, group_size)
    return of_shifts(1.0) if overflow == 0 else of_shifts(2.0).compute_mixture(of_shifts(1.0), overflow)


def _escape_of_group(step: Step, group_size: int, noise_support: float) -> float:
    """What the end of the noise's support adds to the delta of one step (docs/math.md)."""
    if math.isinf(noise_support):
        return 0.0
    counts, weights = _sampled(step, group_size)
    overflow, q = _overflow_probability(step, group_size), step.sampling_probability
    escape = sum(
        share * weight * largest_escape(per_example * count / step.noise_multiplier, noise_support, MAX_PARAMETERS)
        for share, per_example in ((1 - overflow, 1), (overflow, 2))
        for count, weight in zip(counts, weights, strict=True)
        if share > 0 and count > 0
    )
    unsampled = 1.0 if q == 1 else (1 - q) ** group_size
    return float(escape / unsampled / (1 - 2 * stats.norm.sf(noise_support)))
