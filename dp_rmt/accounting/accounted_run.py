"""A run as the accountants see it, whether its noise is independent or correlated over the steps."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, get_args

from dp_rmt.accounting.calibration import calibrate_noise_multiplier
from dp_rmt.accounting.composition import epsilon, epsilon_by_accountant
from dp_rmt.accounting.cyclic import Rounds, rounds_of_run
from dp_rmt.accounting.noise_support import delta_of_truncation
from dp_rmt.accounting.step import Accountant, Truncation
from dp_rmt.accounting.trade_off import largest_true_positive_rate


@dataclasses.dataclass(frozen=True)
class AccountedRun:
    """Some updates of one mechanism. Where groups take turns, delta first pays for batches that overflow.

    Attributes:
      noise_multiplier: as of the functions of this package.
      sampling_probability: q, the mean over all steps.
      num_steps: updates, at least 1.
      truncation: the fixed shape of the batch.
      noise_support: where the noise ends, in standard deviations.
      num_groups: b, in how many groups the examples take turns (`rounds_of_run`); 1 for independent noise.
    """

    noise_multiplier: float
    sampling_probability: float
    num_steps: int
    truncation: Truncation | None
    noise_support: float
    num_groups: int = 1

    @functools.cached_property
    def rounds(self) -> Rounds:
        """What it is composed of; errors as of `rounds_of_run`."""
        return rounds_of_run(
            num_groups=self.num_groups,
            sampling_probability=self.sampling_probability,
            num_steps=self.num_steps,
            truncation=self.truncation,
        )

    def epsilon(self, delta: float, accountant: Accountant = "pld") -> float:
        """The epsilon after these updates; infinite without noise, and where delta does not pay for overflows."""
        left = self._left_of(delta)
        return math.inf if left is None else epsilon(delta=left, accountant=accountant, **self._composed())

    def epsilon_by_accountant(self, delta: float) -> dict[str, float]:
        """The bound of each accountant alone, by its name; see the function in `dp_rmt.accounting`."""
        left = self._left_of(delta)
        if left is None:
            return dict.fromkeys(get_args(Accountant), math.inf)
        return epsilon_by_accountant(delta=left, **self._composed())

    def calibrated_noise_multiplier(self, epsilon: float, delta: float, accountant: Accountant = "pld") -> float:
        """The noise multiplier, in the place of its own, that reaches (epsilon, delta); see the function.

        Raises:
          ValueError: no noise multiplier does, or delta does not pay for batches that overflow.
        """
        if (left := self._left_of(delta)) is None:
            most = None if self.truncation is None else self.truncation.max_batch_size
            raise ValueError(
                f"batches of more than max_batch_size={most} are as probable as {self.rounds.delta_of_overflow:.2g}, "
                f"which delta={delta} does not pay for: raise max_batch_size, or leave it out"
            )
        composed = self._composed()
        del composed["noise_multiplier"]
        return calibrate_noise_multiplier(epsilon=epsilon, delta=left, accountant=accountant, **composed)

    def delta_of_truncation(self) -> float:
        """The part of delta for what the accountants do not see: the end of the noise, and batches that overflow."""
        return delta_of_truncation(**self._composed()) + self.rounds.delta_of_overflow

    def largest_true_positive_rate(self, false_positive_rate: float) -> float:
        """What a membership test of this rate of false alarms detects, at most."""
        overflow = self.rounds.delta_of_overflow
        if false_positive_rate + overflow >= 1:
            return 1.0
        # Without an overflow, a test of rate a among all outcomes has at most the rate a / (1 - overflow).
        among_others = false_positive_rate / (1 - overflow)
        rate = largest_true_positive_rate(false_positive_rate=among_others, **self._composed())
        return min(1.0, rate + overflow)

    def _left_of(self, delta: float) -> float | None:
        """What is left of delta for the accountants; None if overflows take it all."""
        left = delta - self.rounds.delta_of_overflow
        return None if left <= 0 < delta else left  # a delta that is no number above 0 is theirs to refuse

    def _composed(self) -> dict[str, Any]:
        return {
            "noise_multiplier": self.noise_multiplier,
            "sampling_probability": self.rounds.sampling_probability,
            "num_steps": self.rounds.num_steps,
            "truncation": self.rounds.truncation,
            "noise_support": self.noise_support,
        }
