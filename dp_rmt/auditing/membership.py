"""Membership inference: scores of examples, and how well they tell members from others, with confidence intervals.

Scores are higher for examples that seem to have been trained on. All are computed from raw private values: show results
only under ``nonprivate/`` or for public data.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

from dp_rmt.auditing.lower_bounds import clopper_pearson


class Interval(NamedTuple):
    """A value, and the ends of its confidence interval."""

    value: float
    low: float
    high: float


class RatesAt(NamedTuple):
    """A point of the ROC curve.

    Attributes:
      true_positive_rate: share of the members above the threshold, with its Clopper-Pearson interval.
      false_positive_rate: share of the others above it, and the interval of the rate that the threshold really has.
      threshold: the score above which something counts as a member.
    """

    true_positive_rate: Interval
    false_positive_rate: Interval
    threshold: float


def loss_scores(losses: np.ndarray) -> np.ndarray:
    """Minus the loss, because a model knows its members better (Yeom et al. 2018)."""
    return -np.asarray(losses)


def relative_loss_scores(losses: np.ndarray, base_losses: np.ndarray) -> np.ndarray:
    """By how much the loss fell below that of the base model, ``base - loss``: what is easy for any model cancels.

    This is calibration by a reference model (Watson et al. 2022; Carlini et al. 2021).

    Raises:
      ValueError: shapes differ.
    """
    if np.shape(losses) != np.shape(base_losses):
        raise ValueError(f"losses of shape {np.shape(losses)} against base losses of shape {np.shape(base_losses)}")
    return np.asarray(base_losses) - np.asarray(losses)


def min_k_scores(log_probabilities_NxL: np.ndarray, is_target_NxL: np.ndarray, *, share: float = 0.2) -> np.ndarray:
    """Min-K% probability: the mean log-probability of the least probable tokens (Shi et al. 2024, arXiv 2310.16789).

    Args:
      log_probabilities_NxL: log-probability of each token given those before it.
      is_target_NxL: bool, which tokens count.
      share: K / 100, in (0, 1]; at least one token of each example is taken.

    Returns:
      (N,) scores.

    Raises:
      ValueError: share out of range, or an example has no target.

    >>> min_k_scores(np.array([[-1.0, -5.0, -2.0, 0.0]]), np.array([[True, True, True, False]]), share=0.5)
    array([-5.])
    """
    if not 0 < share <= 1:
        raise ValueError(f"min_k_scores: share must be in (0, 1], got {share}")
    counts = np.sum(is_target_NxL, axis=1)
    if not counts.all():
        raise ValueError(f"min_k_scores: example {int(np.argmin(counts))} has no target token")
    kept = np.maximum((share * counts).astype(int), 1)
    ascending = np.sort(np.where(is_target_NxL, log_probabilities_NxL, np.inf), axis=1)
    is_kept = np.arange(ascending.shape[1]) < kept[:, None]
    return np.sum(np.where(is_kept, ascending, 0.0), axis=1) / kept


def auc(member_scores: np.ndarray, other_scores: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Area under the ROC curve, ``P[member > other] + P[equal] / 2``, with DeLong's interval.

    The variance is ``var(V) / n + var(W) / k``: V_i is the share of the others below member i, W_j the share of members
    above other j (DeLong, DeLong & Clarke-Pearson 1988). The interval is computed for the logit of the area (Pepe
    2003), and so stays in [0, 1]. Where the scores separate perfectly DeLong's variance is 0. The lower end is then the
    area at which min(n, k) independent pairs are all in the right order with probability alpha/2,
    ``(alpha/2)^(1 / min(n, k))``.

    Args:
      member_scores: (n,), n >= 2.
      other_scores: (k,), k >= 2.
      confidence: of the interval.

    Returns:
      value, low, high.

    Raises:
      ValueError: fewer than two scores on a side.

    >>> round(auc(np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.5])).value, 4)  # 6.5 of 9 pairs
    0.7222
    """
    members, others = np.asarray(member_scores, float), np.asarray(other_scores, float)
    n, k = len(members), len(others)
    if min(n, k) < 2:
        raise ValueError(f"auc needs two scores or more on either side, got {n} of members and {k} of others")
    ranks = stats.rankdata(np.concatenate([members, others]))  # ties share their mean rank
    below = (ranks[:n] - stats.rankdata(members)) / k
    above = 1 - (ranks[n:] - stats.rankdata(others)) / n
    value = float(below.mean())
    tail = (1 - confidence) / 2
    variance = below.var(ddof=1) / n + above.var(ddof=1) / k
    if variance == 0 or not 0 < value < 1:
        reach = 1 - tail ** (1 / min(n, k))
        return Interval(value, max(value - reach, 0.0), min(value + reach, 1.0))
    logit, width = np.log(value / (1 - value)), stats.norm.isf(tail) * np.sqrt(variance) / (value * (1 - value))
    low, high = (1 / (1 + np.exp(-(logit + sign * width))) for sign in (-1, 1))
    return Interval(value, float(low), float(high))


def tpr_at_fpr(member_scores: np.ndarray, other_scores: np.ndarray, fpr: float, *, confidence: float = 0.95) -> RatesAt:
    """True-positive rate at a low false-positive rate (Carlini et al. 2022), and what both rates really may be.

    The threshold is the lowest score of the k others that at most ``fpr k`` of them exceed. The members did not choose
    it, so the Clopper-Pearson interval of their rate is exact. The true false-positive rate of such an order statistic
    follows a beta distribution: with j others above it, between Beta(j, k - j + 1) and Beta(j + 1, k - j).

    Args:
      member_scores: (n,).
      other_scores: (k,). With k < 1 / fpr none of them may lie above; the interval says how little that proves.
      fpr: such as 0.001 or 0.01.
      confidence: of each interval.

    Returns:
      `RatesAt`.

    Raises:
      ValueError: fpr out of range, or no score.
    """
    members, others = np.asarray(member_scores, float), np.sort(np.asarray(other_scores, float))
    if not 0 <= fpr < 1 or not len(members) or not len(others):
        raise ValueError(f"tpr_at_fpr: fpr {fpr} must be in [0, 1), with scores on both sides")
    allowed = int(np.floor(fpr * len(others) * (1 + 1e-12)))
    threshold = float(others[len(others) - 1 - allowed])
    rates = []
    for scores in (members, others):
        above = int(np.sum(scores > threshold))
        low, high = clopper_pearson(above, len(scores), confidence=confidence)
        rates.append(Interval(above / len(scores), float(low), float(high)))
    return RatesAt(rates[0], rates[1], threshold)
