"""From a model to per-example losses and predictions: classification, regression, text infilling, next tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dp_rmt.types import Batch, Params

Logits = Callable[[Params, Batch], jax.Array]
"""``(params, batch) -> (B, num_labels)``; one column for regression."""
Losses = Callable[[Params, Batch], jax.Array]
"""``(params, batch) -> (B,)``, one loss for each example (or each token, where said so)."""


def classifier_logits(module: Any) -> Logits:
    """Logits of a classification head; calls ``module.apply({"params": params}, ids, mask, types)``."""

    def logits(params: Params, batch: Batch) -> jax.Array:
        return module.apply({"params": params}, *_inputs(batch))

    return logits


def infilling_logits(module: Any, label_word_ids: jax.typing.ArrayLike) -> Logits:
    """Logits of the label words at the masked position of the prompt (Schick & Schütze 2021; Li et al. 2022).

    Args:
      module: a masked language model that takes the position to predict.
      label_word_ids: (num_labels,) token of each label's word.

    Returns:
      ``(params, batch) -> (B, num_labels)``; the batch has ``mask_position`` (B,).
    """

    def logits(params: Params, batch: Batch) -> jax.Array:
        words = module.apply({"params": params}, *_inputs(batch), batch["mask_position"])
        return words[:, label_word_ids]

    return logits


def label_losses(logits_BxC: jax.Array, labels_B: jax.Array) -> jax.Array:
    """One loss per example: cross-entropy, or the squared error where there is one column.

    Args:
      logits_BxC: C = 1 for regression.
      labels_B: int32 classes, or float32 scores for regression.

    Returns:
      (B,) float32; NaN for a label that is no class, which clipping leaves out.
    """
    logits_BxC = logits_BxC.astype(jnp.promote_types(logits_BxC.dtype, jnp.float32))
    if logits_BxC.shape[-1] == 1:
        return jnp.square(logits_BxC[:, 0] - labels_B)
    return _cross_entropy(logits_BxC, labels_B)


def completion_losses(module: Any) -> Losses:
    """`causal_lm_loss` of a decoder; a batch has ``input_ids``, ``attention_mask`` and ``loss_mask``, each (B, L)."""

    def losses(params: Params, batch: Batch) -> jax.Array:
        logits = module.apply({"params": params}, batch["input_ids"], batch["attention_mask"])
        return causal_lm_loss(logits, batch["input_ids"], batch["loss_mask"])

    return losses


def token_losses(module: Any) -> Losses:
    """Every token's own -log p(token | the tokens before it), for measurements; batches as for `completion_losses`.

    Returns:
      ``(params, batch) -> (B, L)`` float32; 0 for the first token and where ``loss_mask`` is 0.
    """

    def losses(params: Params, batch: Batch) -> jax.Array:
        logits = module.apply({"params": params}, batch["input_ids"], batch["attention_mask"])
        found, is_target = _next_token_losses(logits, batch["input_ids"], batch["loss_mask"])
        return jnp.pad(jnp.where(is_target, found, 0), ((0, 0), (1, 0)))

    return losses


def causal_lm_loss(logits_BxLxV: jax.Array, input_ids_BxL: jax.Array, loss_mask_BxL: jax.Array) -> jax.Array:
    """Per example, the mean of -log p(token | the tokens before it) over that example's own targets.

    It is a mean and not a sum, as in Li et al. (2022): the norm of an example's gradient, and so what clipping does to
    it, then depends on its content and not on its length. The count is the example's own: a count over the whole batch
    would let every other example scale its gradient.

    Args:
      logits_BxLxV: at each token, the logits of the next one.
      input_ids_BxL: the tokens.
      loss_mask_BxL: 1 for a token to predict (of a completion, say), 0 for a token of the prompt or padding. The first
        token of a row has nothing before it and never counts. Mask the first token after padding, too.

    Returns:
      (B,) float32; 0 for an example without targets.

    >>> logits = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]]]))
    >>> causal_lm_loss(logits, jnp.array([[0, 1, 1]]), jnp.array([[1, 1, 0]])).round(3)  # -log 0.5
    Array([0.693], dtype=float32)
    """
    losses, is_target = _next_token_losses(logits_BxLxV, input_ids_BxL, loss_mask_BxL)
    return jnp.where(is_target, losses, 0).sum(axis=-1) / jnp.maximum(is_target.sum(axis=-1), 1)


NO_CLASS = -1
"""What `predictions` gives for logits that are not numbers."""


def predictions(logits_BxC: jax.Array) -> jax.Array:
    """Predicted class of each example, or the score itself for regression.

    Logits among which one is NaN predict no class (-1). The largest of them would be class 0, or whichever is NaN
    first.

    >>> predictions(jnp.array([[1.0, 2.0], [jnp.nan, 2.0]])).tolist()
    [1, -1]
    """
    if logits_BxC.shape[-1] == 1:
        return logits_BxC[:, 0]
    return jnp.where(jnp.isnan(logits_BxC).any(axis=-1), NO_CLASS, jnp.argmax(logits_BxC, axis=-1))


def _next_token_losses(
    logits_BxLxV: jax.Array, input_ids_BxL: jax.Array, loss_mask_BxL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """-log p of every token but the first, and which of them are targets, each (B, L - 1)."""
    logits = logits_BxLxV[:, :-1].astype(jnp.promote_types(logits_BxLxV.dtype, jnp.float32))
    return _cross_entropy(logits, input_ids_BxL[:, 1:]), loss_mask_BxL[:, 1:] != 0


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label]; NaN for a label that is no class."""
    # optax counts negative labels from the end: -1 is the last class.
    labels = jnp.where(labels < 0, logits.shape[-1], labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _inputs(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    return batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
