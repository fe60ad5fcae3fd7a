"""One step of DP-SGD as the accountants see it: a Poisson sample, perhaps truncated, and Gaussian noise."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Literal

import dp_accounting
from scipy import stats

Accountant = Literal["pld", "rdp"]


@dataclasses.dataclass(frozen=True)
class Truncation:
    """A Poisson batch that overflows its fixed shape keeps a uniformly random subset.

    Args:
      num_examples: examples in the data set, N (the larger one of two neighbours), at least 1.
      max_batch_size: the largest number of examples that one step may use, at least 1.
    """

    num_examples: int
    max_batch_size: int

    def __post_init__(self) -> None:
        if min(operator.index(self.num_examples), operator.index(self.max_batch_size)) < 1:
            raise ValueError(f"{self}: both must be at least 1.")

    def overflow_probability(self, sampling_probability: float) -> float:
        """Probability that the other N-1 examples fill the batch: P[Binomial(N-1, q) >= max_batch_size].

        >>> Truncation(num_examples=3, max_batch_size=2).overflow_probability(0.5)
        0.25
        """
        return float(stats.binom.sf(self.max_batch_size - 1, self.num_examples - 1, sampling_probability))


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of DP-SGD and how to account for it; the key of every cache here."""

    noise_multiplier: float
    sampling_probability: float
    truncation: Truncation | None
    accountant: Accountant = "pld"

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier must be finite and at least 0, got {self.noise_multiplier}.")
        if not 0 < self.sampling_probability <= 1:
            q = self.sampling_probability
            raise ValueError(f"sampling_probability (batch size / data size) must be in (0, 1], got {q}.")
        if self.accountant not in ("pld", "rdp"):
            raise ValueError(f"accountant must be 'pld' or 'rdp', got {self.accountant!r}.")


def validate_num_steps(num_steps: int) -> None:
    if operator.index(num_steps) < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")


def dp_event(
    *,
    noise_multiplier: float,
    sampling_probability: float,
    num_steps: int,
    truncation: Truncation | None = None,
) -> dp_accounting.DpEvent:
    """The run as an event of `dp_accounting`, to hand to any accountant: num_steps Poisson-sampled Gaussians.

    Args, Raises: as in `epsilon`.

    >>> dp_event(noise_multiplier=1.5, sampling_probability=0.04, num_steps=2250).count
    2250
    """
    Step(noise_multiplier, sampling_probability, truncation)  # validates
    validate_num_steps(num_steps)
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    step: dp_accounting.DpEvent = dp_accounting.PoissonSampledDpEvent(sampling_probability, gaussian)
    if truncation is not None:
        step = dp_accounting.TruncatedSubsampledGaussianDpEvent(
            truncation.num_examples, sampling_probability, truncation.max_batch_size, noise_multiplier
        )
    return dp_accounting.SelfComposedDpEvent(step, num_steps)
