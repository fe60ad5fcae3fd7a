"""One step of DP-SGD as the accountants see it: a Poisson sample, perhaps truncated, and Gaussian noise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import dp_accounting
from scipy import stats

from dp_rmt.arguments import integer, real

Accountant = Literal["pld", "rdp"]
AT_LEAST_1 = "be at least 1 and an integer"


@dataclasses.dataclass(frozen=True)
class Truncation:
    """The fixed shape of a Poisson batch: a sample that overflows it keeps a uniformly random subset.

    Args:
      num_examples: N, the number of examples in the data set (the larger one of two neighbours), at least 1.
      max_batch_size: the largest number of examples that one step may use, at least 1.
    """

    num_examples: int
    max_batch_size: int

    def __post_init__(self) -> None:
        for name in ("num_examples", "max_batch_size"):
            size = integer(f"Truncation: {name}", getattr(self, name), AT_LEAST_1, lambda n: n >= 1)
            object.__setattr__(self, name, size)

    def overflow_probability(self, sampling_probability: float) -> float:
        """The probability that the other N-1 examples fill the batch: P[Binomial(N-1, q) >= max_batch_size].

        >>> Truncation(num_examples=3, max_batch_size=2).overflow_probability(0.5)
        0.25
        """
        return float(stats.binom.sf(self.max_batch_size - 1, self.num_examples - 1, sampling_probability))


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of DP-SGD. It is the key of every cache here.

    Args:
      noise_multiplier: std of the noise in the sum of clipped gradients, over the clip norm; 0 gives no privacy.
      sampling_probability: probability with which a step samples each example, in (0, 1].
      truncation: the fixed shape of the batch; None if no batch can overflow.

    Raises:
      ValueError: an argument is out of its range.
    """

    noise_multiplier: float
    sampling_probability: float
    truncation: Truncation | None = None

    def __post_init__(self) -> None:
        multiplier = real(
            "noise_multiplier", self.noise_multiplier, "be finite and at least 0", lambda x: 0 <= x < math.inf
        )
        probability = real(
            "sampling_probability (batch size / data size)",
            self.sampling_probability,
            "be in (0, 1]",
            lambda q: 0 < q <= 1,
        )
        if not (self.truncation is None or isinstance(self.truncation, Truncation)):
            raise ValueError(f"truncation must be an accounting.Truncation or None, got {self.truncation!r}.")
        object.__setattr__(self, "noise_multiplier", multiplier)
        object.__setattr__(self, "sampling_probability", probability)

    @property
    def overflow_probability(self) -> float:
        """The probability that the other examples fill the batch; 0 without a fixed shape."""
        return self.truncation.overflow_probability(self.sampling_probability) if self.truncation else 0.0


Steps = tuple[tuple[Step, int], ...]
"""What a run consists of: the kinds of steps, and how many of each, at least one. It is a key of caches."""


def validated_num_steps(num_steps: Any) -> int:
    """Returns the number of steps as a Python int of at least 1."""
    return integer("num_steps", num_steps, AT_LEAST_1, lambda n: n >= 1)


def validated_delta(delta: Any) -> float:
    """Returns a delta as a Python float in (0, 1)."""
    return real("delta", delta, "be in (0, 1); usual: less than 1 / (data size)", lambda x: 0 < x < 1)


def dp_event(
    *,
    noise_multiplier: float,
    sampling_probability: float,
    num_steps: int,
    truncation: Truncation | None = None,
) -> dp_accounting.DpEvent:
    """The run as an event of `dp_accounting` for any accountant: num_steps Poisson-sampled Gaussians.

    Arguments and errors are those of `epsilon`.

    >>> dp_event(noise_multiplier=1.5, sampling_probability=0.04, num_steps=2250).count
    2250
    """
    step = Step(noise_multiplier, sampling_probability, truncation)
    sigma, q = step.noise_multiplier, step.sampling_probability
    event: dp_accounting.DpEvent = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    if truncation is not None:
        event = dp_accounting.TruncatedSubsampledGaussianDpEvent(
            truncation.num_examples, q, truncation.max_batch_size, sigma
        )
    return dp_accounting.SelfComposedDpEvent(event, validated_num_steps(num_steps))
