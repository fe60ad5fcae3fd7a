"""GLUE's scores against counts by hand and against scipy."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from dp_rmt.scoring import classification as scores
from dp_rmt.scoring.classification import glue_scores

BINARY = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)
# A coarse grid makes ties, which rank correlation must share out.
GRID = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=40)


@given(BINARY)
def test_binary_scores_by_counting(pairs):
    predictions, labels = np.array(pairs).T
    tp, fp = pairs.count((1, 1)), pairs.count((1, 0))
    fn, tn = pairs.count((0, 1)), pairs.count((0, 0))
    assert scores.accuracy(predictions, labels) == (tp + tn) / len(pairs)
    assert scores.f1(predictions, labels) == (2 * tp / (2 * tp + fp + fn) if tp else 0.0)
    denominator = float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    expected = (tp * tn - fp * fn) / denominator if denominator else 0.0
    assert scores.matthews(predictions, labels) == pytest.approx(expected, abs=1e-12)


@given(GRID)
def test_correlations_equal_scipy(pairs):
    predictions, labels = np.array(pairs).T / 3.0
    for ours, reference in ((scores.pearson, scipy.stats.pearsonr), (scores.spearman, scipy.stats.spearmanr)):
        if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            assert ours(predictions, labels) == 0.0
        else:
            # abs: scipy's own rounding; both are O(1) sums of at most 40 terms
            assert ours(predictions, labels) == pytest.approx(reference(predictions, labels)[0], abs=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_correlations_at_any_scale(scale):
    values = np.array([1.0, 2.0, 4.0, 8.0])
    assert scores.pearson((scale * values).astype(np.float32), -values) == pytest.approx(-1.0, abs=1e-6)
    assert scores.pearson(scale * values, values) == pytest.approx(1.0, abs=1e-12)


def test_constant_predictions_give_zero():
    """0.1 + 0.1 + 0.1 is not 3 * 0.1: the centred constant must not be taken for a signal."""
    constant = np.full(3, 0.1, np.float32)
    labels = np.array([0.0, 2.5, 5.0])
    assert glue_scores(("pearson", "spearman"), constant, labels) == {"pearson": 0.0, "spearman": 0.0}
    assert glue_scores(("matthews",), np.ones(3, int), np.array([0, 1, 1])) == {"matthews": 0.0}
    assert glue_scores(("f1", "accuracy"), np.zeros(2, int), np.zeros(2, int)) == {"f1": 0.0, "accuracy": 1.0}


def test_three_classes():
    assert glue_scores(("accuracy",), np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])) == {"accuracy": 0.75}


@pytest.mark.parametrize(
    ("metrics", "predictions", "labels", "message"),
    [
        (("bleu",), [1], [1], r"Unknown scores \['bleu'\]: choose from accuracy"),
        (("accuracy",), [[0.1, 0.9]], [1], r"got shapes \(1, 2\) and \(1,\).*argmax"),
        (("accuracy",), [], [], r"at least 1; got shapes \(0,\)"),
        (("pearson",), [0.5, float("nan")], [1.0, 2.0], "1 of 2 predictions are not finite"),
        (("accuracy",), [1, -1, -1], [1, 0, 1], "2 of 3 predictions are not finite"),
    ],
)
def test_errors(metrics, predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        glue_scores(metrics, np.array(predictions), np.array(labels))
