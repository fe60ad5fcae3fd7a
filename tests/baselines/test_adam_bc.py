"""DP-AdamBC: the formula, what is left without noise, and that the noise's bias is gone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt import scale_by_denoised_adam
from dp_rmt.baselines.adam_bc import adam_bc, scale_by_adam_bc


def run(transform: optax.GradientTransformation, gradients: Any, params: Any = None) -> Any:
    """All updates, of gradients with a leading axis of steps."""

    def step(state: Any, gradient: Any) -> Any:
        updates, state = transform.update(gradient, state, params)
        return state, updates

    first = jax.tree.map(lambda g: g[0], gradients)
    return jax.jit(lambda state, gs: jax.lax.scan(step, state, gs))(transform.init(first), gradients)[1]


def noisy(steps: int, size: int, mean: float, std: float, seed: int = 0) -> np.ndarray:
    return (mean + std * np.random.default_rng(seed).normal(size=(steps, size))).astype(np.float32)


def brute_force(gradients: np.ndarray, stds: np.ndarray, b1: float, b2: float, floor: float) -> np.ndarray:
    """The last update in double precision, by sums over all steps."""
    ages, g = np.arange(len(gradients))[::-1, None], gradients.astype(np.float64)
    mean = lambda x, decay: np.sum(decay**ages * x, axis=0) / np.sum(decay**ages)  # noqa: E731
    return mean(g, b1) / np.sqrt(np.maximum(mean(g**2, b2) - mean(stds[:, None] ** 2, b2), floor))


def test_it_is_the_papers_update() -> None:
    """Also where the noise changes from step to step."""
    gradients, stds = noisy(6, 50, 0.3, 1.0), np.linspace(0.2, 0.9, 6, dtype=np.float32)
    for std, values in ((0.5, np.full(6, 0.5)), (lambda step: jnp.asarray(stds)[step], stds)):
        found = run(scale_by_adam_bc(std, b1=0.8, b2=0.9, floor=0.05), gradients)[-1]
        np.testing.assert_allclose(found, brute_force(gradients, values, 0.8, 0.9, 0.05), rtol=2e-5)


def test_without_noise_it_is_adam() -> None:
    """The floor, which is far below all squares, does nothing."""
    gradients = noisy(5, 30, 3.0, 0.5)
    found = run(scale_by_adam_bc(0.0, floor=1e-9), gradients)
    np.testing.assert_allclose(found, run(optax.scale_by_adam(eps=0.0), gradients), rtol=1e-6)


def test_the_noise_adds_nothing_to_the_denominator() -> None:
    """A signal of the noise's own size: 1 is the step of Adam without noise, and 1 / sqrt(2) is that with its bias.

    Over 400 steps, v^ - s^2 has a relative deviation of sqrt(6 / 400) = 0.12, so that 1 / sqrt of it is 3 / 8 0.12^2 =
    0.6% too large in the mean. The mean over 20,000 entries of m^, itself of deviation 0.23, is known to 0.2%.
    """
    gradients = noisy(400, 20_000, 1.0, 1.0)
    corrected = run(scale_by_adam_bc(1.0, b2=0.9999, floor=1e-3), gradients)[-1]
    plain = run(optax.scale_by_adam(b2=0.9999), gradients)[-1]
    assert float(jnp.mean(corrected)) == pytest.approx(1.0, abs=0.015)
    assert float(jnp.mean(plain)) == pytest.approx(0.707, abs=0.015)


def test_of_pure_noise_half_the_entries_are_at_the_floor() -> None:
    """v^ of 100 squares is as often below its mean as a chi-square of 100 is: 51.9% of the time.

    0.5% is the deviation of a share of 10,000 entries; four of them are allowed.
    """
    gradients = noisy(100, 10_000, 0.0, 2.0)
    transform = scale_by_adam_bc(2.0, b1=0.0, b2=0.999999, floor=1e-6)
    updates = run(transform, gradients)[-1]
    at_floor = jnp.mean(jnp.abs(updates - gradients[-1] / 1e-3) < 1e-3 * jnp.abs(updates))
    assert float(at_floor) == pytest.approx(0.519, abs=0.02)


@pytest.mark.parametrize("exponent", [-12, 20])
def test_a_step_has_no_scale(exponent: int) -> None:
    """Gradient and noise in another unit, and the floor in its square."""
    gradients, unit = noisy(5, 40, 0.5, 1.0), 2.0**exponent
    found = run(scale_by_adam_bc(1.0 * unit, floor=0.1 * unit**2), gradients * np.float32(unit))
    np.testing.assert_allclose(found, run(scale_by_adam_bc(1.0, floor=0.1), gradients), rtol=1e-6)


def test_the_denoiser_that_keeps_everything_is_the_same() -> None:
    """A bias passes `scale_by_denoised_adam` undenoised; its floor is in units of s^2.

    With b2 = 0.9, because 1 - 0.999^t has few digits of float32, which two programs round in their own ways.
    """
    gradients = {"bias": noisy(5, 40, 0.5, 1.0)}
    expected = run(scale_by_denoised_adam(1.0, b2=0.9, noise_correction=0.2, eps=1e-30), gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        run(scale_by_adam_bc(1.0, b2=0.9, floor=0.2), gradients),
        expected,
    )


def test_the_optimizer_has_a_rate_and_decays_weights() -> None:
    gradients = noisy(1, 5, 0.5, 1.0)
    scaled = run(scale_by_adam_bc(0.3, floor=0.1), gradients)[-1]
    found = run(adam_bc(0.25, 0.3, floor=0.1, weight_decay=0.5), gradients, jnp.full(5, 4.0))[-1]
    np.testing.assert_allclose(found, -0.25 * (scaled + 0.5 * 4.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"floor": 0.0}, "floor must be above 0"), ({"floor": np.nan}, "floor must"), ({"noise_std": -1.0}, "noise_std")],
)
def test_what_cannot_be_used_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scale_by_adam_bc(**{"noise_std": 1.0, **options})
