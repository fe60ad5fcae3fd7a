"""What limits a run, measured from noisy gradients: the slope's law, the power method's law, and who finds what."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dp_rmt.reporting.advice import advice
from dp_rmt.training.advice import StepQuality, advice_metrics, measure_steps, slope_along

STD = 0.1
CURVATURE = jnp.full(50, 0.05).at[0].set(4.0)  # one steep direction, as layers have along their mean input


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
    gradient = jnp.linspace(0.5, 4.0, 50) * (x + update)
    noisy = gradient + STD * jax.random.normal(jax.random.key(2), (draws, 50))
    z = np.asarray(jax.vmap(lambda g: slope_along(update, g, jnp.float32(STD)))(noisy))
    mean = -float(update @ gradient / (STD * jnp.linalg.norm(update)))
    assert abs(mean) > 10  # so that a wrong sign or a wrong unit would be seen
    assert abs(z.mean() - mean) < 5 / draws**0.5
    assert abs(z.var() - 1) < 5 * (2 / draws) ** 0.5


def test_at_a_stationary_point_the_slope_is_standard_normal() -> None:
    """No gradient at all: 2000 slopes of steps along noise, each independent of the next noise."""
    optimizer = measure_steps(optax.adam(1e-3), STD)

    def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        noisy = STD * jax.random.normal(key, (200,))
        _, state = optimizer.update(noisy, state, None, noisy=noisy)
        return state, state.slope

    keys = jax.random.split(jax.random.key(3), 2001)
    z = np.asarray(jax.lax.scan(step, optimizer.init(jnp.zeros(200)), keys)[1])[1:]
    assert stats.kstest(z, "norm").pvalue > 1e-3
    below = int(np.sum(z < -2))  # binomial, 45.5 expected; a p-value of 1e-3 with a fixed seed
    assert stats.binomtest(below, len(z), stats.norm.cdf(-2)).pvalue > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_a_step_twice_too_long_is_found_and_half_of_it_is_not(seed: int) -> None:
    """Along a direction of curvature 4 the rate 1/2 throws x to the other side, and 1/4 ends at the minimum."""
    too_long, fitting = (advice(lines_of(descend(rate, steps=15, seed=seed))) for rate in (0.48, 0.24))
    assert too_long is not None
    assert fitting is not None
    assert too_long.num_overshot > 10
    assert too_long.overshoots
    assert not fitting.overshoots


def lines_of(slopes: np.ndarray) -> list[dict[str, Any]]:
    return [{"step": number, "advice/slope": float(z)} for number, z in enumerate(slopes, start=2)]


def test_the_slope_is_of_the_step_before_and_the_first_step_has_none() -> None:
    optimizer = measure_steps(optax.sgd(1.0), STD)
    x = jnp.ones(4)
    state = optimizer.init(x)
    _, state = optimizer.update(jnp.ones(4), state, x, noisy=jnp.ones(4))
    assert np.isnan(state.slope)
    np.testing.assert_array_equal(state.last_update, -1.0)
    _, state = optimizer.update(jnp.zeros(4), state, x, noisy=jnp.array([0.3, 0.0, 0.0, -0.1]))
    np.testing.assert_allclose(state.slope, 0.2 / (STD * 2), rtol=1e-5)  # uphill would be negative
    np.testing.assert_array_equal(state.last_update, 0.0)
    _, state = optimizer.update(jnp.ones(4), state, x, noisy=jnp.ones(4))
    assert np.isnan(state.slope)  # behind a step of length 0 there is no slope


@pytest.mark.parametrize("factor", [1e-20, 1e-10, 1e10, 1e20])
def test_the_unit_of_the_loss_does_not_matter(factor: float) -> None:
    """Loss and noise times a factor, the step too: no square leaves the range of float32."""
    params = {"kernel": jnp.zeros((12, 16)), "bias": jnp.zeros(5)}
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda p: 1 + rng.normal(size=p.shape), params) for _ in range(3)]

    def measured(scale: float) -> dict[str, jax.Array]:
        optimizer = measure_steps(optax.sgd(0.1), STD * scale)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for gradient in gradients:
            noisy = jax.tree.map(lambda g: jnp.asarray(g * scale, jnp.float32), gradient)
            _, state = update(noisy, state, params, noisy=noisy)
        return advice_metrics(state)

    found, expected = measured(factor), measured(1.0)
    assert float(expected["advice/top_over_edge"]) > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)


def test_the_optimizer_and_what_it_is_given_are_left_alone() -> None:
    params, gradient = {"kernel": jnp.zeros((8, 8))}, {"kernel": jnp.ones((8, 8))}
    plain, measuring = optax.adam(0.1), measure_steps(optax.adam(0.1), STD)
    left, right = plain.init(params), measuring.init(params)
    for _ in range(3):
        expected, left = plain.update(gradient, left, params)
        found, right = measuring.update(gradient, right, params, noisy={"kernel": jnp.zeros((8, 8))})
        jax.tree.map(np.testing.assert_array_equal, (found, right.inner), (expected, left))


def ratios(signal: float, *, steps: int, rows: int = 24, cols: int = 40, count: int = 1) -> np.ndarray:
    """What is seen, (steps, count), of ``signal u v^T`` in noise of std 0.1 that is fresh in every step."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(count, rows, 1)), rng.normal(size=(count, 1, cols))
    clean = signal * (u / np.linalg.norm(u, axis=1, keepdims=True)) * (v / np.linalg.norm(v, axis=2, keepdims=True))
    optimizer = measure_steps(optax.sgd(0.1), STD)
    params = {"kernel": jnp.zeros((count, rows, cols))}
    state, update, seen = optimizer.init(params), jax.jit(optimizer.update), []
    for _ in range(steps):
        noisy = {"kernel": jnp.asarray(clean + STD * rng.normal(size=clean.shape), jnp.float32)}
        _, state = update(noisy, state, params, noisy=noisy)
        top = np.linalg.svd(np.asarray(noisy["kernel"]), compute_uv=False)[:, 0]
        edge = STD * (rows**0.5 + cols**0.5)
        assert (np.asarray(state.top_over_edge["kernel"]) <= top / edge * (1 + 1e-5)).all()
        seen.append(np.asarray(state.top_over_edge["kernel"]))
    return np.array(seen)


