"""Batches for masked language modelling, with which a model is pre-trained on public text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dp_rmt.data.batches import gather_batch


def masked_lm_batch(
    arrays: Mapping[str, np.ndarray],
    *,
    mask_token_id: int,
    special_token_ids: Sequence[int],
    vocab_size: int,
    batch_size: int,
    seed: int,
    step: int,
    mask_probability: float = 0.15,
) -> dict[str, np.ndarray]:
    """Draws one batch and hides a part of its tokens (Devlin et al. 2019, section 3.1).

    Each token is chosen with probability `mask_probability`; of the chosen, 80% become the mask token, 10% a
    random token that is not special and 10% stay. A pure function of (seed, step), so a resumed run goes on
    where it stopped. Rows are drawn with replacement: this is for PUBLIC text and has no privacy meaning.

    Args:
        arrays: `input_ids` (N, L), `attention_mask` (N, L) and whatever else the model takes, by name.
        mask_token_id: the mask token.
        special_token_ids: never chosen and never put in, such as `tokenizer.all_special_ids`.
        vocab_size: random tokens are below it.
        batch_size: B.
        seed: seed of the whole run.
        step: number of the step, from 0.
        mask_probability: fraction of ordinary tokens to predict.

    Returns:
        The B rows by name, `input_ids` partly hidden, and `label` (B, L) int32: the original token where it
        is to be predicted, -1 elsewhere.

    Raises:
        ValueError: a probability outside (0, 1], a batch size below 1, or only special tokens to draw from.
    """
    if not 0 < mask_probability <= 1:
        raise ValueError(f"mask_probability must be in (0, 1], got {mask_probability}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    ordinary = np.setdiff1d(np.arange(vocab_size), special_token_ids)
    if not ordinary.size:
        raise ValueError(f"All {vocab_size} tokens of the vocabulary are special: there is no word to draw.")
    rng = np.random.default_rng([seed, step])
    num_examples = len(arrays["input_ids"])
    batch, _ = gather_batch(arrays, rng.integers(num_examples, size=batch_size))
    ids_BxL = batch["input_ids"]
    is_word = (batch["attention_mask"] == 1) & ~np.isin(ids_BxL, special_token_ids)
    is_target = is_word & (rng.random(ids_BxL.shape) < mask_probability)
    fate = rng.random(ids_BxL.shape)
    random_ids = rng.choice(ordinary, size=ids_BxL.shape)
    hidden = np.where(fate < 0.8, mask_token_id, np.where(fate < 0.9, random_ids, ids_BxL))
    batch["input_ids"] = np.where(is_target, hidden, ids_BxL).astype(np.int32)
    batch["label"] = np.where(is_target, ids_BxL, -1).astype(np.int32)
    return batch
