"""Every method of configs/sst2_methods.py as the stages of a step: what stands where, and that it learns."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import sst2_methods
from dp_rmt import DPSGD
from dp_rmt.baselines.filters import KalmanState, LowPassState
from dp_rmt.denoising.first_moment import DenoisedAdamState
from dp_rmt.denoising.gradient import DenoiseState
from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.stages import build_transforms
from dp_rmt.training.partitioning import data_mesh
from dp_rmt.training.train_state import TrainState, Transforms

ARMS = arm_settings(Settings.from_config(sst2_methods.get_config()))
PARAMS = {"layers": {"query": {"kernel": np.zeros((3, 12, 16), np.float32)}}, "bias": np.zeros(16, np.float32)}
TARGET = jnp.outer(jnp.ones(12), jnp.linspace(-1, 1, 16)) * jnp.ones((3, 1, 1))
MECHANISM = DPSGD(num_examples=1000, expected_batch_size=100, num_steps=30, noise_multiplier=1.0, l2_clip_norm=1.0)
# What an arm keeps in its state, beside the optimizer's own.
STATES: dict[str, type] = {
    "paper": DenoiseState,
    "partial": DenoiseState,
    "tracy_widom": DenoiseState,
    "stein": DenoiseState,
    "hard_threshold": DenoiseState,
    "stream": DenoiseState,
    "stream_moment_adam": DenoisedAdamState,
    "moment": DenoisedAdamState,
    "moment_stein": DenoisedAdamState,
    "moment_adam": DenoisedAdamState,
    "low_pass": LowPassState,
    "kalman": KalmanState,
}


def make(arm: str, **changes: Any) -> Transforms:
    settings = ARMS[arm].changed({"train": {"learning_rate": 0.1, "warmup_steps": 0}, **changes})
    return build_transforms(settings, MECHANISM, 0, data_mesh(jax.devices()[:1]))


def has(state: TrainState, kind: type) -> bool:
    is_kind = lambda node: isinstance(node, kind)  # noqa: E731
    return any(map(is_kind, jax.tree.leaves((state.denoise, state.optimizer), is_leaf=is_kind)))


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_is_what_its_name_says_and_learns(arm: str) -> None:
    transforms = make(arm)
    state = TrainState.create(transforms, PARAMS, {})
    kinds = {DenoiseState, DenoisedAdamState, LowPassState, KalmanState}
    expected = {STATES[arm]} if arm in STATES else set()
    expected |= {DenoiseState} if DenoisedAdamState in expected else set()
    assert {kind for kind in kinds if has(state, kind)} == expected

    def loss(params: Any) -> jax.Array:
        kernel = params["layers"]["query"]["kernel"]
        return jnp.mean(jnp.square(kernel - TARGET)) + jnp.mean(jnp.square(params["bias"] - 1))

    @jax.jit
    def step(params, noise, denoise, optimizer):
        grads = jax.tree.map(lambda g: 5 * g, jax.grad(loss)(params))  # above the noise of 0.01
        noisy, noise = transforms.noise.update(grads, noise)
        denoised, denoise = transforms.denoise.update(noisy, denoise)
        updates, optimizer = transforms.optimizer.update(denoised, optimizer, params, noisy=noisy)
        return optax.apply_updates(params, updates), noise, denoise, optimizer

    first = loss(PARAMS)
    parts = (PARAMS, state.noise, state.denoise, state.optimizer)
    for _ in range(30):
        parts = step(*parts)
    params, _, _, optimizer = parts
    assert loss(transforms.published_params(TrainState(jnp.array(30), params, {}, None, None, optimizer))) < 0.3 * first


def test_what_is_published_of_the_kalman_filter_is_its_iterate() -> None:
    transforms = make("kalman", **{"train.schedule": "constant"})
    state = TrainState.create(transforms, PARAMS, {})
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, optimizer = transforms.optimizer.update(grads, state.optimizer, state.params, noisy=grads)
    moved = TrainState(state.step, optax.apply_updates(state.params, updates), {}, None, None, optimizer)
    np.testing.assert_allclose(transforms.published_params(moved)["bias"], -0.1, rtol=1e-5)  # the first step of Adam
    np.testing.assert_allclose(moved.params["bias"], -0.1 * (1 + 0.3 / 0.7), rtol=1e-5)  # gamma = 0.3 / 0.7 ahead


def test_without_noise_nothing_is_cleaned() -> None:
    config = ARMS["moment"]
    mechanism = DPSGD(num_examples=10, expected_batch_size=5, num_steps=2, noise_multiplier=0.0, l2_clip_norm=np.inf)
    transforms = build_transforms(config, mechanism, 0, data_mesh(jax.devices()[:1]))
    assert not has(TrainState.create(transforms, PARAMS, {}), DenoiseState)
