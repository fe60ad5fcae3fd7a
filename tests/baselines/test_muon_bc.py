"""DP-MuonBC: the recursion, what is left without noise, and that the leading bias of the noise is gone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.baselines.muon import orthogonalize
from dp_rmt.baselines.muon_bc import TAYLOR, muon_bc, unbiased_orthogonal

ROWS, COLS = 4, 6


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def last_update(optimizer: optax.GradientTransformation, gradients: list[Any]) -> tuple[Any, Any]:
    state, update = optimizer.init(gradients[0]), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, gradient)
    return updates, state


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """F for rows <= cols, in double precision."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = 15 / 8 * x - 10 / 8 * square @ x + 3 / 8 * square @ square @ x
    return x


def test_without_noise_it_is_heavy_ball_muon_of_the_papers_polynomial() -> None:
    gradients = [{"kernel": normal(2, ROWS, COLS, seed=seed)} for seed in range(3)]
    found, _ = last_update(muon_bc(0.1, 0.0, optax.sgd(1.0), beta=0.8), gradients)
    for layer in range(2):
        momentum = sum(0.8 ** (2 - t) * np.asarray(g["kernel"][layer], np.float64) for t, g in enumerate(gradients))
        np.testing.assert_allclose(found["kernel"][layer], -0.1 * newton_schulz(momentum), atol=1e-6)


def test_the_polynomial_is_the_series_of_the_inverse_root() -> None:
    """Its value and two derivatives at 1 are those of x^(-1/2)."""
    a, b, c = TAYLOR
    assert (a + b + c, b + 2 * c, 2 * c) == (1.0, -0.5, 0.75)


def test_the_noise_of_the_momentum_is_known() -> None:
    """Of two momenta that differ in the noise alone: a fixed sequence of levels, 20,000 entries, so 0.5% of a std."""
    levels = jnp.array([1.0, 0.5, 2.0])
    optimizer = muon_bc(0.1, lambda step: levels[step], optax.sgd(1.0), beta=0.7)
    noise = [{"kernel": level * normal(100, 200, seed=seed)} for seed, level in enumerate(levels)]
    _, state = last_update(optimizer, noise)
    measured, told = jnp.std(optax.tree.get(state, "momentum")["kernel"]), optax.tree.get(state, "noise_std")
    assert float(told) == pytest.approx(np.sqrt(0.7**4 + 0.7**2 * 0.25 + 4), rel=1e-6)
    assert float(measured) == pytest.approx(float(told), rel=0.02)  # four deviations


@pytest.mark.slow
def test_the_leading_bias_of_noise_is_removed() -> None:
    """The mean over noise of the step, against the step without noise; a mean of Muon's own steps is off by the bias.

    The bias of F is of order tau^2 and what the correction leaves of order tau^4. The norms of both means are known to
    their standard errors, 0.005 each over 40,000 draws, of which the bias has 40 (0.20) and what is left 7 (0.035).
    """
    signal, tau, draws = normal(ROWS, COLS, seed=5), jnp.float32(0.35), 40_000

    @jax.jit
    def both(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise, probe = jax.random.split(key)
        matrix = (signal + tau * jax.random.normal(noise, signal.shape))[None]
        return orthogonalize(matrix, TAYLOR)[0], unbiased_orthogonal(matrix, tau, probe, 1)[0]

    plain, corrected = jax.lax.map(both, jax.random.split(jax.random.key(0), draws), batch_size=2000)
    clean = orthogonalize(signal[None], TAYLOR)[0]
    bias, left = (float(jnp.linalg.norm(jnp.mean(x, axis=0) - clean)) for x in (plain, corrected))
    errors = [float(jnp.sqrt(jnp.sum(jnp.var(x, axis=0)) / draws)) for x in (plain, corrected)]
    assert bias > 8 * max(errors)
    assert left < bias / 2


@pytest.mark.slow
def test_more_probes_scatter_less() -> None:
    matrix, tau = normal(1, ROWS, COLS, seed=5), jnp.float32(0.3)
    keys = jax.random.split(jax.random.key(1), 200)
    few, many = (
        jnp.sum(jnp.var(jax.vmap(lambda key, n=n: unbiased_orthogonal(matrix, tau, key, n))(keys), axis=0))
        for n in (1, 8)
    )
    # The variance of a mean of eight; that of 200 draws is known to some 10%.
    assert float(few / many) == pytest.approx(8.0, rel=0.5)


@pytest.mark.parametrize("exponent", [-100, 60])
def test_a_step_has_no_scale(exponent: int) -> None:
    gradients, unit = [normal(ROWS, COLS, seed=seed) for seed in range(2)], 2.0**exponent
    steps = [
        last_update(muon_bc(1.0, 0.3 * u, optax.sgd(1.0)), [{"kernel": g * np.float32(u)} for g in gradients])[0]
        for u in (1.0, unit)
    ]
    np.testing.assert_allclose(steps[0]["kernel"], steps[1]["kernel"], rtol=0, atol=1e-5)


def test_probes_are_new_at_every_step_and_no_others_in_another_run() -> None:
    g = {"kernel": normal(ROWS, COLS)}
    optimizer = muon_bc(1.0, 0.5, optax.sgd(1.0), beta=0.0)  # the momentum is the gradient
    first, second = (last_update(optimizer, [g] * n)[0]["kernel"] for n in (1, 2))
    assert float(jnp.max(jnp.abs(first - second))) > 1e-3
    np.testing.assert_array_equal(first, last_update(optimizer, [g])[0]["kernel"])


def test_other_leaves_have_their_own_optimizer_and_steps_can_be_as_large_as_adams() -> None:
    g = {"kernel": normal(3, 16, 24), "bias": normal(24)}
    found, _ = last_update(muon_bc(1.0, 0.0, optax.sgd(0.5), consistent_rms=0.2), [g])
    np.testing.assert_allclose(found["bias"], -0.5 * g["bias"], rtol=1e-6)
    plain, _ = last_update(muon_bc(1.0, 0.0, optax.sgd(0.5)), [g])
    np.testing.assert_allclose(found["kernel"], 0.2 * np.sqrt(24) * plain["kernel"], rtol=1e-5)


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_std must be non-negative"):
        muon_bc(1.0, -1.0, optax.sgd(1.0))
    with pytest.raises(ValueError, match="num_probes must be at least 1"):
        muon_bc(1.0, 1.0, optax.sgd(1.0), num_probes=0)
    with pytest.raises(ValueError, match="muon_bc"):
        muon_bc(1.0, 1.0, optax.sgd(1.0), matrix_rule=lambda path, leaf: None).init({"kernel": normal(8, 8)})
