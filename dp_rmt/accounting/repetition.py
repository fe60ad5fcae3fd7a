"""The best of a random number of runs: what it costs to publish that one alone.

Papernot & Steinke 2022 (arXiv 2110.03620), `dp_accounting.dp_event.RepeatAndSelectDpEvent`: the number of runs is drawn
beforehand from a known distribution, each run is an independent draw from one and the same mechanism (settings drawn at
random, then a run), and the best alone is published. The bound grows like the logarithm of the mean number, or less.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import optimize

from dp_rmt.accounting.noise_support import delta_of_truncation, log_of_inverse_box
from dp_rmt.accounting.renyi import composed_divergences, epsilon_of_divergences
from dp_rmt.accounting.step import Step, validated_delta


@dataclasses.dataclass(frozen=True)
class Repetitions:
    """The distribution of a random number of runs, as `dp_accounting.dp_event.RepeatAndSelectDpEvent` has it.

    With shape inf Poisson; else the truncated negative binomial distribution of Papernot & Steinke, definition 1,
    ``P[K = k] ~ (1 - gamma)^k prod_(l < k) (l + shape) / (l + 1)`` for k >= 1: with 1 geometric, with 0 logarithmic.

    Args:
      mean: of the number, above 1.
      shape: at least 0; the larger, the nearer to its mean is the number, and the dearer the choice.

    Raises:
      ValueError: out of range.
    """

    mean: float
    shape: float

    def __post_init__(self) -> None:
        if not 1 < self.mean < math.inf or not self.shape >= 0:
            raise ValueError(f"{self}: the mean must be above 1 and finite, the shape at least 0 (inf: Poisson)")

    @functools.cached_property
    def gamma(self) -> float:
        """The parameter of the truncated negative binomial distribution, from its mean.

        >>> Repetitions(mean=4.0, shape=1.0).gamma
        0.25
        """
        if self.shape == 1:
            return 1 / self.mean

        def mean(log_gamma: float) -> float:
            odds = math.expm1(-log_gamma)  # 1 / gamma - 1
            if self.shape == 0:
                return odds / -log_gamma
            return self.shape * odds / -math.expm1(self.shape * log_gamma)

        return math.exp(optimize.brentq(lambda x: math.log(mean(x) / self.mean), -700.0, -1e-9, xtol=1e-13))

    def draw(self, rng: np.random.Generator | None = None) -> int:
        """A number of runs; Poisson's can be 0.

        Args:
          rng: None for the operating system's entropy. Whoever could foretell the number would void the bound.
        """
        rng = np.random.default_rng() if rng is None else rng
        if math.isinf(self.shape):
            return int(rng.poisson(self.mean))
        if self.shape == 0:
            return int(rng.logseries(1 - self.gamma))
        count = 0
        while count == 0:
            count = int(rng.negative_binomial(self.shape, self.gamma))
        return count


def divergences_of_best(
    divergences: np.ndarray, repetitions: Repetitions, orders: np.ndarray | None = None
) -> np.ndarray:
    """Rényi divergences of the best of a random number of runs, Papernot & Steinke 2022.

    Truncated negative binomial (theorem 2), for every order a and the best order b:
    ``eps(a) + (1 + shape) ((1 - 1/b) eps(b) + log(1/gamma) / b) + log(mean) / (a - 1)``. Poisson (theorem 6):
    ``eps(a) + mean * delta(log(1 + 1/(a-1))) + log(mean) / (a - 1)``, with the delta of one run. `dp_accounting` has
    them for the mechanisms that its own Rényi accountant knows, to which truncated batches do not belong.

    Args:
      divergences: of one run, at `orders`.
      repetitions: distribution of the number of runs.
      orders: None for the accountant's own; all above 1.

    Returns:
      The bounds, at the same orders.
    """
    orders = np.asarray(rdp_privacy_accountant.RdpAccountant().orders if orders is None else orders)
    common = divergences + math.log(repetitions.mean) / (orders - 1)
    if math.isinf(repetitions.shape):
        deltas = [rdp_privacy_accountant.compute_delta(orders, divergences, math.log1p(1 / (a - 1)))[0] for a in orders]
        return common + repetitions.mean * np.array(deltas)
    elsewhere = (1 - 1 / orders) * divergences - math.log(repetitions.gamma) / orders
    bounds = common + (1 + repetitions.shape) * elsewhere.min()
    return np.minimum.accumulate(bounds[::-1])[::-1]  # divergences grow with the order, so a higher one bounds lower


def epsilon_of_best(
    steps: Mapping[Step, int], repetitions: Repetitions, *, delta: float, noise_support: float = math.inf
) -> float:
    """The epsilon of whoever publishes the best of a random number of runs, by Rényi divergences; an upper bound.

    Noise that ends at S standard deviations takes ``mean * T b`` of delta, and adds ``-T log gamma(B) / (a - 1)`` to
    the divergence of order a of one run (docs/math.md, "The best of a random number of runs").

    Args:
      steps: what one run consists of: how many steps of each kind.
      repetitions: distribution of the number of runs.
      delta: of the guarantee.
      noise_support: S; infinite for a Gaussian in exact arithmetic.

    Returns:
      epsilon, in nats; infinite if the end of the noise takes all of delta.

    Raises:
      ValueError: an argument is out of its range.

    >>> runs = Repetitions(mean=6.0, shape=1.0)
    >>> round(epsilon_of_best({Step(2.0, sampling_probability=0.02): 4}, runs, delta=1e-5), 4)
    0.4429
    """
    delta = validated_delta(delta) - repetitions.mean * math.fsum(
        delta_of_truncation(
            noise_support=noise_support,
            noise_multiplier=step.noise_multiplier,
            sampling_probability=step.sampling_probability,
            num_steps=count,
            truncation=step.truncation,
        )
        / step.sampling_probability  # whoever adds an example can leave the support whether it is sampled or not
        for step, count in steps.items()
    )
    if delta <= 0:
        return math.inf
    orders = np.asarray(rdp_privacy_accountant.RdpAccountant().orders)
    in_box = sum(steps.values()) * log_of_inverse_box(noise_support) / (orders - 1)
    return epsilon_of_divergences(divergences_of_best(composed_divergences(steps.items()) + in_box, repetitions), delta)
