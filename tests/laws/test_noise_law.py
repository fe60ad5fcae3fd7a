"""The law of the noise: independent N(0, noise_std^2) in every entry, by statistics on 10^6 draws.

Keys are fixed, so the tests are deterministic. A threshold of 5 (in standard normal units) would reject right noise for
one key in two million; `test_the_checks_reject_wrong_noise` shows what they do reject, 1% of wrong standard deviation
among it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dp_rmt.noise_addition import add_gaussian_noise, noise_key

NUM_DRAWS = 10**6
NOISE_STD = 0.037
THRESHOLD = 5.0
FIRST_STEP = 3


GENERATORS = ("threefry2x32", "chacha20")


def draw(*, generator="threefry2x32", noise_std=NOISE_STD, shape=(NUM_DRAWS,)):
    """What is added to zeros at step `FIRST_STEP`, in units of NOISE_STD."""
    noise, zeros = add_gaussian_noise(noise_std, noise_key(0, generator)), jnp.zeros(shape)
    state = noise.init(zeros)
    state = state._replace(step=state.step + FIRST_STEP)
    return np.asarray(jax.jit(noise.update)(zeros, state)[0]).ravel() / NOISE_STD


def chi_square_score(z):
    """``sum z^2`` is chi-square with n degrees of freedom (Wilson & Hilferty 1931); 1% of std is 14 at 10^6 draws."""
    variance = 2 / (9 * z.size)
    return (np.cbrt(np.mean(np.square(z, dtype=np.float64))) - (1 - variance)) / np.sqrt(variance)


def mean_score(z):
    return np.mean(z, dtype=np.float64) * np.sqrt(z.size)


def kolmogorov_smirnov_score(z):
    """The largest distance of the distribution functions, over its 99.9999% quantile, times the threshold."""
    return THRESHOLD * stats.kstest(z, "norm").statistic / (2.7 / np.sqrt(z.size))


def tail_score(z):
    """How many lie beyond 4 standard deviations: 63 of 10^6."""
    probability = 2 * stats.norm.sf(4)
    return (np.sum(np.abs(z) > 4) - z.size * probability) / np.sqrt(z.size * probability)


def skewness_score(z):
    """``mean z^3``, of variance 15."""
    return np.mean(np.power(z, 3, dtype=np.float64)) * np.sqrt(z.size / 15)


def kurtosis_score(z):
    """``mean z^4 - 3``, of variance 96."""
    return (np.mean(np.power(z, 4, dtype=np.float64)) - 3) * np.sqrt(z.size / 96)


CHECKS = [chi_square_score, mean_score, kolmogorov_smirnov_score, tail_score, skewness_score, kurtosis_score]


@pytest.fixture(scope="module")
def standardised():
    return {generator: draw(generator=generator) for generator in GENERATORS}


@pytest.fixture(scope="module")
def of_bfloat16_updates():
    noise, zeros = add_gaussian_noise(NOISE_STD, noise_key(1)), jnp.zeros(NUM_DRAWS, jnp.bfloat16)
    return np.asarray(noise.update(zeros, noise.init(zeros))[0])


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("check", CHECKS)
def test_noise_is_gaussian_of_the_right_std(check, generator, standardised):
    assert abs(check(standardised[generator])) < THRESHOLD


@pytest.mark.parametrize("check", CHECKS)
def test_noise_of_bfloat16_updates_is_gaussian_in_float32(check, of_bfloat16_updates):
    assert of_bfloat16_updates.dtype == np.float32
    assert abs(check(of_bfloat16_updates / NOISE_STD)) < THRESHOLD
    rounded = np.asarray(jnp.asarray(of_bfloat16_updates, jnp.bfloat16), np.float32)
    assert len(np.unique(of_bfloat16_updates)) > 0.5 * NUM_DRAWS > 50 * len(np.unique(rounded))


def wrong_std(z):
    return draw(noise_std=1.01 * NOISE_STD)


def shifted(z):
    return z + 0.01


def laplace(z):
    return np.random.default_rng(0).laplace(scale=np.sqrt(0.5), size=z.size)


def without_tails(z):
    return np.clip(z, -4, 4)


def skewed(z):
    return z + 0.01 * (z**2 - 1)


def sum_of_uniforms(z):
    return np.random.default_rng(0).random((12, z.size)).sum(0) - 6


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (wrong_std, chi_square_score),
        (shifted, mean_score),
        (laplace, kolmogorov_smirnov_score),
        (without_tails, tail_score),
        (skewed, skewness_score),
        (sum_of_uniforms, kurtosis_score),
    ],
)
def test_the_checks_reject_wrong_noise(wrong, check, standardised):
    assert abs(check(wrong(standardised["threefry2x32"]))) > 1.4 * THRESHOLD


@pytest.mark.parametrize("generator", GENERATORS)
def test_no_two_steps_leaves_or_keys_share_noise(generator):
    """All pairs of 24 vectors are uncorrelated: 3 keys, 4 steps, 2 leaves of one shape."""
    length = 20_000
    vectors = []
    for key in (0, 1, 2**32):  # the third is the first to a seed of 32 bits
        noise, zeros = (
            add_gaussian_noise(1.0, noise_key(key, generator)),
            {"a": jnp.zeros(length), "b": jnp.zeros((200, 100))},
        )
        state = noise.init(zeros)
        for _ in range(4):
            updates, state = jax.jit(noise.update)(zeros, state)
            vectors += [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(updates)]
    scores = (np.stack(vectors) @ np.stack(vectors).T / np.sqrt(length))[np.triu_indices(len(vectors), 1)]
    assert len(scores) == 24 * 23 // 2
    assert np.abs(scores).max() < THRESHOLD  # the same noise twice scores 141
    assert abs(chi_square_score(scores)) < THRESHOLD


@pytest.mark.parametrize("generator", GENERATORS)
def test_entries_of_one_leaf_are_independent(generator):
    z = draw(generator=generator, shape=(1000, 1000)).reshape(1000, 1000)
    for shifted_by in ((0, 1), (1, 0), (1, 1), (8, 0), (125, 0), (500, 0), (0, 500)):  # 8 share a block, of 125
        correlation = np.mean(z * np.roll(z, shifted_by, (0, 1))) * np.sqrt(z.size)
        assert abs(correlation) < THRESHOLD
    # As a whole: the largest singular value of 1000 x 1000 is 2 sqrt(1000) to within a few n^(-1/6).
    assert abs(np.linalg.norm(z, 2) - 2 * np.sqrt(1000)) < 1.0


@pytest.mark.parametrize("generator", GENERATORS)
def test_noise_is_a_function_of_key_step_and_leaf_alone(generator):
    """The same for other values of the updates, other leaves after it, and compiled or not."""
    noise = add_gaussian_noise(NOISE_STD, noise_key(5, generator))
    zeros = {"a": jnp.zeros((30, 7)), "b": jnp.zeros(11)}
    state = noise.init(zeros)
    first, after = noise.update(zeros, state)
    again, _ = jax.jit(noise.update)({**zeros, "c": jnp.ones(3)}, state)
    # Compiled, a product and a sum may round once instead of twice. Where the words of ChaCha20 are put in order, XLA
    # also vectorises the map to normal numbers otherwise, which rounds by 4 units in the last place (test_noise_tails).
    rounding = {"threefry2x32": 2e-7, "chacha20": 2e-7 + 4 * 2.0**-23}[generator]
    for name in zeros:
        np.testing.assert_allclose(first[name], again[name], rtol=rounding)
    moved, _ = noise.update(jax.tree.map(lambda x: x + 1.0, zeros), state)
    np.testing.assert_allclose(moved["a"] - 1.0, first["a"], rtol=0, atol=1.2e-7)
    # From the data of a checkpoint: a number and the words of the key.
    resumed = noise.update(zeros, after)[0], noise.update(zeros, jax.tree.map(jnp.asarray, jax.device_get(after)))[0]
    jax.tree.map(np.testing.assert_array_equal, *resumed)
