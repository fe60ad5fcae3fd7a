"""Scores over a data set in fixed shapes equal scores over all rows at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.training.evaluation import make_evaluator, make_loss_evaluator
from dp_rmt.training.losses import causal_lm_loss, label_losses

NUM_ROWS, LENGTH = 23, 8


def make_arrays(seed=0, empty_row=False):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LENGTH + 1, NUM_ROWS)
    if empty_row:
        lengths[5] = 0
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    return {
        "input_ids": rng.integers(1, 9, (NUM_ROWS, LENGTH)).astype(np.int32) * mask,
        "attention_mask": mask,
        "label": rng.integers(0, 3, NUM_ROWS).astype(np.int32),
    }


def bag_of_words(params, batch):
    """Logits that depend on the tokens alone, not on the padding."""
    return jnp.sum(params[batch["input_ids"]] * batch["attention_mask"][..., None], axis=1)


PARAMS = jnp.asarray(np.random.default_rng(1).standard_normal((9, 3)), jnp.float32)


@pytest.mark.parametrize("lengths", [(8,), (2, 5, 8), (1, 2, 3, 4, 5, 6, 7, 8)])
@pytest.mark.parametrize("batch_size", [4, 100])
def test_scores_are_those_of_all_rows_at_once(lengths, batch_size):
    arrays = make_arrays()
    evaluate = make_evaluator(bag_of_words, arrays, metrics=("accuracy",), lengths=lengths, batch_size=batch_size)
    logits = bag_of_words(PARAMS, arrays)
    expected = np.mean(np.asarray(logits).argmax(axis=1) == arrays["label"])
    scores = evaluate(PARAMS)
    assert scores.keys() == {"accuracy", "loss"}
    assert scores["accuracy"] == pytest.approx(expected, abs=1e-12)
    assert 0 < expected < 1
    assert scores["loss"] == pytest.approx(float(jnp.mean(label_losses(logits, arrays["label"]))), rel=1e-6)


def test_every_row_counts_even_one_without_tokens():
    arrays = make_arrays(empty_row=True)
    arrays["label"][:] = np.argmax(bag_of_words(PARAMS, arrays), axis=1)
    arrays["label"][5] = 2  # its logits are all zero, so 0 is predicted
    evaluate = make_evaluator(bag_of_words, arrays, metrics=("accuracy",), lengths=(2, 8), batch_size=4)
    assert evaluate(PARAMS)["accuracy"] == pytest.approx(22 / 23, abs=1e-12)


def test_logits_that_are_not_numbers_are_no_class():
    arrays = make_arrays()
    arrays["label"][:] = 0  # what the largest of NaNs would be

    def logits(params, batch):
        found = bag_of_words(params, batch)
        return jnp.where(jnp.sum(batch["attention_mask"], axis=1, keepdims=True) == 3, jnp.nan, found)

    evaluate = make_evaluator(logits, arrays, metrics=("accuracy",), lengths=(8,), batch_size=4)
    count = np.sum(arrays["attention_mask"].sum(axis=1) == 3)
    assert count > 0
    with pytest.raises(ValueError, match=f"{count} of 23 predictions are not finite: the model has diverged"):
        evaluate(PARAMS)


def test_a_model_sees_a_few_shapes_only():
    shapes = set()

    def logits(params, batch):
        shapes.add(batch["input_ids"].shape)
        return bag_of_words(params, batch)

    evaluate = make_evaluator(logits, make_arrays(), metrics=("accuracy",), lengths=(3, 8), batch_size=4)
    assert evaluate(PARAMS) == evaluate(PARAMS)
    assert shapes == {(4, 3), (4, 8)}


def test_other_parameters_give_other_scores():
    evaluate = make_evaluator(bag_of_words, make_arrays(), metrics=("accuracy",), lengths=(8,), batch_size=8)
    assert evaluate(PARAMS)["loss"] != evaluate(jax.tree.map(lambda p: -p, PARAMS))["loss"]


def test_refuses_lengths_that_do_not_reach_the_data():
    with pytest.raises(ValueError, match=r"length groups \(2, 5\) must .* end at the length of the data, 8"):
        make_evaluator(bag_of_words, make_arrays(), metrics=("accuracy",), lengths=(2, 5), batch_size=4)


@pytest.mark.parametrize("lengths", [(8,), (2, 5, 8)])
def test_perplexity_is_that_of_all_target_tokens(lengths):
    arrays = make_arrays()
    arrays["loss_mask"] = arrays["attention_mask"] * (np.arange(LENGTH) >= 2)  # some rows have no target

    def losses(params, batch):
        logits = jnp.pad(params, ((0, 0), (0, 6)))[batch["input_ids"]]
        return causal_lm_loss(logits, batch["input_ids"], batch["loss_mask"])

    scores = make_loss_evaluator(losses, arrays, lengths=lengths, batch_size=4)(PARAMS)
    log_p = jax.nn.log_softmax(np.pad(PARAMS, ((0, 0), (0, 6))))
    of_tokens = [
        [-log_p[before, token] for before, token, counts in zip(row, row[1:], mask[1:]) if counts]
        for row, mask in zip(arrays["input_ids"], arrays["loss_mask"])
    ]
    everything = np.concatenate([np.array(row) for row in of_tokens if row])
    assert scores["perplexity"] == pytest.approx(float(np.exp(np.mean(everything))), rel=1e-5)
    assert scores["loss"] == pytest.approx(float(np.mean([np.mean(row) if row else 0 for row in of_tokens])), rel=1e-5)
