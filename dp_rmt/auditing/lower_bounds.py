"""Lower bounds on epsilon from what an attack got right (NumPy, SciPy); the formulas are derived in docs/math.md.

A bound holds with the stated confidence if all choices (thresholds, ranks, the attack) were made before the counted
flips and runs were seen. A bound above the proven epsilon refutes the proof or, far more likely, the code.
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats


class Counts(NamedTuple):
    """What an attack said of independent runs, or of independent examples.

    Attributes:
      true_positives: runs with the canary of which the attack says "in".
      num_in: runs with the canary.
      false_positives: runs without it of which the attack says "in".
      num_out: runs without it.
    """

    true_positives: int
    num_in: int
    false_positives: int
    num_out: int


def one_run_p_value(num_canaries: int, num_guesses: int, num_correct: int, *, epsilon: float, delta: float) -> float:
    """The largest probability of this many right guesses under (epsilon, delta)-differential privacy.

    ``p = f(v) + 2 m delta max_(1<=i<=v) (f(v-i) - f(v)) / i`` with ``f(v) = P[Binomial(r, e^eps / (1 + e^eps)) >= v]``,
    m canaries, r guesses, v of them right (Steinke, Nasr & Jagielski 2023, arXiv 2305.08846, theorem 5.2 and
    appendix D). Each canary was included by a fair coin flip of its own.

    Args:
      num_canaries: m, all canaries whose coins were flipped.
      num_guesses: r, at most m, canaries whose inclusion the attack ventured to guess.
      num_correct: v, at most r.
      epsilon: at least 0.
      delta: in [0, 1).

    Returns:
      An upper bound of the probability of v or more right guesses, in [0, 1].

    Raises:
      ValueError: the numbers do not fit together.

    >>> one_run_p_value(10, 10, 10, epsilon=0.0, delta=0.0) == 0.5**10
    True
    """
    _check_guesses(num_canaries, num_guesses, num_correct)
    _check_delta(delta)
    if not epsilon >= 0:
        raise ValueError(f"one_run_p_value: epsilon must be at least 0, got {epsilon}")
    right = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(num_correct - 1, num_guesses, right))
    if delta == 0 or num_correct == 0:
        return min(tail, 1.0)
    fewer = np.arange(1, num_correct + 1)
    slack = np.max((stats.binom.sf(num_correct - fewer - 1, num_guesses, right) - tail) / fewer)
    return float(min(tail + 2 * num_canaries * delta * max(slack, 0.0), 1.0))


def one_run_epsilon(
    num_canaries: int, num_guesses: int, num_correct: int, *, delta: float, confidence: float = 0.95
) -> float:
    """The largest epsilon that the guesses of ONE run refute, at a delta.

    It is the epsilon at which `one_run_p_value` is ``1 - confidence``. If the run is (epsilon', delta)-differentially
    private for neighbours that differ by one added or removed example, this exceeds epsilon' with at most that
    probability.

    Args:
      num_canaries, num_guesses, num_correct, delta: as in `one_run_p_value`; the number of guesses must not depend on
        which of them are right.
      confidence: in (0, 1).

    Returns:
      epsilon in nats; 0 if nothing is refuted.

    Raises:
      ValueError: the numbers do not fit together.

    >>> round(one_run_epsilon(1000, 1000, 1000, delta=0.0), 2)  # 0.05^(1/1000) / (1 - 0.05^(1/1000)) = e^5.81
    5.81
    >>> one_run_epsilon(1000, 1000, 500, delta=0.0)
    0.0
    """
    _check_confidence(confidence)

    def refuted(epsilon: float) -> float:
        p_value = one_run_p_value(num_canaries, num_guesses, num_correct, epsilon=epsilon, delta=delta)
        return 1 - confidence - p_value

    if refuted(0.0) <= 0:
        return 0.0
    high = 1.0
    while refuted(high) > 0:
        high *= 2
    return float(optimize.brentq(refuted, 0.0, high, xtol=1e-9))


def clopper_pearson(
    successes: np.typing.ArrayLike, trials: int, *, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """An interval that holds the success probability with at least the confidence (Clopper & Pearson 1934).

    Each side errs with a probability of at most half of ``1 - confidence``. At p = ``low``, this many successes or more
    have exactly that probability. At p = ``high``, this many or fewer have it.

    Args:
      successes: integers of any shape, each from 0 to trials.
      trials: at least 1.
      confidence: in (0, 1).

    Returns:
      ``(low, high)``, float64 of the shape of `successes`.

    Raises:
      ValueError: more successes than trials, or no trial.

    >>> low, high = clopper_pearson(0, 100)
    >>> float(low), round(float(high), 4)  # 1 - 0.025^(1/100)
    (0.0, 0.0362)
    """
    k = np.asarray(successes)
    if operator.index(trials) < 1 or np.any(k < 0) or np.any(k > trials):
        raise ValueError(f"clopper_pearson: {k.tolist()} successes of {trials} trials are not possible")
    _check_confidence(confidence)
    tail = (1 - confidence) / 2
    low = np.where(k == 0, 0.0, stats.beta.ppf(tail, np.maximum(k, 1), trials - k + 1))
    high = np.where(k == trials, 1.0, stats.beta.isf(tail, k + 1, np.maximum(trials - k, 1)))
    return low, high


def repeated_runs_epsilon(counts: Counts, *, delta: float, confidence: float = 0.95) -> float:
    """A lower bound on epsilon from independent runs with and without one canary.

    Differential privacy implies ``P[out -> "in"] >= (P[in -> "in"] - delta) / e^eps``, and the same for "out"
    (Kairouz, Oh & Viswanath 2015). Both rates are taken at the worse ends of Clopper-Pearson intervals that share
    ``1 - confidence`` (Jagielski, Ullman & Oprea 2020):
    ``eps = max(ln((TPR_low - delta) / FPR_high), ln((TNR_low - delta) / FNR_high))``.

    Args:
      counts: counts of runs whose outcome did not choose the threshold (call `best_threshold` on other runs).
      delta: in [0, 1).
      confidence: in (0, 1).

    Returns:
      epsilon in nats; 0 if nothing is refuted.

    Raises:
      ValueError: the numbers do not fit together.

    >>> round(repeated_runs_epsilon(Counts(1000, 1000, 0, 1000), delta=0.0), 2)
    5.6
    """
    _check_delta(delta)
    return float(_epsilons(*counts, delta=delta, confidence=confidence))


def count(in_scores: np.ndarray, out_scores: np.ndarray, threshold: float) -> Counts:
    """How often the scores say "in", that is, exceed the threshold.

    >>> count(np.array([1.0, 3.0]), np.array([0.0, 1.0]), 2.0)
    Counts(true_positives=1, num_in=2, false_positives=0, num_out=2)
    """
    says_in = [int(np.sum(scores > threshold)) for scores in (in_scores, out_scores)]
    return Counts(says_in[0], len(in_scores), says_in[1], len(out_scores))


def best_threshold(
    in_scores: np.ndarray, out_scores: np.ndarray, *, delta: float, confidence: float = 0.95
) -> tuple[float, float]:
    """The threshold with the highest `repeated_runs_epsilon`; use it on OTHER runs than these.

    Args:
      in_scores: (n,) of tuning runs with the canary.
      out_scores: (k,) of tuning runs without.
      delta: of the bound.
      confidence: of the bound.

    Returns:
      ``(threshold, epsilon)``; thresholds lie midway between two neighbouring scores. The epsilon is that of the tuning
      runs. It has been searched for, so it is good only for choosing between attacks.

    >>> best_threshold(np.full(20, 4.0), np.full(20, 1.0), delta=0.0)[0]
    2.5
    """
    values = np.unique(np.concatenate([in_scores, out_scores]))
    candidates = values if len(values) == 1 else values[:-1] + np.diff(values) / 2
    true_positives, false_positives = (
        len(scores) - np.searchsorted(np.sort(scores), candidates, side="right") for scores in (in_scores, out_scores)
    )
    epsilons = _epsilons(
        true_positives, len(in_scores), false_positives, len(out_scores), delta=delta, confidence=confidence
    )
    best = int(np.argmax(epsilons))
    return float(candidates[best]), float(epsilons[best])


def _epsilons(
    true_positives: np.typing.ArrayLike,
    num_in: int,
    false_positives: np.typing.ArrayLike,
    num_out: int,
    *,
    delta: float,
    confidence: float,
) -> np.ndarray:
    # Two one-sided statements, each failing with at most half of 1 - confidence, carry both directions.
    tpr_low, _ = clopper_pearson(true_positives, num_in, confidence=confidence)
    _, fpr_high = clopper_pearson(false_positives, num_out, confidence=confidence)
    tiny = np.finfo(float).tiny
    says_in = np.log(np.maximum(tpr_low - delta, tiny) / fpr_high)
    says_out = np.log(np.maximum(1 - fpr_high - delta, tiny) / (1 - tpr_low))
    return np.maximum(np.maximum(says_in, says_out), 0.0)


def _check_guesses(num_canaries: int, num_guesses: int, num_correct: int) -> None:
    if not 0 <= operator.index(num_correct) <= operator.index(num_guesses) <= operator.index(num_canaries):
        raise ValueError(
            f"of {num_canaries} canaries {num_guesses} were guessed, {num_correct} of them right: "
            "give num_canaries >= num_guesses >= num_correct >= 0"
        )


def _check_delta(delta: float) -> None:
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be in [0, 1), got {delta}")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), such as 0.95; got {confidence}")
