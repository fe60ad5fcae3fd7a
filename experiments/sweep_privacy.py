"""What it costs in privacy to choose the best of several runs: composition, or repetition of a random number of runs.

Scores come from models that were trained on the private data, so a choice by scores has seen all runs. Two bounds:

- A fixed number of runs: all of them together, as if all were published. It holds for any choice.
- A random number of runs, drawn beforehand from a known distribution, each an independent draw from one and the same
  mechanism (settings drawn at random, then a run), of which the best alone is published: Papernot & Steinke 2022
  (arXiv 2110.03620), `dp_accounting.dp_event.RepeatAndSelectDpEvent`. It grows like the logarithm of the mean, or less.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import dp_accounting
import numpy as np
from dp_accounting.pld import pld_privacy_accountant
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import optimize

from dp_rmt import accounting
from dp_rmt.training.privacy_text import number


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


class Run(NamedTuple):
    """What is asked of a run.

    Attributes:
      job: its job, the unit that is repeated.
      statement: content of its `privacy.json`.
      config: content of its `config.json`.
    """

    job: str
    statement: Mapping[str, Any]
    config: Mapping[str, Any]


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
    count, jobs = len(runs), len({run.job for run in runs})
    if not all(run.statement["is_private"] for run in runs):
        return Choice("none", None, None, "At least one of the runs is not private, and so is no choice among them.")
    shared = [seed for seed, times in Counter(run.config["privacy"]["noise_seed"] for run in runs).items() if times > 1]
    if any(seed is not None for seed in shared):
        return Choice(
            "none",
            None,
            None,
            "Runs share a noise seed (config.privacy.noise_seed): the same noise cancels in the difference of two "
            "models, no bound for all of them together holds, and none for the best. That is right for a comparison "
            "on public or synthetic data. For a choice on private data leave the seeds out.",
        )
    delta = min(run.statement["delta"] for run in runs)
    alone = max(run.statement["epsilon"] or 0.0 for run in runs)
    if repetitions is None:
        return _composition(runs, count, delta, alone)
    per_job = {job: Counter(_mechanism(run) for run in runs if run.job == job) for job in {run.job for run in runs}}
    kinds = list(per_job.values())
    if any(kind != kinds[0] for kind in kinds):
        choice = _composition(runs, count, delta, alone)
        reason = "The number of jobs was random, but they differ in noise, sampling or steps, so that no bound for "
        return dataclasses.replace(choice, text=f"{reason}identical repetitions applies. {choice.text}")
    orders = np.asarray(rdp_privacy_accountant.RdpAccountant().orders)
    one_job = sum((n * _divergences(mechanism) for mechanism, n in kinds[0].items()), np.zeros(len(orders)))
    epsilon = float(rdp_privacy_accountant.compute_epsilon(orders, repeated(one_job, repetitions, orders), delta)[0])
    once = float(rdp_privacy_accountant.compute_epsilon(orders, one_job, delta)[0])
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
        "the best to be chosen by a rule fixed before.",
    )


def _composition(runs: Sequence[Run], count: int, delta: float, alone: float) -> Choice:
    accountant = pld_privacy_accountant.PLDAccountant()
    for (_, *settings, num_steps), times in Counter(_mechanism(run) for run in runs).items():
        accountant.compose(_event(settings, num_steps * times))
    epsilon = float(accountant.get_epsilon(delta))
    given = any(run.config["privacy"]["noise_seed"] is not None for run in runs)
    secret = " The seeds were given in the configs: it holds against those alone who cannot know them." if given else ""
    return Choice(
        "composition",
        epsilon,
        delta,
        f"The choice has seen all {count} runs, and costs what publishing all of them costs: "
        f"(ε = {number(epsilon, 'up')}, δ = {number(delta, 'up')}) for each training example, by composition of their "
        f"privacy loss distributions; a run alone has ε of at most {number(alone, 'up')}. The cheaper bound for the "
        "best of several runs (repeat and select, Papernot & Steinke 2022) does not apply: it needs a number of runs "
        f"that is drawn at random and kept secret; a fixed number gains nothing from it.{secret}",
    )


def _mechanism(run: Run) -> tuple[Any, ...]:
    """What the accounting of a run depends on; hashable."""
    names = ("noise_multiplier", "sampling_probability", "num_examples", "max_batch_size", "num_steps")
    return ("mechanism", *(run.statement[name] for name in names))


def _event(settings: Sequence[Any], num_steps: int) -> dp_accounting.DpEvent:
    noise_multiplier, sampling_probability, num_examples, max_batch_size = settings
    return accounting.dp_event(
        noise_multiplier=noise_multiplier,
        sampling_probability=sampling_probability,
        num_steps=num_steps,
        truncation=accounting.Truncation(num_examples, max_batch_size),
    )


def _divergences(mechanism: tuple[Any, ...]) -> np.ndarray:
    """Rényi divergences of a run at the accountant's orders."""
    _, noise_multiplier, sampling_probability, num_examples, max_batch_size, num_steps = mechanism
    truncation = accounting.Truncation(num_examples, max_batch_size)
    step = accounting.Step(noise_multiplier, sampling_probability, truncation)
    return num_steps * accounting.renyi_divergences(step)


def _name(repetitions: Repetitions) -> str:
    names = {math.inf: "Poisson", 1.0: "geometric", 0.0: "logarithmic"}
    return names.get(repetitions.shape, f"truncated negative binomial of shape {repetitions.shape:g}")
