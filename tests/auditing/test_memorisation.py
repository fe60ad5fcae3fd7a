"""The fall of the loss on sensitive tokens, in the mean and in the worst record."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dp_rmt.auditing import memorisation


def test_mean_is_over_tokens_and_ignores_the_others():
    losses = np.array([[1.0, 2.0, np.nan], [5.0, np.inf, 7.0], [9.0, 9.0, 9.0]])
    counted = np.array([[1, 1, 0], [1, 0, 1], [0, 0, 0]])
    assert memorisation.mean_loss(losses, counted).value == pytest.approx((1 + 2 + 5 + 7) / 4)


def test_interval_takes_records_and_not_tokens_as_independent():
    """All tokens of a record are one draw, so the interval must be that of the records' mean."""
    rng, missed, draws = np.random.default_rng(0), 0, 400
    for _ in range(draws):
        losses = np.repeat(rng.standard_normal((60, 1)), 10, axis=1)
        found = memorisation.mean_loss(losses, np.arange(10) < rng.integers(1, 11, size=(60, 1)))
        missed += not found.low <= 0 <= found.high
    assert stats.binom.ppf(1e-4, draws, 0.05) <= missed <= stats.binom.isf(1e-4, draws, 0.07)  # it is asymptotic


def test_loss_drop_and_its_worst_record():
    base = np.full((4, 3), 5.0)
    tuned = np.array([[4.0, 4.0, 0.0], [1.0, 5.0, 5.0], [3.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    sensitive = np.array([[1, 1, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)
    found = memorisation.loss_drop(base, tuned, sensitive)
    assert found.mean.value == pytest.approx((1 + 1 + 4 + 0 + 2) / 5)
    assert (found.worst, found.worst_record) == (2.0, 1)  # rows 1 and 2 are equal; row 3 has no sensitive token


def test_a_model_that_learned_nothing_has_no_drop():
    losses = np.random.default_rng(1).exponential(size=(20, 8))
    found = memorisation.loss_drop(losses, losses, np.ones((20, 8)))
    assert found.mean == (0.0, 0.0, 0.0)
    assert found.worst == 0.0


def test_refusals():
    with pytest.raises(ValueError, match="no token is sensitive"):
        memorisation.loss_drop(np.ones((2, 2)), np.ones((2, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="the shapes differ"):
        memorisation.loss_drop(np.ones((2, 2)), np.ones((2, 3)), np.ones((2, 2)))
    with pytest.raises(ValueError, match="1 tokens of 1 records; need two records"):
        memorisation.mean_loss(np.ones((1, 1)), np.ones((1, 1)))
