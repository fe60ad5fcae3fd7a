"""GLUE's scores (Wang et al. 2019). An undefined score (constant predictions) is 0.0, never NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of predictions that equal the label.

    >>> accuracy(np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1]))
    0.75
    """
    return float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The harmonic mean of precision and recall of class 1: 2 TP / (2 TP + FP + FN).

    >>> f1(np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1]))
    0.8
    """
    true_positives = np.sum((predictions == 1) & (labels == 1))
    positives = np.sum(predictions == 1) + np.sum(labels == 1)
    return float(2 * true_positives / positives) if positives else 0.0


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of two binary vectors, (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)).

    It is Pearson's correlation of the two 0/1 vectors (Matthews 1975).

    >>> round(matthews(np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1])), 4)
    0.5774
    """
    return pearson(predictions, labels)


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation; 0.0 if either side is constant.

    >>> pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    1.0
    """
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    x, y = _centred(predictions), _centred(labels)
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation: Pearson's correlation of the ranks, where ties share their mean rank.

    >>> spearman(np.array([1.0, 5.0, 30.0]), np.array([2.0, 4.0, 6.0]))
    1.0
    """
    return pearson(scipy.stats.rankdata(predictions), scipy.stats.rankdata(labels))


SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def glue_scores(metrics: Sequence[str], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Computes the named scores of one evaluation.

    Args:
        metrics: names in `SCORES`, as `GlueTask.metrics` holds them.
        predictions: class numbers (N,), where a negative number is no class; or scores for a regression task.
        labels: the labels (N,), of the same kind.

    Returns:
        A dict name -> score, in the order of `metrics`.

    Raises:
        ValueError: a name is unknown, the shapes differ, there are no examples, or predictions are not finite.

    >>> glue_scores(("f1", "accuracy"), np.array([1, 0]), np.array([1, 1]))
    {'f1': 0.6666666666666666, 'accuracy': 0.5}
    """
    unknown = [name for name in metrics if name not in SCORES]
    if unknown:
        raise ValueError(f"Unknown scores {unknown}: choose from {', '.join(SCORES)}.")
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1 or not labels.size:
        raise ValueError(
            "predictions and labels must be vectors of one length, at least 1; got shapes"
            f" {predictions.shape} and {labels.shape}. Take the argmax over the classes first, and drop"
            " padding examples."
        )
    is_class = np.issubdtype(predictions.dtype, np.integer)
    num_bad = int(np.sum(predictions < 0 if is_class else ~np.isfinite(predictions)))
    if num_bad:
        raise ValueError(f"{num_bad} of {labels.size} predictions are not finite: the model has diverged.")
    return {name: SCORES[name](predictions, labels) for name in metrics}


def _centred(values: np.ndarray) -> np.ndarray:
    """Subtracts the mean, and scales so that sums of squares neither underflow nor overflow."""
    centred = values.astype(np.float64) - np.mean(values, dtype=np.float64)
    return centred / np.max(np.abs(centred))