def test_in_noise_alone_the_largest_value_seen_has_its_exact_law_below_the_edge() -> None:
    """``y^2 / s^2`` is chi-squared with rows + cols - 1 degrees of freedom, whatever the steps before."""
    rows, cols = 24, 40
    seen = ratios(0.0, steps=10, rows=rows, cols=cols, count=50)
    squares = np.square(seen * (rows**0.5 + cols**0.5)).ravel()
    assert stats.kstest(squares, stats.chi2(rows + cols - 1).cdf).pvalue > 1e-3
    assert seen.max() < 1


def test_a_signal_above_the_edge_is_found_after_a_few_steps_and_kept() -> None:
    edge = STD * (24**0.5 + 40**0.5)
    seen = ratios(1.5 * edge, steps=12)
    assert (seen[4:] > 1.2).all()
    assert (ratios(0.3 * edge, steps=12) < 1).all()


def test_a_gradient_that_is_not_finite_is_seen_as_such_and_the_search_goes_on() -> None:
    optimizer = measure_steps(optax.sgd(0.1), STD)
    params, ones = {"kernel": jnp.zeros((8, 8))}, {"kernel": jnp.ones((8, 8))}
    state = optimizer.init(params)
    for noisy in (ones, {"kernel": jnp.full((8, 8), jnp.nan)}, {"kernel": jnp.zeros((8, 8))}, ones):
        updates = jax.tree.map(jnp.zeros_like, noisy)
        _, state = optimizer.update(updates, state, params, noisy=noisy)
        metrics = advice_metrics(state)
        assert np.isnan(metrics["advice/slope"])  # every step has length 0
    np.testing.assert_allclose(metrics["advice/top_over_edge"], 8 / (STD * 2 * 8**0.5), rtol=1e-5)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match="noise_std is 0"):
        measure_steps(optax.sgd(0.1), 0.0)
    optimizer = measure_steps(optax.sgd(0.1), STD)
    with pytest.raises(ValueError, match=r"update\(\.\.\., noisy=gradient\)"):
        optimizer.update(jnp.ones(3), optimizer.init(jnp.ones(3)))
    assert advice_metrics(optax.sgd(0.1).init(jnp.ones(3))) == {}
    assert isinstance(optimizer.init(jnp.ones(3)), StepQuality)
