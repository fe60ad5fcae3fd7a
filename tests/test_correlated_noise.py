"""Noise that is correlated over steps: its covariance, its level, its state, and jax_privacy's own numbers."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from dp_rmt.correlated_noise import (
    BandedToeplitz,
    CorrelatedNoiseLevel,
    add_correlated_noise,
    optimised,
    square_root,
    std_in_decayed_sum,
    with_history,
    without_history,
)
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import add_gaussian_noise

STRATEGY, STEPS, STD = square_root(4), 12, 0.7
RUN = {"num_examples": 1000, "expected_batch_size": 50.0, "num_steps": STEPS, "l2_clip_norm": 0.1}


def dense(strategy: BandedToeplitz, num_steps: int = STEPS) -> np.ndarray:
    """C itself."""
    column = np.zeros(num_steps)
    column[: strategy.bands] = strategy.coefficients[:num_steps]
    return scipy.linalg.toeplitz(column, np.zeros(num_steps))


def released_noise(strategy: BandedToeplitz, entries: int, steps: int = STEPS, std: float = STD, seed: int = 0):
    """The noise of a run, float32 (steps, entries), and the state after it."""
    noise = add_correlated_noise(std, strategy, jax.random.key(seed))
    zeros = {"w": jnp.zeros(entries)}
    state, update, rows = noise.init(zeros), jax.jit(noise.update), []
    for _ in range(steps):
        noisy, state = update(zeros, state)
        rows.append(np.asarray(noisy["w"]))
    return np.stack(rows), state


@pytest.mark.parametrize("strategy", [square_root(1), STRATEGY, BandedToeplitz((2.0, -0.5, 0.3))])
def test_what_is_released_is_the_inverse_strategy_of_the_independent_noise(strategy: BandedToeplitz) -> None:
    """``C Y = Z``, Z being what `add_gaussian_noise` draws of the same key."""
    found, _ = released_noise(strategy, entries=50)
    independent, zeros = add_gaussian_noise(STD, jax.random.key(0)), {"w": jnp.zeros(50)}
    state = independent.init(zeros)
    for row in (dense(strategy) @ found).astype(np.float32):
        z, state = independent.update(zeros, state)
        np.testing.assert_allclose(row, z["w"], atol=3e-6)


def test_one_band_is_independent_noise_bit_for_bit() -> None:
    found, _ = released_noise(square_root(1), entries=50, steps=3)
    plain, zeros = add_gaussian_noise(STD, jax.random.key(0)), {"w": jnp.zeros(50)}
    state = plain.init(zeros)
    for row in found:
        noisy, state = plain.update(zeros, state)
        np.testing.assert_array_equal(row, noisy["w"])


def test_covariance_over_steps_and_independence_of_entries() -> None:
    entries = 20_000
    found, _ = released_noise(STRATEGY, entries)
    inverse = np.linalg.inv(dense(STRATEGY))
    expected = STD**2 * inverse @ inverse.T
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)) + expected**2)
    assert np.abs((found @ found.T / entries - expected) / scale).max() < 5 / math.sqrt(entries)
    neighbours = np.mean(found[:, :-1] * found[:, 1:], axis=1) / np.diag(expected)
    assert np.abs(neighbours).max() < 5 / math.sqrt(entries)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_level_of_a_decayed_sum_is_that_of_the_covariance(decay: float) -> None:
    level = CorrelatedNoiseLevel(STD, STRATEGY, STEPS)
    weights = scipy.linalg.toeplitz(decay ** np.arange(STEPS), np.zeros(STEPS)) @ np.linalg.inv(dense(STRATEGY))
    expected = STD * np.linalg.norm(weights, axis=1)
    found = [float(level.of_decayed_sum(decay)(jnp.int32(step))) for step in range(STEPS)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    if decay == 0:
        np.testing.assert_allclose([float(level(step)) for step in range(STEPS)], expected, rtol=1e-6)
        assert found[-1] > 1.15 * found[0]  # so that a constant level would be noticed


def test_independent_noise_adds_up_by_squares() -> None:
    before = jnp.float32(0.0)
    for step in range(4):
        before = std_in_decayed_sum(before, STD, 0.9, jnp.int32(step))
    assert float(before) == pytest.approx(STD * math.sqrt(sum(0.81**k for k in range(4))), rel=1e-6)
    level = CorrelatedNoiseLevel(STD, square_root(1), 4)
    assert float(std_in_decayed_sum(jnp.float32(9.0), level, 0.9, jnp.int32(3))) == pytest.approx(
        float(before), rel=1e-6
    )


def test_prefix_sums_have_the_error_that_is_said() -> None:
    sums = np.tri(STEPS) @ np.linalg.inv(dense(STRATEGY))
    expected = STRATEGY.column_norm * math.sqrt(np.mean(np.sum(sums**2, axis=1)))
    assert STRATEGY.prefix_sum_error(STEPS) == pytest.approx(expected, rel=1e-12)
    assert STRATEGY.column_norm == pytest.approx(np.linalg.norm(dense(STRATEGY), axis=0).max(), rel=1e-12)
    assert square_root(1).prefix_sum_error(STEPS) == pytest.approx(math.sqrt((STEPS + 1) / 2), rel=1e-12)


def test_history_is_left_out_and_put_back() -> None:
    _, state = released_noise(STRATEGY, entries=3, steps=2)
    _, other = released_noise(STRATEGY, entries=3, steps=5)
    assert len(jax.tree.leaves(without_history(state))) == 2
    put_back = with_history(without_history(state), other)
    assert int(put_back.white.step) == 2
    jax.tree.map(np.testing.assert_array_equal, put_back.earlier, other.earlier)


def test_the_mechanism_hands_out_one_level() -> None:
    mechanism = DPSGD(noise_multiplier=1.5, noise_strategy=STRATEGY, **RUN)
    std = 1.5 * STRATEGY.column_norm * 0.1 / 50
    level = mechanism.noise_level
    assert isinstance(level, CorrelatedNoiseLevel)
    assert (level.std, level.num_steps) == (pytest.approx(std, rel=1e-12), STEPS)
    assert mechanism.largest_noise_std == pytest.approx(float(level(STEPS - 1)), rel=1e-12)
    noise, zeros = mechanism.noise(jax.random.key(1)), {"w": jnp.zeros(40_000)}
    noisy, _ = noise.update(zeros, noise.init(zeros))
    assert float(jnp.std(noisy["w"])) == pytest.approx(std, rel=5 / math.sqrt(2 * 40_000))
    with pytest.raises(ValueError, match="give noise_level, in the place of noise_std"):
        _ = mechanism.noise_std
    plain = dataclasses.replace(mechanism, noise_strategy=None)
    assert plain.noise_level == plain.noise_std == plain.largest_noise_std


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_per_user": 2}, "noise_strategy and rows_per_user"),
        ({"noise_multiplier": 0.0}, "noise_strategy needs noise"),
        ({"noise_strategy": square_root(21)}, "at most 20 bands"),
    ],
)
def test_what_is_not_derived_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPSGD(**({"noise_multiplier": 1.0, "noise_strategy": STRATEGY, **RUN} | change))


@pytest.mark.parametrize("given", [(), (0.0, 1.0), (-1.0,), (1.0, math.nan), (1.0, 1.5), (1.0, 1.0)])
def test_bad_coefficients_are_refused(given: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="coefficients"):
        BandedToeplitz(given)


# ---- jax_privacy's own numbers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toeplitz():
    factorization = pytest.importorskip("jax_privacy.matrix_factorization", reason="the extra 'peers'")
    return factorization.toeplitz


def test_jax_privacys_coefficients_are_ours(toeplitz) -> None:
    np.testing.assert_allclose(square_root(9).coefficients, toeplitz.optimal_max_error_strategy_coefs(9), rtol=1e-6)
    ours = STRATEGY.noising_coefficients(STEPS)
    np.testing.assert_allclose(ours, toeplitz.inverse_coef(jnp.array(STRATEGY.coefficients), STEPS), atol=1e-6)


def test_jax_privacys_sensitivity_and_error_are_ours(toeplitz) -> None:
    coefficients = jnp.array(STRATEGY.coefficients)
    once = toeplitz.minsep_sensitivity_squared(coefficients, min_sep=4, max_participations=1, n=STEPS)
    every = toeplitz.minsep_sensitivity_squared(coefficients, min_sep=4, n=STEPS)
    assert float(once) == pytest.approx(STRATEGY.column_norm**2, rel=1e-6)
    assert float(every) == pytest.approx(STEPS // 4 * STRATEGY.column_norm**2, rel=1e-6)
    errors = toeplitz.per_query_error(strategy_coef=coefficients, n=STEPS)
    assert STRATEGY.prefix_sum_error(STEPS) == pytest.approx(math.sqrt(float(once) * float(errors.mean())), rel=1e-5)


def test_jax_privacys_noise_is_ours_for_the_same_draws(toeplitz) -> None:
    found, _ = released_noise(STRATEGY, entries=6)
    z = (dense(STRATEGY) @ found).astype(np.float32)
    theirs = toeplitz.inverse_as_streaming_matrix(jnp.array(STRATEGY.coefficients)) @ jnp.array(z)
    np.testing.assert_allclose(found, theirs, atol=1e-5)


def test_optimised_coefficients_have_a_smaller_error(toeplitz) -> None:
    del toeplitz
    best = optimised(4, 30)
    assert best.bands == 4
    assert best.prefix_sum_error(30) < 0.995 * square_root(4).prefix_sum_error(30)
    assert best == optimised(4, 30)
