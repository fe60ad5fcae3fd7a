"""The two engines of the audit: one run with many canaries, and many runs with one canary in or out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dp_rmt.auditing import canaries, lower_bounds
from dp_rmt.auditing.membership import Interval, auc
from dp_rmt.auditing.problems import CLIP_NORM, Audited, canary_losses, canary_params
from dp_rmt.batch_selection import PoissonSampling
from dp_rmt.clipping.execution import Execution
from dp_rmt.clipping.quantile import QuantileClippingState
from dp_rmt.noise_addition import noise_key
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import make_train_step
from dp_rmt.types import Params, PerExampleLosses

RELEASED = "released"


class OneRun:
    """One training run with canaries planted by coin flips, and their scores."""

    def __init__(
        self,
        mechanism: Audited,
        losses: PerExampleLosses,
        params: Params,
        arrays: Mapping[str, np.ndarray],
        microbatch_size: int | None = None,
    ) -> None:
        self.mechanism, self.losses, self.params, self.arrays = mechanism, losses, params, arrays
        self.execution = Execution("vmap", microbatch_size)

    def scores(self, flips: np.ndarray, *, seed: int, learning_rate: float) -> dict[str, np.ndarray]:
        """Trains on the canaries whose coin says so, and scores all canaries.

        Args:
          flips: (m,) bool. The canaries are the first m rows of the arrays; all further rows are always trained on.
          seed: seed of sampling and noise.
          learning_rate: learning rate of plain gradient descent.

        Returns:
          ``gradient`` (white-box) and ``loss`` (by how much the loss fell), each (m,).
        """
        num_canaries, total = len(flips), len(next(iter(self.arrays.values())))
        present = np.concatenate([np.flatnonzero(flips), np.arange(num_canaries, total)])
        planted = {name: jnp.asarray(x[:num_canaries]) for name, x in self.arrays.items()}
        mechanism = self.mechanism
        transforms = _transforms(mechanism, noise_key(seed, mechanism.noise_generator), learning_rate)
        state = TrainState.create(transforms, self.params, {})
        train_step = jax.jit(
            make_train_step(mechanism, self.losses, transforms, execution=self.execution, nonprivate_metrics=False)
        )
        right = dataclasses.replace(mechanism, mutation="none")
        sampling = PoissonSampling(len(present), mechanism.sampling_probability, len(_rows(mechanism)), seed + 1)

        @jax.jit
        def score(params: Params, released: Params) -> jax.Array:
            _, per_example = right.clipped_grad(self.losses, self.execution)(params, planted, is_padding_example=None)
            return canaries.gradient_scores(
                self.losses, params, planted, released, per_example.grad_norm, l2_clip_norm=right.l2_clip_norm
            )

        total_scores = np.zeros(num_canaries)
        for step in range(mechanism.num_steps):
            indices = sampling.indices(step)
            rows = present[indices]  # padding becomes the last row, which a right step does not use
            batch = {name: x[rows] for name, x in self.arrays.items()}
            before = state.params
            state, _ = train_step(state, [(batch, indices < 0)])
            total_scores += np.asarray(score(before, optax.tree.get(state.optimizer, RELEASED)))
        fell = self.losses(self.params, planted) - self.losses(state.params, planted)
        return {"gradient": total_scores, "loss": np.asarray(fell)}


def one_run_bound(
    scores: np.ndarray, flips: np.ndarray, *, share: float, delta: float, confidence: float = 0.95
) -> dict[str, Any]:
    """The bound from guessing the highest and the lowest scores, with the numbers that it was made of.

    Args:
      scores: (m,) scores of the canaries.
      flips: (m,) their coins.
      share: the share of all canaries that is guessed to be in, and again to be out; at most a half.
      delta: of the bound.
      confidence: of the bound.
    """
    guessed = int(share * len(scores))
    guesses, right = canaries.correct_guesses(canaries.guess_by_rank(scores, num_in=guessed, num_out=guessed), flips)
    bound = lower_bounds.one_run_epsilon(len(scores), guesses, right, delta=delta, confidence=confidence)
    area: Interval = auc(scores[flips], scores[~flips])
    return {"epsilon": bound, "canaries": len(scores), "guesses": guesses, "correct": right, "auc": list(area)}


@functools.lru_cache(maxsize=2)  # every mutation meets the same samples
def sampled_rows(
    num_runs: int, num_examples: int, sampling_probability: float, num_steps: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Poisson samples of all runs, by the project's sampler.

    Returns:
      ``(indices, is_padding)``, each (num_runs, num_steps, num_examples). Where the data has the canary, it is the last
      example, to which the index -1 of padding points.
    """
    indices = np.empty((num_runs, num_steps, num_examples), np.int32)
    for run in range(num_runs):
        sampling = PoissonSampling(num_examples, sampling_probability, num_examples, seed * num_runs + run)
        for step in range(num_steps):
            indices[run, step] = sampling.indices(step)
    return indices, indices < 0


