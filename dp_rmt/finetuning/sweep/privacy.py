"""What it costs in privacy to choose the best of several runs: composition, or repetition of a random number of runs.

Scores come from models that were trained on the private data, so a choice by scores has seen all runs. Two bounds:

- A fixed number of runs: all of them together, as if all were published. It holds for any choice. Runs that share a
  sampling seed are not independent (`dp_rmt.finetuning.sweep.shared_samples`); of runs that share a noise seed nothing
  holds.
- A random number of runs, drawn beforehand from a known distribution, each an independent draw from one and the same
  mechanism (settings drawn at random, then a run), of which the best alone is published: Papernot & Steinke 2022
  (arXiv 2110.03620), `dp_accounting.dp_event.RepeatAndSelectDpEvent`. It grows like the logarithm of the mean, or less.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import optimize

from dp_rmt import accounting
from dp_rmt.finetuning.sweep.shared_samples import Mechanism, NoBoundError, Run, released, seeds_are_given, sharing
from dp_rmt.reporting.numbers import number


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

    @property
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


def repeated(divergences: np.ndarray, repetitions: Repetitions, orders: np.ndarray | None = None) -> np.ndarray:
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


@dataclasses.dataclass(frozen=True)
class Choice:
    """The cost of choosing among runs.

    Attributes:
      rule: "composition" or "repeat and select"; "none" where no bound holds.
      epsilon: None where no bound holds.
      delta: of epsilon.
      text: all this in words.
    """

    rule: str
    epsilon: float | None
    delta: float | None
    text: str


def cost_of_choosing(runs: Sequence[Run], repetitions: Repetitions | None = None) -> Choice:
    """The privacy of whoever publishes the best of these runs.

    Args:
      runs: all that have used the data, at least one; those that failed midway belong to them.
      repetitions: the distribution that their number was drawn from; None where it was fixed.

    Returns:
      A `Choice`.
    """
    if not all(run.statement["is_private"] for run in runs):
        return Choice("none", None, None, "At least one of the runs is not private, and so is no choice among them.")
    try:
        steps = released(runs)
        if repetitions is None:
            return _composition(
                runs,
                steps,
                "it needs a number of runs that is drawn at random and kept secret; a "
                "fixed number gains nothing from it",
            )
        jobs = {job: [run for run in runs if run.job == job] for job in dict.fromkeys(run.job for run in runs)}
        kinds = [released(own) for own in jobs.values()]
    except NoBoundError as error:
        return Choice("none", None, None, str(error))
    if sharing(runs) and steps != sum(kinds, Counter()):
        return _composition(
            runs, steps, "the number of jobs was random, but they share samples: no job is an independent draw"
        )
    if any(kind != kinds[0] for kind in kinds):
        return _composition(runs, steps, "the number of jobs was random, but they differ in noise, sampling or steps")
    return _selection(runs, kinds[0], len(jobs), repetitions)


def _selection(runs: Sequence[Run], steps: Mapping[Mechanism, int], jobs: int, repetitions: Repetitions) -> Choice:
    """The best of a random number of jobs, each of which consists of these steps."""
    orders = np.asarray(rdp_privacy_accountant.RdpAccountant().orders)
    delta, one_job = _delta(runs), _divergences(steps)
    # Of the end of the noise's support a job has its part; as many jobs as the mean have it in expectation.
    of_gaussian = delta - _ends_of_noise(runs) * repetitions.mean / jobs
    epsilon, once = (
        float(rdp_privacy_accountant.compute_epsilon(orders, divergences, of_gaussian)[0])
        for divergences in (repeated(one_job, repetitions, orders), one_job)
    )
    return Choice(
        "repeat and select",
        epsilon,
        delta,
        f"The number of jobs was drawn at random beforehand ({_name(repetitions)}, mean {repetitions.mean:g}; it came "
        f"out as {jobs}), each job with settings of its own draw. Whoever publishes the best job alone has "
        f"(ε = {number(epsilon, 'up')}, δ = {number(delta, 'up')}) for each training example, by Rényi divergences "
        f"(Papernot & Steinke 2022, theorem {6 if math.isinf(repetitions.shape) else 2}); one job has "
        f"ε = {number(once, 'up')} by the same accountant, which is loose for truncated batches (docs/sharp_edges.md). "
        "This table, the number of jobs and the other models are not covered: keep them. All jobs have to be done, and "
        f"the best to be chosen by a rule fixed before.{_caveats(runs)}",
    )


def _composition(runs: Sequence[Run], steps: Mapping[Mechanism, int], no_selection: str) -> Choice:
    """All runs together, with the reason why nothing better applies."""
    delta = _delta(runs)
    kinds = {_step(mechanism): count for mechanism, count in steps.items()}
    epsilon = accounting.epsilon_of_composition(kinds, delta=delta - _ends_of_noise(runs))
    alone = max(run.statement["epsilon"] or 0.0 for run in runs)
    return Choice(
        "composition",
        epsilon,
        delta,
        f"The choice has seen all {len(runs)} runs, and costs what publishing all of them costs: "
        f"(ε = {number(epsilon, 'up')}, δ = {number(delta, 'up')}) for each training example, by composition of their "
        f"privacy loss distributions; a run alone has ε of at most {number(alone, 'up')}. The cheaper bound for the "
        "best of several runs (repeat and select, Papernot & Steinke 2022) does not apply: "
        f"{no_selection}.{_caveats(runs)}",
    )


def _caveats(runs: Sequence[Run]) -> str:
    """What must be said of seeds that were given."""
    text = ""
    if sharing(runs):
        text += (
            " Runs share a sampling seed (config.privacy.sampling_seed): an example is in the same steps of all of "
            "them or in none, so that k such runs are counted as one with 1/sqrt(k) of the noise multiplier. That "
            "costs far more than seeds of their own."
        )
    if seeds_are_given(runs):
        text += " The seeds were given in the configs: this holds against those alone who cannot know them."
    return text


def _delta(runs: Sequence[Run]) -> float:
    return min(run.statement["delta"] for run in runs)


def _ends_of_noise(runs: Sequence[Run]) -> float:
    """The part of delta for what the runs' noise lacks of a Gaussian; those of several runs add up."""
    return math.fsum(run.statement.get("delta_of_truncation") or 0.0 for run in runs)


def _divergences(steps: Mapping[Mechanism, int]) -> np.ndarray:
    """Rényi divergences of all the steps together at the accountant's orders."""
    total = np.zeros(len(rdp_privacy_accountant.RdpAccountant().orders))
    for mechanism, count in steps.items():
        total += count * accounting.renyi_divergences(_step(mechanism))
    return total


def _step(mechanism: Mechanism) -> accounting.Step:
    truncation = accounting.Truncation(mechanism.num_examples, mechanism.max_batch_size)
    return accounting.Step(mechanism.noise_multiplier, mechanism.sampling_probability, truncation)


def _name(repetitions: Repetitions) -> str:
    names = {math.inf: "Poisson", 1.0: "geometric", 0.0: "logarithmic"}
    return names.get(repetitions.shape, f"truncated negative binomial of shape {repetitions.shape:g}")
