"""Gaussian noise as an optax transformation: state, dtypes, schedules, errors. Its law is in laws/test_noise_law.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.batch_selection import fresh_seed
from dp_rmt.noise_addition import add_gaussian_noise, noise_key


@pytest.fixture
def updates():
    return {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": (jnp.ones(3, jnp.bfloat16), jnp.zeros([]))}


def test_keeps_structure_and_shapes_and_counts_steps(updates):
    noise = add_gaussian_noise(0.5, jax.random.key(0))
    state = noise.init(updates)
    for step in range(3):
        assert int(state.step) == step
        noisy, state = noise.update(updates, state)
        assert jax.tree.structure(noisy) == jax.tree.structure(updates)
        assert jax.tree.map(jnp.shape, noisy) == jax.tree.map(jnp.shape, updates)
        assert {leaf.dtype for leaf in jax.tree.leaves(noisy)} == {jnp.dtype("float32")}


def test_float64_updates_get_float64_noise():
    with jax.enable_x64(True):
        noise = add_gaussian_noise(1.0, jax.random.key(0))
        noisy, _ = noise.update(jnp.zeros(100, jnp.float64), noise.init(None))
        assert noisy.dtype == jnp.float64
        assert (np.asarray(noisy, np.float32) != noisy).all()


def test_no_noise_leaves_the_updates_as_they_are(updates):
    noise = add_gaussian_noise(0.0, jax.random.key(0))
    noisy, _ = noise.update(updates, noise.init(updates))
    jax.tree.map(np.testing.assert_array_equal, noisy, updates)


def test_noise_std_may_follow_a_schedule():
    noise, unit = (add_gaussian_noise(std, jax.random.key(3)) for std in (lambda step: 1.0 + step, 1.0))
    state, unit_state = noise.init(None), unit.init(None)
    for step in range(3):
        (noisy, state), (ones, unit_state) = noise.update(jnp.zeros(50), state), unit.update(jnp.zeros(50), unit_state)
        np.testing.assert_allclose(noisy, (1 + step) * np.asarray(ones), rtol=1e-6)


def test_the_state_holds_all_that_the_noise_depends_on():
    """Restored into a transformation made with another key, it goes on with its own; any implementation of keys."""
    for implementation in ("threefry2x32", "rbg"):
        first, second = (add_gaussian_noise(1.0, jax.random.key(seed, impl=implementation)) for seed in (1, 2))
        state = first.init(None)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("int32"), jnp.dtype("uint32")}
        np.testing.assert_array_equal(first.update(jnp.zeros(5), state)[0], second.update(jnp.zeros(5), state)[0])
        assert (first.update(jnp.zeros(5), state)[0] != second.update(jnp.zeros(5), second.init(None))[0]).all()


def test_composes_in_a_chain(updates):
    updates = jax.tree.map(lambda x: x.astype(jnp.float32), updates)
    noise = add_gaussian_noise(0.1, jax.random.key(0))
    chain = optax.chain(noise, optax.sgd(2.0))
    stepped, _ = chain.update(updates, chain.init(updates))
    noisy, _ = noise.update(updates, noise.init(updates))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -2 * np.asarray(b), rtol=1e-6), stepped, noisy)


@pytest.mark.parametrize("noise_std", [-1.0, float("nan"), float("inf")])
def test_refuses_a_wrong_noise_std(noise_std):
    with pytest.raises(ValueError, match="noise_std must be non-negative and finite"):
        add_gaussian_noise(noise_std, jax.random.key(0))


def test_refuses_raw_key_data():
    with pytest.raises(ValueError, match="typed key"):
        add_gaussian_noise(1.0, jax.random.PRNGKey(0))


def test_noise_key_tells_seeds_apart_and_takes_long_ones():
    data = {tuple(jax.random.key_data(noise_key(seed)).tolist()) for seed in (0, 1, 2**31, 2**32, 2**64, fresh_seed())}
    assert len(data) == 6
    assert noise_key(2**127) == noise_key(2**127)
    with pytest.raises(ValueError, match="non-negative"):
        noise_key(-1)


@pytest.mark.parametrize("dtype", ["complex64", "int32"])
def test_refuses_updates_that_are_not_real_numbers(dtype):
    """Noise of a complex number would have a standard deviation of .707 in each of its two coordinates."""
    noise, updates = add_gaussian_noise(1.0, jax.random.key(0)), {"w": jnp.ones(3, dtype)}
    with pytest.raises(ValueError, match=rf"params\['w'\] is {dtype}"):
        noise.init(updates)
    with pytest.raises(ValueError, match=rf"updates\['w'\] is {dtype}, but clipping and noise are for real"):
        noise.update(updates, noise.init(None))