def repeated_scores(
    mechanism: Audited, *, with_canary: bool, num_runs: int, seed: int, chunk: int = 2000
) -> dict[str, np.ndarray]:
    """Scores of the one canary in independent runs, all with it or all without.

    The N - 1 other examples are always there; every run has sampling and noise of its own.

    Args:
      mechanism: a mechanism of N examples; its model has N coordinates.
      with_canary: whether the runs train on the canary.
      num_runs: number of runs.
      seed: seed of all runs.
      chunk: number of runs computed at once.

    Returns:
      ``sum`` (inner products with the released updates) and ``repetition`` (`repetition_scores`), each (num_runs,).
    """
    size, steps = mechanism.num_examples, mechanism.num_steps
    present = np.concatenate([np.arange(1, size), [0]]) if with_canary else np.arange(1, size)
    indices, is_padding = sampled_rows(num_runs, len(present), mechanism.sampling_probability, steps, seed)
    short = size - indices.shape[2]
    rows = np.pad(present[indices], ((0, 0), (0, 0), (0, short)), constant_values=present[-1])
    is_padding = np.pad(is_padding, ((0, 0), (0, 0), (0, short)), constant_values=True)
    size_of_key = len(jax.random.key_data(noise_key(0, mechanism.noise_generator)))
    words = np.random.SeedSequence(seed).generate_state(size_of_key * num_runs, np.uint32).reshape(num_runs, -1)
    run = _repeated_runs(mechanism)
    chunks = [slice(start, start + chunk) for start in range(0, num_runs, chunk)]
    parts = [run(words[part], rows[part], is_padding[part]) for part in chunks]
    total, repetition = (np.concatenate([np.asarray(part[j]) for part in parts]) for j in (0, 1))
    return {"sum": total, "repetition": repetition}


def repeated_bound(
    mechanism: Audited, *, num_runs: int, delta: float, seed: int, confidence: float = 0.95
) -> dict[str, Any]:
    """The bound of `num_runs` runs with the canary and as many without.

    A tenth of the runs chooses the attack and its threshold, and the others are counted.
    """
    scores_in = repeated_scores(mechanism, with_canary=True, num_runs=num_runs, seed=seed)
    scores_out = repeated_scores(mechanism, with_canary=False, num_runs=num_runs, seed=seed + 1)
    tuning = num_runs // 10
    chosen = {
        name: lower_bounds.best_threshold(scores_in[name][:tuning], scores_out[name][:tuning], delta=delta)
        for name in scores_in
    }
    attack = max(chosen, key=lambda name: chosen[name][1])
    counted = lower_bounds.count(scores_in[attack][tuning:], scores_out[attack][tuning:], chosen[attack][0])
    bound = lower_bounds.repeated_runs_epsilon(counted, delta=delta, confidence=confidence)
    return {"epsilon": bound, "attack": attack, "threshold": chosen[attack][0], **counted._asdict()}


@functools.lru_cache(maxsize=1)  # compiled once for runs with and without the canary
def _repeated_runs(mechanism: Audited) -> Any:
    """``(key words (R, 2), rows (R, T, N), is_padding (R, T, N)) -> (sum scores, repetition scores)``, each (R,)."""
    transforms = _transforms(mechanism, noise_key(0, mechanism.noise_generator), learning_rate=1.0)
    execution = Execution("vmap")
    train_step = make_train_step(mechanism, canary_losses, transforms, execution=execution, nonprivate_metrics=False)
    initial = TrainState.create(transforms, canary_params(mechanism.num_examples), {})
    canary = {"row": jnp.zeros(1, jnp.int32)}
    # The canary's rows are alike, so that their mean gradient is that of one.
    by_row = dataclasses.replace(mechanism, mutation="none", rows_per_user=None, clip_quantile=None)
    right = by_row.clipped_grad(canary_losses, execution)

    def step(state: TrainState, sample: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[TrainState, jax.Array]:
        number, rows, is_padding = sample
        if mechanism.repeats_noise:
            state = _with_noise(state, step=number % (mechanism.num_steps // 2))
        _, per_example = right(state.params, canary, is_padding_example=None)
        params, before = state.params, state.noise
        if mechanism.rows_per_user is not None:  # each user has so many rows, all alike
            rows, is_padding = (jnp.stack([a] * mechanism.rows_per_user, axis=-1) for a in (rows, is_padding))
        state, _ = train_step(state, [({"row": rows}, is_padding)])
        released = optax.tree.get(state.optimizer, RELEASED)
        score = canaries.gradient_scores(
            canary_losses, params, canary, released, per_example.grad_norm, l2_clip_norm=mechanism.l2_clip_norm
        )
        return state, score + _score_of_count(mechanism, before, state.noise)

    def run(words: jax.Array, rows: jax.Array, is_padding: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = _with_noise(initial, key=words)
        _, scores_TxM = jax.lax.scan(step, state, (jnp.arange(mechanism.num_steps), rows, is_padding))
        return jnp.sum(scores_TxM), canaries.repetition_scores(scores_TxM)[0]

    return jax.jit(jax.vmap(run))


def _with_noise(state: TrainState, **changes: Any) -> TrainState:
    """The state with another step or key of its noise."""
    noise = state.noise
    if isinstance(noise, QuantileClippingState):
        return dataclasses.replace(state, noise=noise._replace(noise=noise.noise._replace(**changes)))
    return dataclasses.replace(state, noise=noise._replace(**changes))


def _score_of_count(mechanism: Audited, before: Any, after: Any) -> jax.Array:
    """What the noisy count of a clip norm that follows a quantile adds to the score of a step.

    The count is read from the move of the norm. The canary's gradient is too long, which moves it by -1/2, where it
    moves the gradient by 1: by their noise these weigh as ``-1/2 (z_g / z_c)^2`` to 1.
    """
    clipping = mechanism.clip_quantile
    if clipping is None:
        return jnp.zeros([])
    of_sum, of_count = clipping.noise_multipliers(mechanism.noise_multiplier)
    moved = jnp.log(after.l2_clip_norm / before.l2_clip_norm)
    count = clipping.quantile - moved / clipping.learning_rate - 0.5
    return -0.5 * (of_sum / of_count) ** 2 * CLIP_NORM * count


def _transforms(mechanism: Audited, key: jax.Array, learning_rate: float) -> Transforms:
    released = optax.snapshot(RELEASED, lambda updates: updates)
    return Transforms(mechanism.noise(key), optax.identity(), optax.chain(released, optax.sgd(learning_rate)))


def _rows(mechanism: Audited) -> range:
    return range(mechanism.truncation.max_batch_size)
