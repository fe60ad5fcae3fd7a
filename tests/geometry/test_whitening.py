"""Whitened coordinates: what they do to inputs, and that training in them is training of V."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.geometry import coordinates_of, layer_moments, whiten_inputs, whitened_coordinates
from dp_rmt.geometry.whitening import whitening_map
from dp_rmt.mechanism import DPSGD
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import make_train_step


def second_moment(n=12, seed=0):
    """Of inputs with a large mean and a falling spectrum."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((200, n)) / np.arange(1, n + 1) + 2 * rng.standard_normal(n)
    return rows.T @ rows, rows


def dense(axis_map):
    return np.asarray(axis_map.along_last_axis(jnp.eye(axis_map.basis.shape[-2])), np.float64)


def test_without_a_ridge_mapped_inputs_are_white():
    moment, rows = second_moment()
    F = dense(whitening_map(moment, ridge=1e-6, power=-0.5))
    mapped = F @ (rows.T @ rows) @ F
    np.testing.assert_allclose(mapped / mapped[0, 0], np.eye(12), atol=2e-3)


@pytest.mark.parametrize("power", [-0.25, -0.5, -1.0])
def test_the_map_is_the_power_of_the_moment_and_keeps_the_norm(power):
    moment, _ = second_moment()
    F = dense(whitening_map(moment, ridge=0.1, power=power))
    values, vectors = np.linalg.eigh(moment)
    wanted = (vectors * (values / values.mean() + 0.1) ** power) @ vectors.T
    np.testing.assert_allclose(F, wanted * np.sqrt(12 / np.sum(wanted**2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.sum(F**2), 12, rtol=1e-5)


def test_a_rank_keeps_the_first_directions_and_evens_out_the_others():
    moment, _ = second_moment()
    values, vectors = np.linalg.eigh(moment)
    factors = ((values / values.mean() + 0.1) ** -0.5)[::-1]
    factors[3:] = np.sqrt(np.mean(factors[3:] ** 2))
    factors *= np.sqrt(12 / np.sum(factors**2))
    wanted = (vectors[:, ::-1] * factors) @ vectors[:, ::-1].T
    axis_map = whitening_map(moment, ridge=0.1, power=-0.5, rank=3)
    assert axis_map.basis.shape == (12, 3)
    np.testing.assert_allclose(dense(axis_map), wanted, rtol=1e-4, atol=1e-5)


def test_power_zero_and_a_layer_that_has_seen_nothing_give_the_identity():
    moment, _ = second_moment()
    np.testing.assert_allclose(dense(whitening_map(moment, ridge=0.1, power=0.0)), np.eye(12), atol=1e-6)
    np.testing.assert_allclose(dense(whitening_map(0 * moment, ridge=0.1, power=-0.5)), np.eye(12), atol=1e-6)


def test_numbers_out_of_range_are_refused():
    for options in ({"ridge": 0.0}, {"power": 0.5}, {"power": -3}, {"rank": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            whitened_coordinates({}, **options)


MODEL = nn.Dense(3, name="layer")


def losses(params, batch):
    return jnp.sum((MODEL.apply({"params": params}, batch["x"]) - batch["y"]) ** 2, -1)


@pytest.fixture(scope="module")
def regression():
    _, rows = second_moment()
    x = jnp.asarray(rows[:40], jnp.float32)
    params = MODEL.init(jax.random.key(0), x)["params"]
    y = x[:, :3] * 2 + 1
    coordinates = whitened_coordinates(layer_moments(losses, params, [{"x": x, "y": y}], outputs=True))
    return params, {"x": x, "y": y}, coordinates


def trained_in_coordinates(params, batch, coordinates, optimizer, steps):
    dpsgd = DPSGD(
        num_examples=40, expected_batch_size=40, num_steps=steps, noise_multiplier=0.0, l2_clip_norm=float("inf")
    )
    transforms = Transforms(
        dpsgd.noise(jax.random.key(0)),
        optax.identity(),
        optax.chain(optimizer, whiten_inputs(coordinates)),
        coordinates=coordinates_of,
    )
    step = jax.jit(make_train_step(dpsgd, losses, transforms))
    state = TrainState.create(transforms, params, {})
    for _ in range(steps):
        state, _ = step(state, [(batch, jnp.zeros(40, bool))])
    return state


@pytest.mark.parametrize("optimizer", [optax.sgd(3e-3, momentum=0.9), optax.adam(1e-2)])
def test_without_noise_and_clipping_it_is_the_training_of_v(regression, optimizer):
    """W = W_0 + F V H with V trained by any optimizer, step by step."""
    params, batch, coordinates = regression
    state = trained_in_coordinates(params, batch, coordinates, optimizer, steps=5)
    v = jax.tree.map(jnp.zeros_like, params)
    opt = optimizer.init(v)
    mean = lambda v: jnp.mean(losses(jax.tree.map(jnp.add, params, coordinates(v)), batch))  # noqa: E731
    for _ in range(5):
        updates, opt = optimizer.update(jax.grad(mean)(v), opt)
        v = optax.apply_updates(v, updates)
    wanted = jax.tree.map(jnp.add, params, coordinates(v))
    for got, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    moved = float(jnp.max(jnp.abs(state.params["kernel"] - params["kernel"])))
    assert moved > 1e-2  # it has trained


def test_the_state_holds_the_maps_and_is_found_anywhere_in_a_chain(regression):
    params, _, coordinates = regression
    optimizer = optax.chain(optax.adam(1e-2), optax.chain(whiten_inputs(coordinates), optax.identity()))
    found = coordinates_of(optimizer.init(params))
    assert found.leaves == coordinates.leaves
    with pytest.raises(ValueError, match="0 stages of whiten_inputs"):
        coordinates_of(optax.adam(1e-2).init(params))


def test_the_maps_of_the_state_count_and_not_those_of_the_maker(regression):
    """A resumed run goes on with the maps of its checkpoint."""
    params, _, coordinates = regression
    transform = whiten_inputs(coordinates)
    state = transform.init(params)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, state)
    ones = jax.tree.map(jnp.ones_like, params)
    got, _ = transform.update(ones, doubled)
    wanted = doubled.coordinates(ones)
    np.testing.assert_array_equal(got["kernel"], wanted["kernel"])
    assert not np.allclose(got["kernel"], coordinates(ones)["kernel"])
