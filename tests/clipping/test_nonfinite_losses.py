"""An example whose loss is not finite contributes exactly zero, as one whose gradient is not finite does."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.clipping.ghost import ghost_clipped_grad
from dp_rmt.clipping.per_example import clipped_grad
from dp_rmt.training.losses import causal_lm_loss, label_losses

BATCH, TOKENS, CLASSES, VOCABULARY = 6, 4, 2, 7
WAYS = {
    "vmap": clipped_grad,
    "bookkeeping": lambda losses, **arguments: ghost_clipped_grad(losses, method="bookkeeping", **arguments),
    "ghost": lambda losses, **arguments: ghost_clipped_grad(losses, method="ghost", **arguments),
}


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Dense(CLASSES)(jnp.tanh(nn.Embed(VOCABULARY, 5)(ids)).sum(1))


class TiedDecoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(VOCABULARY, 5)
        return table.attend(nn.Dense(5)(table(ids)))


def classification(params, batch):
    logits = Classifier().apply(params, batch["ids"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def next_tokens(params, batch):
    return causal_lm_loss(TiedDecoder().apply(params, batch["ids"]), batch["ids"], jnp.ones_like(batch["ids"]))


def problem(losses):
    rng = np.random.default_rng(0)
    batch = {"ids": rng.integers(0, VOCABULARY, (BATCH, TOKENS)), "label": rng.integers(0, CLASSES, BATCH)}
    model = Classifier() if losses is classification else TiedDecoder()
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch["ids"])
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype("float32"), shapes), batch


def infinite(params, batch):
    """A loss that is infinite although its gradient is not."""
    return classification(params, batch) + jnp.where(batch["label"] == CLASSES, jnp.inf, 0.0)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("losses", "key", "value"),
    [
        (classification, "label", CLASSES),
        (classification, "label", -100),
        (infinite, "label", CLASSES),
        (classification, "ids", VOCABULARY),
        (next_tokens, "ids", VOCABULARY),
    ],
)
@pytest.mark.parametrize("microbatch_size", [None, pytest.param(2, marks=pytest.mark.thorough)])
def test_contributes_exactly_zero(way, losses, key, value, microbatch_size):
    params, batch = problem(classification if losses is infinite else losses)
    function = jax.jit(way(losses, l2_clip_norm=1.0, microbatch_size=microbatch_size))
    is_bad = np.arange(BATCH) == 1
    expected, _ = function(params, batch, is_padding_example=is_bad)
    batch[key][(1,) * batch[key].ndim] = value
    gradient, per_example = function(params, batch, is_padding_example=np.zeros(BATCH, bool))
    jax.tree.map(np.testing.assert_array_equal, gradient, expected)
    assert not np.isfinite(per_example.loss[1])
    np.testing.assert_array_equal(np.isfinite(per_example.grad_norm), ~is_bad)


def test_the_derivative_alone_does_not_tell():
    """Of a label that is no class it is finite, that of no loss that there is."""
    gradient = jax.grad(optax.softmax_cross_entropy_with_integer_labels)(jnp.array([1.0, -1.0]), 2)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0.1


@pytest.mark.parametrize("label", [CLASSES, -1, -CLASSES, -100])
def test_no_class_is_counted_from_the_end(label):
    logits = jnp.array([[1.0, -1.0]])
    assert np.isnan(label_losses(logits, jnp.array([label]))).all()
    assert np.isfinite(label_losses(logits, jnp.array([1]))).all()
    ids = jnp.array([[0, label, 1]])
    of_tokens = jnp.zeros((1, 3, CLASSES))
    assert np.isnan(causal_lm_loss(of_tokens, ids, jnp.array([[0, 1, 1]]))).all()
    # What is not to be predicted may be anything: it is neither counted nor in the way of the rest.
    np.testing.assert_allclose(causal_lm_loss(of_tokens, ids, jnp.array([[0, 0, 1]])), np.log(CLASSES), rtol=1e-6)
    gradient = jax.grad(lambda logits: causal_lm_loss(logits, ids, jnp.array([[0, 0, 1]])).sum())(of_tokens)
    assert np.isfinite(gradient).all()
