"""Gaussian noise as an optax transformation: float32, a pure function of (key, step, leaf)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dp_rmt.types import Params, check_leaves_are_real


class GaussianNoiseState(NamedTuple):
    """State of `add_gaussian_noise`; whoever holds it can subtract the noise, so it is as secret as the data.

    Attributes:
      step: number of updates so far, int32 scalar.
      key: data of the key that all noise derives from (uint32), so that a checkpoint carries it.
    """

    step: jax.Array
    key: jax.Array


def noise_key(seed: int) -> jax.Array:
    """The key of a run's noise from a non-negative seed of any size; two seeds give unrelated keys.

    `jax.random.key` keeps 32 bits of a seed, which can be searched; this keeps the 64 bits that a Threefry key has.

    >>> bool((jax.random.key_data(noise_key(7)) != jax.random.key_data(noise_key(7 + 2**32))).any())
    True
    """
    words = np.random.SeedSequence(seed).generate_state(2, np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def add_gaussian_noise(noise_std: float | optax.Schedule, key: jax.Array) -> optax.GradientTransformation:
    """Adds independent N(0, noise_std^2) to every entry of the updates (the Gaussian mechanism; Dwork & Roth 2014).

    The noise of leaf number j at step t is drawn from ``fold_in(fold_in(key, t), j)``: a pure function of (key, t, j),
    identical for any number of devices, and never the same for two steps or two leaves. It is drawn and added in
    float32 (float64 for float64 updates) whatever dtype comes in: bfloat16 noise has 128 distinct values a binade and
    no tails.

    With ``ClippedGradient g`` the guarantee of noise multiplier z holds for ``noise_std = z * g.sensitivity()``. Place
    it once in a chain, after every accumulation over microbatches and devices.

    Args:
      noise_std: standard deviation of one entry, or a schedule of it by step.
      key: a typed JAX key; for private data ``noise_key(fresh_seed())``, new for every training run.

    Returns:
      An `optax.GradientTransformation` with a `GaussianNoiseState`.

    Raises:
      ValueError: noise_std is negative or not finite.

    >>> import jax
    >>> noise = add_gaussian_noise(1.0, jax.random.key(0))
    >>> noisy, state = noise.update(jnp.zeros(3), noise.init(jnp.zeros(3)))
    >>> noisy.shape, int(state.step)
    ((3,), 1)
    """
    if not callable(noise_std) and not 0 <= noise_std < float("inf"):
        raise ValueError(f"noise_std must be non-negative and finite, got {noise_std}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"key must be a typed key such as jax.random.key(seed), got an array of {key.dtype}")
    implementation = jax.random.key_impl(key)

    def init(params: Params) -> GaussianNoiseState:
        check_leaves_are_real(params, "params")
        return GaussianNoiseState(jnp.zeros([], jnp.int32), jax.random.key_data(key))

    def update(updates: Params, state: GaussianNoiseState, params: Params | None = None):
        del params
        check_leaves_are_real(updates, "updates")
        std = noise_std(state.step) if callable(noise_std) else noise_std
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=implementation), state.step)
        leaves, structure = jax.tree.flatten(updates)
        noisy = [_add_noise(leaf, std, jax.random.fold_in(step_key, j)) for j, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, noisy), GaussianNoiseState(state.step + 1, state.key)

    return optax.GradientTransformation(init, update)


def _add_noise(leaf: jax.Array, std: float | jax.Array, key: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(leaf.dtype, jnp.float32)
    return leaf.astype(dtype) + jnp.asarray(std, dtype) * jax.random.normal(key, leaf.shape, dtype)
