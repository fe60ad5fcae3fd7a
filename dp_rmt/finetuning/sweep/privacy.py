"""What it costs in privacy to choose the best of several runs: composition, or repetition of a random number of runs.

Scores come from models that were trained on the private data, so a choice by scores has seen all runs. There are two
bounds:

- For a fixed number of runs, the bound is that of publishing all of them. It holds for any choice. Runs that share a
  sampling seed are not independent (`dp_rmt.accounting.steps_on_shared_samples`). For runs that share a noise seed no
  bound holds.
- For a random number of runs, of which only the best is published, there is `dp_rmt.accounting.epsilon_of_best`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from dp_rmt import accounting
from dp_rmt.accounting import Repetitions, Step
from dp_rmt.finetuning.sweep.spent_runs import NoBoundError, SpentRun, released, seeds_are_given, sharing
from dp_rmt.noise_addition import NOISE_SUPPORT
from dp_rmt.reporting.numbers import number


@dataclasses.dataclass(frozen=True)
class Choice:
    """The cost of choosing among runs.

    Attributes:
      rule: "composition" or "repeat and select"; "none" where no bound holds.
      epsilon: the bound; None where no bound holds.
      delta: the delta of epsilon; None where no bound holds.
      text: all this in words.
    """

    rule: str
    epsilon: float | None
    delta: float | None
    text: str


def cost_of_choosing(runs: Sequence[SpentRun], repetitions: Repetitions | None = None) -> Choice:
    """The privacy that publishing the best of these runs costs.

    Args:
      runs: all runs that have used the data, at least one; those that failed midway count, too.
      repetitions: the distribution that the number of jobs was drawn from; None where it was fixed.

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
    if any(run.num_groups > 1 for run in runs):
        return _composition(runs, steps, "the noise is correlated over steps, for which it is not derived here")
    if any(kind != kinds[0] for kind in kinds):
        return _composition(runs, steps, "the number of jobs was random, but they differ in noise, sampling or steps")
    return _selection(runs, kinds[0], len(jobs), repetitions)


def cost_of_scores(runs: Sequence[SpentRun]) -> str:
    """What all private scores of these runs cost a row of their evaluation data, in words; "" where none has any.

    Args:
      runs: all runs that have used the data. Their evaluation data is taken to be one data set.
    """
    guarantees = [run.statement.get("evaluation_guarantee") for run in runs]
    found = [guarantee for guarantee in guarantees if guarantee]
    if not found:
        return ""
    given = [run.seed("noise_seed") for run in runs]
    if any(seed is not None and given.count(seed) > 1 for seed in given):
        return (
            "Evaluation data: runs share a noise seed, and so the noise of their scores, which cancels: no bound for "
            "its rows is claimed."
        )
    steps = Counter[Step]()
    for _, _, noise, count in found:
        steps[Step(noise, sampling_probability=1.0)] += count
    delta = min(delta for _, delta, _, _ in found)
    epsilon = accounting.epsilon_of_composition(steps, delta=delta, noise_support=NOISE_SUPPORT)
    raw = len(runs) - len(found)
    others = f" {raw} of the runs gave scores without noise, which nothing bounds." if raw else ""
    return (
        f"Evaluation data: the scores of {len(found)} runs together have (ε = {number(epsilon, 'up')}, "
        f"δ = {number(delta, 'up')}) for each of its rows, if all runs were evaluated on it. That is beside what a "
        f"training {runs[0].unit} has.{others}"
    )


def _selection(runs: Sequence[SpentRun], steps: Mapping[Step, int], jobs: int, repetitions: Repetitions) -> Choice:
    """The best of a random number of jobs, each of which consists of these steps."""
    delta = _delta(runs)
    epsilon, once = best_of(steps, repetitions, delta=delta)
    return Choice(
        "repeat and select",
        epsilon,
        delta,
        f"The number of jobs was drawn at random beforehand ({name_of(repetitions)}, mean {repetitions.mean:g}; it "
        f"came out as {jobs}), each job with settings of its own draw. Whoever publishes the best job alone has "
        f"(ε = {number(epsilon, 'up')}, δ = {number(delta, 'up')}) for each training {runs[0].unit}, by Rényi "
        "divergences "
        f"(Papernot & Steinke 2022, theorem {6 if math.isinf(repetitions.shape) else 2}); one job has "
        f"ε = {number(once, 'up')} by the same accountant, which is loose for truncated batches (docs/sharp_edges.md). "
        "This table, the number of jobs and the other models are not covered: keep them. All jobs have to be done, and "
        f"the best to be chosen by a rule fixed before.{_caveats(runs)}",
    )


def best_of(steps: Mapping[Step, int], repetitions: Repetitions, *, delta: float) -> tuple[float, float]:
    """The epsilon of the best of a random number of jobs, and that of one job by the same accountant.

    Neither depends on the number that was drawn, to the last digit.
    """
    best = accounting.epsilon_of_best(steps, repetitions, delta=delta, noise_support=NOISE_SUPPORT)
    return best, accounting.epsilon_of_divergences(accounting.composed_divergences(steps.items()), delta)


def _composition(runs: Sequence[SpentRun], steps: Mapping[Step, int], no_selection: str) -> Choice:
    """All runs together, with the reason why nothing better applies."""
    delta = _delta(runs)
    epsilon = accounting.epsilon_of_composition(steps, delta=delta - _ends_of_noise(runs))
    alone = max(run.statement["epsilon"] or 0.0 for run in runs)
    return Choice(
        "composition",
        epsilon,
        delta,
        f"The choice has seen all {len(runs)} runs, and costs what publishing all of them costs: "
        f"(ε = {number(epsilon, 'up')}, δ = {number(delta, 'up')}) for each training {runs[0].unit}, by composition of "
        "their "
        f"privacy loss distributions; a run alone has ε of at most {number(alone, 'up')}. The cheaper bound for the "
        "best of several runs (repeat and select, Papernot & Steinke 2022) does not apply: "
        f"{no_selection}.{_caveats(runs)}",
    )


def _caveats(runs: Sequence[SpentRun]) -> str:
    """Sentences that must be said where seeds were given."""
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


def _delta(runs: Sequence[SpentRun]) -> float:
    return min(run.statement["delta"] for run in runs)


def _ends_of_noise(runs: Sequence[SpentRun]) -> float:
    """The part of delta that pays for the finite support of the noise, and of batches; the parts of runs add up."""
    return math.fsum(run.statement.get("delta_of_truncation") or 0.0 for run in runs)


def name_of(repetitions: Repetitions) -> str:
    """The distribution of the number of jobs, in a word."""
    names = {math.inf: "Poisson", 1.0: "geometric", 0.0: "logarithmic"}
    return names.get(repetitions.shape, f"truncated negative binomial of shape {repetitions.shape:g}")
