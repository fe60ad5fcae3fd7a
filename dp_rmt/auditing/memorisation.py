"""What a model learned of sensitive tokens: how far their loss fell below the base model's (arXiv 2502.13313).

The fall of the loss on sensitive tokens of TRAINING data is the paper's measure of privacy. It contains what every
document of the kind teaches (that a telephone number is digits and dots). The same fall on data that was not trained on
is its control, and the difference is what was memorised. All is computed from raw private values: show results only
under ``nonprivate/`` or for public data.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

from dp_rmt.auditing.membership import Interval


class LossDrop(NamedTuple):
    """How far the loss fell.

    Attributes:
      mean: the mean fall in nats per token, over all counted tokens.
      worst: the mean fall in the record where it is largest.
      worst_record: the row of that record.
    """

    mean: Interval
    worst: float
    worst_record: int


def mean_loss(losses_NxL: np.ndarray, is_counted_NxL: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Mean over all counted tokens, with an interval that takes the records as independent, not their tokens.

    The mean is ``m = sum_i s_i / sum_i n_i``, where record i has the sum s_i over n_i tokens. The variance of such a
    ratio is about ``N / (N - 1) sum_i (s_i - m n_i)^2 / (sum_i n_i)^2`` (Cochran 1977, section 2.11).

    Args:
      losses_NxL: loss of each token, such as -log p in nats.
      is_counted_NxL: which tokens count, as bool or as 0 and 1.
      confidence: of the interval.

    Returns:
      value, low, high.

    Raises:
      ValueError: fewer than two records, or nothing is counted.

    >>> mean_loss(np.array([[1.0, 2.0], [3.0, 9.0]]), np.array([[1, 1], [1, 0]])).value
    2.0
    """
    is_counted = np.asarray(is_counted_NxL, bool)
    if len(is_counted) < 2 or not is_counted.any():
        raise ValueError(f"mean_loss: {int(is_counted.sum())} tokens of {len(is_counted)} records; need two records")
    sums = np.where(is_counted, losses_NxL, 0.0).sum(axis=1, dtype=np.float64)
    counts = is_counted.sum(axis=1)
    mean = sums.sum() / counts.sum()
    variance = len(sums) / (len(sums) - 1) * np.sum((sums - mean * counts) ** 2) / counts.sum() ** 2
    width = stats.norm.isf((1 - confidence) / 2) * np.sqrt(variance)
    return Interval(float(mean), float(mean - width), float(mean + width))


def loss_drop(
    base_losses_NxL: np.ndarray, losses_NxL: np.ndarray, is_sensitive_NxL: np.ndarray, *, confidence: float = 0.95
) -> LossDrop:
    """``base - tuned`` on sensitive tokens: in the mean, and in the worst record.

    Args:
      base_losses_NxL: loss of each token under the base model.
      losses_NxL: loss of each token under the fine-tuned model.
      is_sensitive_NxL: which tokens count.
      confidence: of the interval of the mean.

    Returns:
      `LossDrop`.

    Raises:
      ValueError: shapes differ, no token is sensitive, or there are fewer than two records.
    """
    shapes = {np.shape(x) for x in (base_losses_NxL, losses_NxL, is_sensitive_NxL)}
    if len(shapes) > 1:
        raise ValueError(f"loss_drop: the shapes differ: {sorted(shapes)}")
    is_sensitive = np.asarray(is_sensitive_NxL, bool)
    if not is_sensitive.any():
        raise ValueError("loss_drop: no token is sensitive, so there is nothing to measure")
    fell = np.where(is_sensitive, np.asarray(base_losses_NxL, np.float64) - losses_NxL, 0.0)
    counts = is_sensitive.sum(axis=1)
    means = np.where(counts > 0, fell.sum(axis=1) / np.maximum(counts, 1), -np.inf)
    worst = int(np.argmax(means))
    return LossDrop(mean_loss(fell, is_sensitive, confidence=confidence), float(means[worst]), worst)
