"""Per-example losses and predictions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.models import EncoderConfig, MaskedLanguageModel, SequenceClassifier
from dp_rmt.training.losses import causal_lm_loss, classifier_logits, infilling_logits, label_losses, predictions

pytestmark = pytest.mark.thorough

CONFIG = EncoderConfig(
    architecture="bert",
    vocab_size=12,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    intermediate_size=8,
    max_position_embeddings=5,
    type_vocab_size=2,
    layer_norm_eps=1e-6,
    pad_token_id=0,
)


def make_batch():
    rng = np.random.default_rng(0)
    return {
        "input_ids": rng.integers(1, 12, (3, 5)),
        "attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
        "token_type_ids": rng.integers(0, 2, (3, 5)),
        "mask_position": np.array([4, 1, 2]),
        "label": np.array([0, 1, 1]),
    }


def model_arguments(batch):
    return batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]


def test_cross_entropy_by_hand():
    logits = np.array([[1.0, 2.0, 0.5], [0.0, -3.0, 4.0]])
    labels = np.array([0, 2])
    expected = [-np.log(np.exp(row)[label] / np.exp(row).sum()) for row, label in zip(logits, labels)]
    np.testing.assert_allclose(label_losses(jnp.asarray(logits, jnp.float32), labels), expected, rtol=0, atol=1e-6)


def test_one_column_is_regression():
    logits, scores = np.array([[1.5], [3.0]], np.float32), np.array([2.0, 0.5], np.float32)
    np.testing.assert_allclose(label_losses(logits, scores), [0.25, 6.25])
    np.testing.assert_array_equal(predictions(logits), [1.5, 3.0])


def test_predictions_are_the_largest_logits():
    np.testing.assert_array_equal(predictions(jnp.array([[0.1, 0.7], [2.0, -1.0]])), [1, 0])


@pytest.mark.parametrize("columns", [1, 3])
def test_losses_are_float32_one_per_example_and_independent(columns):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, columns)), jnp.bfloat16)
    labels = jnp.asarray([0, 1, 2, 0]) % columns
    losses = label_losses(logits, labels)
    assert losses.shape == (4,)
    assert losses.dtype == jnp.float32
    mixed = jax.jacobian(label_losses)(logits.astype(jnp.float32), labels)
    assert not np.any(mixed[~np.eye(4, dtype=bool)])


def test_classifier_logits_are_the_modules():
    module, batch = SequenceClassifier(CONFIG, num_labels=3), make_batch()
    params = jax.jit(module.init)(jax.random.key(0), *model_arguments(batch))["params"]
    logits = jax.jit(classifier_logits(module))(params, batch)
    expected = jax.jit(module.apply)({"params": params}, *model_arguments(batch))
    assert logits.shape == (3, 3)
    np.testing.assert_array_equal(logits, expected)


def test_infilling_logits_are_those_of_the_label_words_at_the_mask():
    module, batch = MaskedLanguageModel(CONFIG), make_batch()
    params = jax.jit(module.init)(jax.random.key(0), *model_arguments(batch))["params"]
    everywhere = jax.jit(module.apply)({"params": params}, *model_arguments(batch))
    logits = jax.jit(infilling_logits(module, jnp.array([7, 2])))(params, batch)
    expected = np.asarray(everywhere)[np.arange(3)[:, None], batch["mask_position"][:, None], [[7, 2]]]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_causal_loss_by_hand():
    rng = np.random.default_rng(0)
    logits, ids = rng.standard_normal((3, 5, 7)).astype(np.float32), rng.integers(0, 7, (3, 5))
    mask = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 0]])  # 4, 2 and 0 targets: the first never counts
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = [
        -np.mean([log_p[0, t - 1, ids[0, t]] for t in (1, 2, 3, 4)]),
        -np.mean([log_p[1, t - 1, ids[1, t]] for t in (2, 4)]),
        0.0,
    ]
    losses = causal_lm_loss(*(jnp.asarray(array) for array in (logits, ids, mask)))
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-6)
    assert losses.dtype == jnp.float32
    coarse = jnp.asarray(logits, jnp.bfloat16)
    in_float32 = causal_lm_loss(coarse.astype(jnp.float32), jnp.asarray(ids), jnp.asarray(mask))
    np.testing.assert_array_equal(causal_lm_loss(coarse, jnp.asarray(ids), jnp.asarray(mask)), in_float32)


def test_causal_loss_of_an_example_is_its_own():
    """No other example's logits and number of targets enter, and without targets the gradient is 0, not NaN."""
    rng = np.random.default_rng(1)
    logits, ids = jnp.asarray(rng.standard_normal((3, 4, 5)), jnp.float32), jnp.asarray(rng.integers(0, 5, (3, 4)))
    mask = jnp.array([[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    jacobian = np.asarray(jax.jacobian(causal_lm_loss)(logits, ids, mask))
    uses = np.abs(jacobian).max(axis=-1) > 0  # (loss, example, position of the logits)
    expected = np.zeros((3, 3, 4), bool)
    expected[0, 0, :3] = expected[1, 1, 1] = True
    np.testing.assert_array_equal(uses, expected)
    alone = [causal_lm_loss(*(array[row : row + 1] for array in (logits, ids, mask)))[0] for row in range(3)]
    np.testing.assert_allclose(causal_lm_loss(logits, ids, mask), alone, rtol=0, atol=1e-6)
