"""Gaussian noise as an optax transformation: state, dtypes, schedules, errors. Its law is in laws/test_noise_law.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.batch_selection import fresh_seed
from dp_rmt.noise_addition import add_gaussian_noise, noise_key, standard_normal


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
    """Restored into a transformation made with another key, it goes on with its own."""
    first, second = (add_gaussian_noise(1.0, jax.random.key(seed)) for seed in (1, 2))
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


@pytest.mark.parametrize("static_args", ["key", ()])
@pytest.mark.parametrize("noise_std", [0.25, lambda step: 0.25])
def test_noise_std_may_be_an_injected_hyperparameter(updates, noise_std, static_args):
    injected = optax.inject_hyperparams(add_gaussian_noise, static_args=static_args)(
        noise_std=noise_std, key=noise_key(3)
    )
    noise = add_gaussian_noise(0.25, noise_key(3))
    expected, _ = jax.jit(noise.update)(updates, noise.init(updates))
    noisy, state = jax.jit(injected.update)(updates, injected.init(updates))
    jax.tree.map(np.testing.assert_array_equal, noisy, expected)
    state.hyperparams["noise_std"] = jnp.asarray(0.0)
    if not callable(noise_std):  # what is set by hand is what is used
        jax.tree.map(np.testing.assert_array_equal, injected.update(updates, state)[0], updates)


def test_noise_std_may_be_traced():
    def noisy(noise_std):
        noise = add_gaussian_noise(noise_std, noise_key(3))
        return noise.update(jnp.zeros(5), noise.init(None))[0]

    one, two = jax.vmap(noisy)(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(2 * one, two)
    for wrong in (jnp.ones(2), jnp.ones((1, 1))):
        with pytest.raises(ValueError, match="one number or a schedule"):
            jax.jit(noisy)(wrong)


@pytest.mark.parametrize("noise_std", [1, np.float64(1), np.ones(()), jnp.ones(()), jnp.ones((), jnp.bfloat16)])
def test_noise_std_may_be_any_real_scalar(noise_std):
    noise, one = add_gaussian_noise(noise_std, noise_key(3)), add_gaussian_noise(1.0, noise_key(3))
    noisy, expected = (n.update(jnp.zeros(5), n.init(None))[0] for n in (noise, one))
    assert noisy.dtype == jnp.float32
    np.testing.assert_array_equal(noisy, expected)


def test_a_donated_state_leaves_the_key_alone(updates):
    """Donation deletes the state's buffers; the caller's key and the next run's state have their own."""
    key = noise_key(3)
    noise = add_gaussian_noise(1.0, key)
    state, other = noise.init(updates), noise.init(updates)
    buffers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, other, jax.random.key_data(key)))}
    assert len(buffers) == 5
    for _ in range(2):
        _, state = jax.jit(noise.update, donate_argnums=1)(updates, state)
    assert key == noise_key(3)
    noise.update(updates, noise.init(updates))
    noise.update(updates, other)


def test_params_are_mapped_over_its_state_without_touching_the_key(updates):
    noise = add_gaussian_noise(1.0, noise_key(3))
    mapped = optax.tree_map_params(noise, lambda leaf: leaf + 1, noise.init(updates))
    jax.tree.map(np.testing.assert_array_equal, mapped, noise.init(updates))


def test_narrow_updates_get_float32_noise():
    noise = add_gaussian_noise(1.0, noise_key(3))
    expected, _ = noise.update(jnp.zeros(5), noise.init(None))
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn):
        noisy, _ = noise.update(jnp.zeros(5, dtype), noise.init(None))
        assert noisy.dtype == jnp.float32
        np.testing.assert_array_equal(noisy, expected)


def test_trees_and_leaves_without_entries_and_numbers_as_leaves():
    noise = add_gaussian_noise(1.0, noise_key(3))
    for tree in ({}, (), None, {"a": None}):
        noisy, state = noise.update(tree, noise.init(tree))
        assert noisy == tree
        assert int(state.step) == 1
    noisy, _ = noise.update({"a": jnp.zeros((0, 3)), "b": 1.5, "c": np.float32(2)}, noise.init(None))
    assert (noisy["a"].shape, noisy["b"].shape, noisy["c"].dtype) == ((0, 3), (), jnp.float32)


@pytest.mark.parametrize("leaf", [jnp.ones(2, jnp.int32), 1, True, jnp.ones(2, jnp.complex64)])
def test_refuses_by_name_what_is_not_real_and_floating(leaf):
    """Rounded to integers noise protects nothing; complex noise of this variance would have half of it in each part."""
    noise = add_gaussian_noise(1.0, noise_key(3))
    with pytest.raises(ValueError, match=r"leaf 'layer/count' has dtype (int|bool|complex)"):
        noise.update({"layer": {"count": leaf}, "kernel": jnp.ones(2)}, noise.init(None))


@pytest.mark.parametrize("noise_std", [-1.0, float("nan"), float("inf"), np.ones(2), "1", None, 1j, jnp.array(-1.0)])
def test_refuses_a_wrong_noise_std(noise_std):
    with pytest.raises(ValueError, match="noise_std must be non-negative and finite"):
        add_gaussian_noise(noise_std, jax.random.key(0))


@pytest.mark.parametrize(
    ("key", "match"),
    [
        (lambda: jax.random.PRNGKey(0), "typed key"),
        (lambda: 0, "typed key"),
        (lambda: np.zeros(2, np.uint32), "typed key"),
        (lambda: jax.random.split(noise_key(0)), "one key"),
        (lambda: jax.random.key(0, impl="rbg"), "threefry2x32 key or a chacha20 key"),
    ],
)
def test_refuses_other_keys(key, match):
    with pytest.raises(ValueError, match=match):
        add_gaussian_noise(1.0, key())
    with pytest.raises(ValueError, match=match):
        standard_normal(key(), (2,))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32, jnp.complex64])
def test_draws_have_no_fewer_digits_than_float32(dtype):
    with pytest.raises(ValueError, match="float32 or float64"):
        standard_normal(noise_key(0), (2,), dtype)


def test_noise_key_tells_seeds_apart_and_takes_long_ones():
    data = {tuple(jax.random.key_data(noise_key(seed)).tolist()) for seed in (0, 1, 2**31, 2**32, 2**64, fresh_seed())}
    assert len(data) == 6
    assert noise_key(2**127) == noise_key(2**127)
    for seed in (-1, 2**128):
        with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^128\)"):
            noise_key(seed)
    with pytest.raises(TypeError):
        noise_key(1.5)  # type: ignore[arg-type]
