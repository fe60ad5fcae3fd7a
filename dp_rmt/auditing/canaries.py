"""Canaries: examples that are planted by coin flips, and scores that tell which ones were.

The released update of a step is the noisy clipped gradient. A canary's white-box score is the inner product of that
update with the canary's own clipped gradient, summed over steps (Nasr et al. 2023): ``sum_t <u_t, c_i g_i(w_t)>``. A
score uses only what is public under the guarantee: the released updates, the parameters that follow from them, and the
canary itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dp_rmt.clipping.per_example import clip_factors
from dp_rmt.types import Batch, Params, PerExampleLosses


def coin_flips(num_canaries: int, seed: int) -> np.ndarray:
    """Which canaries are planted: independent fair coins, (num_canaries,) bool.

    >>> coin_flips(4, seed=1)
    array([False, False,  True, False])
    """
    return np.random.default_rng(seed).random(num_canaries) < 0.5


def plant(
    arrays: Mapping[str, np.ndarray], canaries: Mapping[str, np.ndarray], flips: np.ndarray
) -> dict[str, np.ndarray]:
    """The training set with the chosen canaries after its own rows.

    Args:
      arrays: the training set, name -> (N, ...).
      canaries: name -> (m, ...), with the same names, row shapes and kinds of number.
      flips: (m,) bool from `coin_flips`.

    Returns:
      name -> (N + number planted, ...), with the dtypes of `arrays`.

    Raises:
      ValueError: the canaries have other names or row shapes than the training set, or another number than the flips.

    >>> plant({"x": np.zeros(2)}, {"x": np.array([1.0, 2.0])}, np.array([False, True]))
    {'x': array([0., 0., 2.])}
    """
    if arrays.keys() != canaries.keys():
        raise ValueError(f"canaries have the arrays {sorted(canaries)}, the training set has {sorted(arrays)}")
    planted = {}
    for name, array in arrays.items():
        canary = np.asarray(canaries[name])
        if len(canary) != len(flips):
            raise ValueError(f"canaries[{name!r}] has {len(canary)} rows for {len(flips)} coin flips")
        if canary.shape[1:] != array.shape[1:]:
            raise ValueError(
                f"canaries[{name!r}] has rows of shape {canary.shape[1:]}, the training set of {array.shape[1:]}: pad "
                "or cut the canaries to the context of the training set"
            )
        planted[name] = np.concatenate([array, canary[flips].astype(array.dtype)])
    return planted


def random_token_canaries(
    num_canaries: int, length: int, *, vocabulary_size: int, context_length: int, seed: int
) -> dict[str, np.ndarray]:
    """Canaries of uniformly random tokens, which a model can only predict if it was trained on them.

    Args:
      num_canaries: m.
      length: number of tokens of each.
      vocabulary_size: ids are drawn below this number.
      context_length: L, columns of the arrays; what is left is padding on the right.
      seed: seed of the tokens, which have a stream of their own beside the `coin_flips` of the same seed.

    Returns:
      ``input_ids``, ``attention_mask``, ``loss_mask``: (m, L) int32; every token is a target.

    Raises:
      ValueError: a canary has no token, or is longer than the context.

    >>> random_token_canaries(1, 2, vocabulary_size=9, context_length=3, seed=0)["attention_mask"]
    array([[1, 1, 0]], dtype=int32)
    """
    if not 1 <= length <= context_length:
        raise ValueError(
            f"a canary of {length} tokens does not fit the context of {context_length} tokens: it would be cut and "
            "measure nothing; shorten it or raise the context (data.max_length)"
        )
    mask = np.broadcast_to(np.arange(context_length) < length, (num_canaries, context_length)).astype(np.int32)
    stream = np.random.SeedSequence(seed, spawn_key=(1,))  # tokens drawn with the coins would give the coins away
    ids = np.random.default_rng(stream).integers(0, vocabulary_size, mask.shape, dtype=np.int32) * mask
    return {"input_ids": ids, "attention_mask": mask, "loss_mask": mask.copy()}


def gradient_scores(
    per_example_losses: PerExampleLosses,
    params: Params,
    canaries: Batch,
    released: Params,
    grad_norms: jax.Array,
    *,
    l2_clip_norm: float,
) -> jax.Array:
    """``<u, c_i g_i>`` of every canary, with its clip factor c_i, by one derivative of the losses along u.

    Args:
      per_example_losses: the losses that were trained.
      params: w_t, at which the step's gradients were taken.
      canaries: a batch of m examples.
      released: u, the noisy clipped gradient of the step; like params.
      grad_norms: (m,) norms of the canaries' gradients before clipping, from `ClippedGradient`.
      l2_clip_norm: C.

    Returns:
      (m,), higher for canaries that were in the sum; add them over the steps.

    >>> losses = lambda w, x: x @ w
    >>> x = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    >>> gradient_scores(losses, jnp.zeros(2), x, jnp.array([1.0, 0.5]), jnp.array([3.0, 4.0]), l2_clip_norm=1.0)
    Array([1. , 0.5], dtype=float32)
    """
    _, along = jax.jvp(lambda p: per_example_losses(p, canaries), (params,), (released,))
    return along * clip_factors(grad_norms, l2_clip_norm=l2_clip_norm, clip="flat")


def repetition_scores(step_scores_TxM: jax.Array) -> jax.Array:
    """Scores that see noise used twice: for each canary, how far the second half of a run is from the first.

    ``sum_t |s_t - s_(t + T/2)|`` with the `gradient_scores` s_t. If a resumed run repeats the noise of its first half,
    the noise cancels. What is left is zero unless the canary was sampled in only one of the two steps.

    Args:
      step_scores_TxM: T even.

    Returns:
      (m,), higher for canaries that were in the sum.
    """
    half = step_scores_TxM.shape[0] // 2
    return jnp.sum(jnp.abs(step_scores_TxM[:half] - step_scores_TxM[half : 2 * half]), axis=0)


def guess_by_rank(scores: np.ndarray, *, num_in: int, num_out: int) -> np.ndarray:
    """Guesses "in" of the highest scores and "out" of the lowest, and abstains from the rest.

    The number of guesses is fixed beforehand, so that the coin flips do not influence it.

    Args:
      scores: (m,), higher for canaries that seem to have been in.
      num_in: how many to call in.
      num_out: how many to call out.

    Returns:
      (m,) of 1 (in), -1 (out) and 0 (no guess).

    Raises:
      ValueError: more guesses than canaries.

    >>> guess_by_rank(np.array([0.1, 3.0, 2.0, -1.0]), num_in=1, num_out=2)
    array([-1,  1,  0, -1])
    """
    if num_in < 0 or num_out < 0 or num_in + num_out > len(scores):
        raise ValueError(f"{num_in} guesses of in and {num_out} of out do not fit {len(scores)} canaries")
    order = np.argsort(scores, kind="stable")
    guesses = np.zeros(len(scores), int)
    guesses[order[:num_out]] = -1
    guesses[order[len(order) - num_in :]] = 1
    return guesses


def correct_guesses(guesses: np.ndarray, flips: np.ndarray) -> tuple[int, int]:
    """``(number of guesses, how many are right)`` for `lower_bounds.one_run_epsilon`.

    >>> correct_guesses(np.array([1, -1, 0]), np.array([True, True, True]))
    (2, 1)
    """
    ventured = guesses != 0
    return int(ventured.sum()), int(np.sum(ventured & ((guesses > 0) == flips)))
