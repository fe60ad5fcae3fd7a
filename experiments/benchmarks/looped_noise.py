"""The noise of `dp_rmt.add_gaussian_noise` as JAX's own Threefry draws it: on the CPU by a loop over whole arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.extend.random import threefry2x32_p

from dp_rmt.noise_addition import GaussianNoiseState, add_gaussian_noise, normal_of_words
from dp_rmt.types import Params


def add_looped_noise(noise_std: float, key: jax.Array) -> optax.GradientTransformation:
    """Adds the same numbers to the last bit, for leaves of fewer than 2^32 entries.

    Args:
      noise_std: standard deviation of one entry.
      key: a typed Threefry key.

    Returns:
      An `optax.GradientTransformation` with the same state.
    """

    @jax.named_scope("noise")
    def update(updates: Params, state: GaussianNoiseState, params: Params | None = None):
        del params
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="threefry2x32"), state.step)
        leaves, structure = jax.tree.flatten(updates)
        noisy = [leaf + noise_std * _normal(jax.random.fold_in(step_key, j), leaf) for j, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, noisy), GaussianNoiseState(state.step + 1, state.key)

    return optax.GradientTransformation(add_gaussian_noise(noise_std, key).init, update)


def _normal(key: jax.Array, leaf: jax.Array) -> jax.Array:
    places = jnp.arange(leaf.size, dtype=jnp.uint32).reshape(leaf.shape)
    words = threefry2x32_p.bind(*jax.random.key_data(key), jnp.zeros_like(places), places)
    return normal_of_words(*words)
