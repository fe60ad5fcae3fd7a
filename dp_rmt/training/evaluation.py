"""Scores on evaluation data, which is taken to be public (or its use stated in the privacy statement)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from dp_rmt.data import evaluation_batches, glue_scores
from dp_rmt.data.length_groups import check_lengths, rows_by_length
from dp_rmt.training.losses import Logits, Losses, label_losses, predictions
from dp_rmt.training.processes import to_host
from dp_rmt.types import Params


def make_evaluator(
    logits: Logits,
    arrays: Mapping[str, np.ndarray],
    *,
    metrics: Sequence[str],
    lengths: Sequence[int],
    batch_size: int,
) -> Callable[[Params], dict[str, float]]:
    """Builds ``evaluate(params) -> scores`` over a whole data set, in batches of a few fixed shapes.

    Args:
      logits: ``(params, batch) -> (B, C)``.
      arrays: tokenised data with labels.
      metrics: names that `dp_rmt.data.glue_scores` knows.
      lengths: ascending sequence lengths to pad to, the last that of the data.
      batch_size: rows of one batch.

    Returns:
      A function of all parameters that gives the scores and the mean ``loss``.
    """
    parts = _parts(arrays, lengths)

    @jax.jit
    def evaluate_batch(params, batch):
        outputs = logits(params, batch)
        return predictions(outputs), label_losses(outputs, batch["label"])

    def evaluate(params: Params) -> dict[str, float]:
        predicted: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        losses: list[np.ndarray] = []
        for part in parts:
            for batch, is_padding in evaluation_batches(part, batch_size):
                for collected, values in zip((predicted, losses), evaluate_batch(params, batch), strict=True):
                    collected.append(np.asarray(to_host(values))[~is_padding])
                labels.append(batch["label"][~is_padding])
        scores = glue_scores(metrics, np.concatenate(predicted), np.concatenate(labels))
        return {**scores, "loss": float(np.mean(np.concatenate(losses)))}

    return evaluate


def make_loss_evaluator(
    losses: Losses, arrays: Mapping[str, np.ndarray], *, lengths: Sequence[int], batch_size: int
) -> Callable[[Params], dict[str, float]]:
    """Builds ``evaluate(params) -> {"loss", "perplexity"}`` of completions over a whole data set.

    Args:
      losses: ``(params, batch) -> (B,)``, the mean over an example's own target tokens (`completion_losses`).
      arrays: tokenised data with ``loss_mask``.
      lengths: ascending sequence lengths to pad to, the last that of the data.
      batch_size: rows of one batch.

    Returns:
      A function of all parameters that gives the mean ``loss`` of an example, which is what training lowers, and the
      ``perplexity`` exp(sum of -log p over all target tokens / their number).
    """
    parts = _parts(arrays, lengths)
    evaluate_batch = jax.jit(losses)

    def evaluate(params: Params) -> dict[str, float]:
        found: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        for part in parts:
            for batch, is_padding in evaluation_batches(part, batch_size):
                found.append(np.asarray(to_host(evaluate_batch(params, batch)), np.float64)[~is_padding])
                counts.append(np.count_nonzero(batch["loss_mask"][~is_padding, 1:], axis=1))
        loss, count = np.concatenate(found), np.concatenate(counts)
        return {"loss": float(np.mean(loss)), "perplexity": float(np.exp(np.sum(loss * count) / np.sum(count)))}

    return evaluate


def _parts(arrays: Mapping[str, np.ndarray], lengths: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """The rows of each length group, cut to its length."""
    check_lengths(lengths, arrays["attention_mask"].shape[1])
    full = arrays["attention_mask"].shape[1:]
    parts = []
    for length, rows in zip(lengths, rows_by_length(arrays["attention_mask"], lengths), strict=True):
        if len(rows):
            parts.append({name: x[rows, :length] if x.shape[1:] == full else x[rows] for name, x in arrays.items()})
    return parts
