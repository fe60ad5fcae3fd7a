"""What limits a run, measured from noisy gradients: the slope's law, the power method's law, and who finds what."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dp_rmt.training.advice import StepQuality, advice_metrics, measure_steps, slope_along

STD = 0.1
CURVATURE = jnp.linspace(0.5, 4.0, 50)


def descend(rate: float, *, std: float = STD, steps: int = 40, start: float = 30.0, seed: int = 0) -> np.ndarray:
    """The slopes that plain descent of ``sum h x^2 / 2`` sees, one for each step but the first."""
    optimizer = measure_steps(optax.sgd(rate), std)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        x, state = carry
        noisy = CURVATURE * x + std * jax.random.normal(key, x.shape)
        updates, state = optimizer.update(noisy, state, x, noisy=noisy)
        return (x + updates, state), state.slope

    x = jnp.full(50, start * std)
    keys = jax.random.split(jax.random.key(seed), steps + 1)
    return np.asarray(jax.lax.scan(step, (x, optimizer.init(x)), keys)[1])[1:]


def test_the_slope_is_normal_around_what_the_quadratic_gives() -> None:
    """Mean -<d, H x> / (s |d|), variance 1, over 4000 draws of the noise: 5 standard errors."""
    x, update, draws = jnp.linspace(-1, 1, 50), jax.random.normal(jax.random.key(1), (50,)), 4000
    gradient = CURVATURE * (x + update)
    noisy = gradient + STD * jax.random.normal(jax.random.key(2), (draws, 50))
    z = np.asarray(jax.vmap(lambda g: slope_along(update, g, jnp.float32(STD)))(noisy))
    mean = -float(update @ gradient / (STD * jnp.linalg.norm(update)))
    assert abs(mean) > 10  # so that a wrong sign or a wrong unit would be seen
    assert abs(z.mean() - mean) < 5 / draws**0.5
    assert abs(z.var() - 1) < 5 * (2 / draws) ** 0.5
