"""The scale does not matter: ``2^k Y`` with noise of ``2^k s`` gives 2^k times the result, from 1e-30 to 1e30.

Powers of two, so that the expected result has the digits of the one at scale 1; each decomposition is one of the same
numbers. What is left are products that flush to 0 at the small end, by 1e-38 / 1e-30 of the largest entry.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_rmt import denoise_matrices, random_matrix, scale_by_denoised_adam
from dp_rmt.baselines.muon import private_muon
from dp_rmt.baselines.truncation import truncate_rank
from dp_rmt.denoising import gates
from dp_rmt.random_matrix import shrinkage, units

EXPONENTS = (-99, -64, -33, 31, 67, 99)  # 1e-30 to 1e30
ENDS = (EXPONENTS[0], EXPONENTS[-1])  # where each level is a program of its own
STD, ROWS, COLS = 0.05, 24, 150
VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "gram": {"svd": "gram", "rescale": "signal_norm", "below_edge": "keep"},
    "subspace": {"svd": "subspace", "rescale": "none"},
    "stein": {"blend": "stein", "rescale": "none"},
    "stein_subspace": {"blend": "stein", "svd": "subspace", "gate": gates.TracyWidom(0.01, per="component")},
    "operator": {"shrinker": "operator", "svd": "gram", "blend": "stein"},
    "nuclear": {"shrinker": "nuclear", "gate": gates.Kappa(1.5, per="component"), "rescale": "none"},
    "hard": {"shrinker": "hard_threshold", "below_edge": "keep", "svd": "subspace"},
    "optshrink": {"shrinker": "optshrink", "rescale": "none"},
}


def matrices(rows: int = ROWS, cols: int = COLS, seed: int = 0) -> np.ndarray:
    """A strong signal, one near the edge, noise, nothing."""
    rng = np.random.default_rng(seed)
    limit = STD * (np.sqrt(rows) + np.sqrt(cols))
    strength = np.array([5.0, 1.1, 0.0])[:, None, None] * limit / np.sqrt(rows * cols)
    signal = strength * rng.standard_normal((3, rows, 1)) * rng.standard_normal((3, 1, cols))
    noisy = signal + STD * rng.standard_normal((3, rows, cols))
    return np.concatenate([noisy, np.zeros((1, rows, cols))]).astype(np.float32)


@functools.cache
def step(variant: str) -> Any:
    """``(matrices, noise_std) -> (denoised, diagnostics)``; the level is traced, so that scales share a program."""

    def run(noisy: jax.Array, noise_std: jax.Array) -> Any:
        denoise = denoise_matrices(noise_std, **VARIANTS[variant])
        tree = {"kernel": noisy}
        denoised, state = denoise.update(tree, denoise.init(tree))
        return denoised["kernel"], state.diagnostics["kernel"]

    return jax.jit(run)


def assert_scaled(found: Any, expected: Any, factor: float) -> None:
    unscaled = np.asarray(found, np.float64) / factor
    largest = np.abs(np.asarray(expected, np.float64)).max(axis=(-2, -1), keepdims=True)
    assert (np.abs(unscaled - expected) <= 3e-7 * largest).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_at_every_scale(variant: str) -> None:
    expected, seen = step(variant)(matrices(), np.float32(STD))
    assert seen.kept_rank[0] > seen.kept_rank[3] == 0
    for exponent in EXPONENTS:
        factor = 2.0**exponent
        found, scaled_seen = step(variant)(matrices() * np.float32(factor), np.float32(STD * factor))
        assert_scaled(found, expected, factor)
        np.testing.assert_array_equal(scaled_seen.kept_rank, seen.kept_rank)
        np.testing.assert_array_equal(scaled_seen.top_over_edge, seen.top_over_edge)


@settings(max_examples=40, deadline=None)
@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    exponents=st.lists(st.integers(-50, 50), min_size=4, max_size=4),
    noise_exponent=st.integers(-50, 50),
    shift=st.integers(-49, 49),
)
def test_matrices_of_any_scale_beside_each_other(
    variant: str, exponents: list[int], noise_exponent: int, shift: int
) -> None:
    """Huge and tiny ones in one group, above and below the noise: finite, alone as in company, and no scale of all."""
    scales = np.exp2(np.array(exponents, np.float64))[:, None, None]
    noisy = (matrices() * scales).astype(np.float32)
    level = np.float32(STD * 2.0**noise_exponent)
    found, seen = step(variant)(noisy, level)
    assert np.isfinite(found).all()
    again, seen_again = step(variant)((noisy * 2.0**shift).astype(np.float32), np.float32(level * 2.0**shift))
    np.testing.assert_array_equal(seen_again.kept_rank, seen.kept_rank)
    assert_scaled(again, found, 2.0**shift)
    for number in range(4):
        alone = noisy.copy()
        alone[np.arange(4) != number] = 0
        np.testing.assert_array_equal(step(variant)(alone, level)[0][number], found[number])


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_noise_at_every_scale(variant: str) -> None:
    for exponent in (0, *EXPONENTS):
        noisy = matrices() * np.float32(2.0**exponent)
        found, _ = step(variant)(noisy, np.float32(0))
        np.testing.assert_allclose(found, noisy, rtol=0, atol=2e-5 * np.abs(noisy).max())


@pytest.mark.parametrize("exponent", ENDS)
def test_levels_that_are_constants_of_the_program(exponent: int) -> None:
    """XLA moves constants out of products, and squares them before it divides them."""
    factor = np.float32(2.0**exponent)
    denoise = denoise_matrices(STD * float(factor), blend="stein", rescale="none")
    tree = {"kernel": jnp.asarray(matrices() * factor)}
    found, _ = jax.jit(denoise.update)(tree, denoise.init(tree))
    assert_scaled(found["kernel"], step("stein")(matrices(), np.float32(STD))[0], float(factor))


def test_noise_far_above_a_matrix_shrinks_it_to_nothing_or_leaves_it() -> None:
    tiny = matrices() * np.float32(2.0**-90)
    np.testing.assert_array_equal(step("exact")(tiny, np.float32(1e30))[0], tiny)
    assert not np.any(step("stein")(tiny, np.float32(1e30))[0])


ADAMS: dict[str, dict[str, Any]] = {
    "noisy": {},
    "denoised": {"second_moment": "denoised", "svd": "gram"},
    "corrected": {"noise_correction": 0.1, "svd": "gram"},
}


@functools.cache
def third_step_of_adam(variant: str, scale: float) -> Any:
    """The noise level is a constant of the program, and eps in the units of the gradients, which it is a length of."""
    tree = {"kernel": jnp.asarray(matrices() * np.float32(scale)), "bias": jnp.full(3, scale)}
    adam = scale_by_denoised_adam(STD * scale, eps=1e-3 * scale, **ADAMS[variant])
    state, update = adam.init(tree), jax.jit(adam.update)
    for _ in range(3):
        out, state = update(tree, state)
    return out


@pytest.mark.parametrize("exponent", ENDS)
@pytest.mark.parametrize("variant", ADAMS)
def test_adam_and_its_moments(variant: str, exponent: int) -> None:
    found, expected = third_step_of_adam(variant, 2.0**exponent), third_step_of_adam(variant, 1.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_muon_and_truncation() -> None:
    muon = private_muon(1.0, optax.sgd(1.0))
    transforms: dict[str, Any] = {
        "muon": muon,
        "exact": truncate_rank(2, svd="exact"),
        "gram": truncate_rank(2, svd="gram"),
    }

    @jax.jit
    def steps(tree: Any) -> dict[str, jax.Array]:
        return {name: t.update(tree, t.init(tree), tree)[0]["kernel"] for name, t in transforms.items()}

    expected = steps({"kernel": jnp.asarray(matrices())})
    for exponent in EXPONENTS:
        found = steps({"kernel": jnp.asarray(matrices() * np.float32(2.0**exponent))})
        np.testing.assert_allclose(found["muon"], expected["muon"], rtol=0, atol=1e-5)  # a step has no scale
        for svd in ("exact", "gram"):
            assert_scaled(found[svd], expected[svd], 2.0**exponent)


@pytest.mark.parametrize(
    "name", ["frobenius", "operator", "operator_rectangular", "nuclear", "hard_threshold", "optshrink"]
)
def test_shrinkers_on_plain_arrays(name: str) -> None:
    check_length(getattr(shrinkage, name), jnp.linspace(0.1, 60.0, 7), power=1)


def test_the_law_of_noise_on_plain_arrays() -> None:
    law, y = random_matrix.marchenko_pastur, jnp.linspace(0.1, 60.0, 7)
    check_length(law.observed_singular_value, y, power=1)
    check_length(law.singular_value_density, y, power=-1)


def check_length(function: Any, y: jax.Array, *, power: int) -> None:
    """``f(2^k y, 2^k s) = 2^(k power) f(y, s)``."""
    of = jax.jit(lambda y, std: function(y, rows=7, cols=900, noise_std=std))
    for exponent in EXPONENTS:
        factor = np.float32(2.0**exponent)
        np.testing.assert_allclose(of(y * factor, 1.5 * factor) * factor**-power, of(y, np.float32(1.5)), rtol=1e-5)


def test_units_are_powers_of_two_and_products_with_them_exact() -> None:
    x = np.float32([1e-37, 3e-20, 0.75, 1.0, 3.0, 1e30, 3e38])
    unit = np.asarray(units.unit_of(x))
    assert (np.frexp(unit)[0] == 0.5).all()
    np.testing.assert_array_equal((x * (1 / unit)) * unit, x)
    np.testing.assert_array_equal(np.floor(x[1:-1] / unit[1:-1]), 1)
    np.testing.assert_array_equal(units.unit_of(np.float32([0, np.inf, np.nan])), np.ones(3))
