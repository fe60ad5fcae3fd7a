"""Canaries: what is planted, what a white-box score is, guesses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dp_rmt.auditing import canaries
from dp_rmt.clipping.per_example import clipped_grad


def test_coins_are_fair_and_a_function_of_the_seed():
    flips = canaries.coin_flips(100_000, seed=3)
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / np.sqrt(100_000)
    np.testing.assert_array_equal(flips, canaries.coin_flips(100_000, seed=3))
    assert stats.pearsonr(flips, canaries.coin_flips(100_000, seed=4)).statistic < 5 / np.sqrt(100_000)


def test_planting_appends_the_chosen_and_nothing_else():
    arrays = {"ids": np.arange(6, dtype=np.int32).reshape(3, 2), "label": np.arange(3, dtype=np.int32)}
    extra = {"ids": np.arange(10, 18).reshape(4, 2), "label": np.arange(10, 14)}
    planted = canaries.plant(arrays, extra, np.array([True, False, False, True]))
    assert planted["ids"].tolist() == [[0, 1], [2, 3], [4, 5], [10, 11], [16, 17]]
    assert planted["label"].tolist() == [0, 1, 2, 10, 13]
    assert planted["ids"].dtype == planted["label"].dtype == np.int32


@pytest.mark.parametrize(
    ("extra", "flips", "message"),
    [
        ({"label": np.zeros(1)}, [True], r"canaries have the arrays \['label'\], the training set has \['ids'\]"),
        ({"ids": np.zeros((1, 3))}, [True], r"rows of shape \(3,\), the training set of \(2,\): pad or cut"),
        ({"ids": np.zeros((1, 2))}, [True, False], "has 1 rows for 2 coin flips"),
    ],
)
def test_refuses_what_does_not_look_like_a_row(extra, flips, message):
    with pytest.raises(ValueError, match=message):
        canaries.plant({"ids": np.zeros((3, 2))}, extra, np.array(flips))


def test_random_tokens_are_uniform_and_fit_the_context():
    made = canaries.random_token_canaries(500, 40, vocabulary_size=16, context_length=48, seed=0)
    assert {x.shape for x in made.values()} == {(500, 48)}
    assert (made["attention_mask"].sum(axis=1) == 40).all()
    assert (made["input_ids"][:, 40:] == 0).all()
    counts = np.bincount(made["input_ids"][:, :40].ravel(), minlength=16)
    assert len(counts) == 16
    assert stats.chisquare(counts).pvalue > 1e-6
    with pytest.raises(ValueError, match="a canary of 49 tokens does not fit the context of 48 tokens"):
        canaries.random_token_canaries(1, 49, vocabulary_size=16, context_length=48, seed=0)


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_the_tokens_do_not_tell_the_coins_of_the_same_seed(length):
    """From one stream they did: of two tokens the second knew its coin by a correlation of -.87."""
    made = canaries.random_token_canaries(4000, length, vocabulary_size=16, context_length=length, seed=3)
    flips = canaries.coin_flips(4000, seed=3)
    for tokens in made["input_ids"].T:
        assert abs(stats.pearsonr(flips, tokens).statistic) < 5 / np.sqrt(4000)


def test_gradient_score_is_the_inner_product_with_the_clipped_gradient():
    """Of a network, against gradients made one by one and clipped by hand; some are below the clip norm, some above."""
    rng = np.random.default_rng(0)
    params = {"a": rng.standard_normal((5, 7)).astype(np.float32), "b": rng.standard_normal(7).astype(np.float32)}
    batch = {"x": rng.standard_normal((6, 5)).astype(np.float32) * np.logspace(-2, 1, 6)[:, None].astype(np.float32)}

    def losses(p, batch):
        return jnp.square(jnp.tanh(batch["x"] @ p["a"]) @ p["b"])

    released = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), params)
    _, per_example = jax.jit(clipped_grad(losses, l2_clip_norm=0.5))(params, batch, is_padding_example=None)
    assert 0 < np.sum(per_example.grad_norm < 0.5) < 6
    scores = canaries.gradient_scores(losses, params, batch, released, per_example.grad_norm, l2_clip_norm=0.5)
    gradients = jax.device_get(jax.jacrev(losses)(params, batch))
    for row in range(6):
        inner = sum(np.vdot(released[name], gradients[name][row]) for name in params)
        norm = np.sqrt(sum(np.square(gradients[name][row]).sum() for name in params))
        assert scores[row] == pytest.approx(inner * min(1, 0.5 / norm), rel=1e-4, abs=1e-5)


def test_repetition_score_is_zero_where_nothing_changes():
    scores_TxM = jnp.array([[1.0, 5.0], [2.0, 5.0], [1.0, 4.0], [2.0, 7.0]])
    np.testing.assert_array_equal(canaries.repetition_scores(scores_TxM), [0.0, 3.0])


def test_guesses_are_as_many_as_asked_for():
    scores = np.random.default_rng(0).standard_normal(50)
    guesses = canaries.guess_by_rank(scores, num_in=10, num_out=5)
    assert sorted(guesses) == [-1] * 5 + [0] * 35 + [1] * 10
    assert scores[guesses == 1].min() > scores[guesses == 0].max() > scores[guesses == -1].max()
    assert canaries.correct_guesses(guesses, scores > np.sort(scores)[-8]) == (15, 7 + 5)
    assert canaries.guess_by_rank(scores, num_in=0, num_out=0).tolist() == [0] * 50
    with pytest.raises(ValueError, match="40 guesses of in and 11 of out do not fit 50 canaries"):
        canaries.guess_by_rank(scores, num_in=40, num_out=11)
