"""What noise adds to Adam's second moment, and the moment without it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def noise_in_average(before: ArrayLike, noise_std: ArrayLike, decay: ArrayLike) -> jax.Array:
    """Expectation of what the noise adds to one entry of ``v_t = decay v_(t-1) + (1 - decay) g_t^2``, from 0 at first.

    Args:
      before: the same for v_(t-1).
      noise_std: of ONE entry of g_t.
      decay: of the average.

    Returns:
      ``decay before + (1 - decay) noise_std^2``, which has the bias of the start that v_t has.
    """
    return jnp.asarray(decay * before + (1 - decay) * jnp.square(noise_std))


def without_noise(second_moment: ArrayLike, noise: ArrayLike, least: ArrayLike) -> jax.Array:
    """The second moment less what noise adds, ``max(v^ - noise, least)`` (Tang et al. 2024, arXiv 2312.14334).

    Args:
      second_moment: v^, corrected for the bias of the start.
      noise: expectation of what noise adds to it, likewise corrected.
      least: the smallest value that is returned; by chance v^ can be less than the noise adds.

    Returns:
      The shape of `second_moment`.

    >>> print(without_noise(jnp.array([5.0, 1.0]), 2.0, 0.5))
    [3.  0.5]
    """
    return jnp.maximum(jnp.asarray(second_moment) - noise, least)
