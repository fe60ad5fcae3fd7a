"""Cyclic Poisson sampling: the data are split into groups, and the groups take turns (BandMF's participation)."""

from __future__ import annotations

from typing import NamedTuple

from scipy import stats

from dp_rmt.accounting.step import AT_LEAST_1, Step, Truncation, validated_num_steps
from dp_rmt.arguments import integer

RARE = 1e-12
"""The probability of any overflow in a run with the batch shape of `batch_size_without_overflow`."""


class Rounds(NamedTuple):
    """A run as the accountants see it: what `dp_rmt.accounting.epsilon` takes of it, and what delta has to pay first.

    Attributes:
      sampling_probability: with which a round samples an example of its group.
      num_steps: number of rounds.
      truncation: the fixed shape of the batch; None where an overflow is paid for by delta.
      delta_of_overflow: the part of delta that pays for batches that overflow.
    """

    sampling_probability: float
    num_steps: int
    truncation: Truncation | None
    delta_of_overflow: float


def rounds_of_run(
    *, num_groups: int, sampling_probability: float, num_steps: int, truncation: Truncation | None
) -> Rounds:
    """What a run of BandMF is composed of (Choquette-Choo et al. 2023, arXiv 2306.08153, theorem 4).

    An example belongs to one of b groups, and step t samples each example of group ``t mod b`` with probability b q.
    Where the strategy matrix has at most b bands, each gradient of an example moves rows of ``C G`` that none of its
    other gradients moves. The run is then at most ``ceil(T / b)`` Poisson-sampled Gaussians of probability b q, whose
    noise multiplier counts the norm of a column of C. A larger sample than the batch holds is cut. The probability of
    this in any round is part of delta; the derivation is in docs/math.md.

    Args:
      num_groups: b, at least 1. With 1 the run is that of independent noise, and its truncation is accounted as there.
      sampling_probability: q, the mean over all steps.
      num_steps: T.
      truncation: the fixed shape of the batch; None if no batch can overflow.

    Returns:
      `Rounds`.

    Raises:
      ValueError: an argument is out of its range, or b q is above 1.

    >>> rounds_of_run(num_groups=8, sampling_probability=0.01, num_steps=30, truncation=None)
    Rounds(sampling_probability=0.08, num_steps=4, truncation=None, delta_of_overflow=0.0)
    """
    groups = integer("num_groups", num_groups, AT_LEAST_1, lambda n: n >= 1)
    step = Step(1.0, sampling_probability, truncation)
    num_steps = validated_num_steps(num_steps)
    if groups == 1:
        return Rounds(step.sampling_probability, num_steps, truncation, 0.0)
    in_group = groups * step.sampling_probability
    if in_group > 1 + 1e-12:
        raise ValueError(
            f"num_groups={groups} with a sampling probability of {step.sampling_probability:g}: a batch would need "
            f"{in_group:.3g} times its group. Let num_groups be at most {int(1 / step.sampling_probability)}, the data "
            "size over the batch size"
        )
    num_rounds = -(-num_steps // groups)
    overflow = min(1.0, num_rounds * step.overflow_probability)
    return Rounds(min(in_group, 1.0), num_rounds, None, overflow)


def batch_size_without_overflow(
    num_examples: int, sampling_probability: float, num_steps: int, *, multiple_of: int = 1
) -> int:
    """The smallest batch shape that a whole run overflows with a probability of at most `RARE`.

    Args:
      num_examples: N.
      sampling_probability: q, the mean over all steps.
      num_steps: steps in which an example can take part.
      multiple_of: round up to a multiple of this.

    Returns:
      The batch size in examples; at most N rounded up to that multiple.

    >>> batch_size_without_overflow(67_349, 1000 / 67_349, 4, multiple_of=8)
    1240
    """
    others = stats.binom(num_examples - 1, sampling_probability)
    size = min(num_examples, int(others.isf(RARE / num_steps)) + 1)
    return -(-size // multiple_of) * multiple_of
