"""A small private run, as a program for a process of its own: ``python three_steps.py KIND... OUT.npz``.

The kinds are ways to divide the examples over all devices there are; each writes its parameters after every step, and
its metrics, under ``KIND/step/path``.
"""

from __future__ import annotations

import dataclasses
import functools
import sys

import flax.linen as nn
import jax
import numpy as np
import optax

from dp_rmt.clipping.coordinates import AxisMap, Coordinates, LeafAxes
from dp_rmt.clipping.execution import Execution
from dp_rmt.geometry import coordinates_of, whiten_inputs
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import noise_key
from dp_rmt.training.advice import measure_steps
from dp_rmt.training.losses import label_losses
from dp_rmt.training.partitioning import data_mesh, jit_train_step, place
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import make_train_step
from dp_rmt.trees import leaves_by_path

BATCH, FEATURES, NUM_STEPS = 16, 12, 3
AXIS = "data"


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="out")(nn.gelu(nn.Dense(16, name="in")(x)))


def sample(step):
    """Two groups, as from a Poisson sample: each with padding, one with a NaN among the examples."""
    groups = []
    for number in range(2):
        rng = np.random.default_rng((step, number))
        x = (rng.standard_normal((BATCH, FEATURES)) * rng.choice([0.1, 10.0], (BATCH, 1))).astype(np.float32)
        x[3] = np.nan if number else x[3]
        batch = {"x": x, "label": rng.integers(0, 2, BATCH).astype(np.int32)}
        groups.append((batch, rng.random(BATCH) < 0.4))
    return groups


def empty_sample(step):
    return [(batch, np.ones(BATCH, bool)) for batch, _ in sample(step)]


def coordinates():
    """Of both layers, biases with their matrices, one with its outputs."""
    rng = np.random.default_rng(1)

    def axis_map(side):
        basis = np.linalg.qr(rng.standard_normal((side, side)))[0][:, :4]
        return AxisMap(np.float32(1.5), np.asarray(basis * 0.9, np.float32))

    maps = {"in": axis_map(FEATURES + 1), "hidden": axis_map(16), "out": axis_map(17)}
    leaves = (
        LeafAxes("in/kernel", (-2,), (-1,), "in", "hidden", "in/bias"),
        LeafAxes("out/kernel", (-2,), (-1,), "out", None, "out/bias"),
    )
    return Coordinates(maps, leaves)


def build(*, clipping_method="vmap", microbatch_size=8, axis_name=None, only_noise=False, whitened=False):
    mechanism = DPSGD(
        num_examples=200,
        expected_batch_size=20.0,
        num_steps=NUM_STEPS,
        noise_multiplier=0.2,
        l2_clip_norm=0.5,
        max_batch_size=BATCH,
    )
    module = Network()
    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": rng.standard_normal(shape, np.float32) / 4, "bias": np.zeros(shape[1], np.float32)}
        for name, shape in (("in", (FEATURES, 16)), ("out", (16, 2)))
    }
    noise = mechanism.noise(noise_key(4))
    transforms = (
        Transforms(noise, optax.identity(), optax.sgd(1.0))
        if only_noise
        else Transforms(noise, mechanism.denoiser(), measure_steps(optax.adamw(0.05, eps=1e-3), mechanism.noise_std))
    )

    if whitened:
        stages = optax.chain(transforms.optimizer, whiten_inputs(coordinates()))
        transforms = dataclasses.replace(transforms, optimizer=stages, coordinates=coordinates_of)

    def losses(params, batch):
        return label_losses(module.apply({"params": params}, batch["x"]), batch["label"])

    step = make_train_step(
        mechanism, losses, transforms, execution=Execution(clipping_method, microbatch_size), axis_name=axis_name
    )
    return jax.tree.map(np.asarray, TrainState.create(transforms, params, {})), step


def jit(samples, **options):
    mesh = data_mesh()
    state, step = build(**options)
    return repeat(jit_train_step(step, mesh), place(state, mesh), samples)


def pmap(samples, **options):
    """The leading axis is cut into one piece per device; every device returns the whole new state."""
    count = jax.local_device_count()
    state, step = build(axis_name=AXIS, **{"microbatch_size": 1, **options})
    compiled = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0))

    def one_step(state, groups):
        groups = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), groups)
        state, metrics = jax.tree.map(np.asarray, compiled(state, groups))
        for leaf in jax.tree.leaves((state, metrics)):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        return jax.tree.map(lambda a: a[0], (state, metrics))

    return repeat(one_step, state, samples)


def shard_map(samples, **options):
    """With its default settings, which sum gradients of replicated parameters over the devices unasked."""
    mesh, spec = data_mesh(), jax.sharding.PartitionSpec
    state, step = build(axis_name=AXIS, **options)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(spec(), spec(AXIS)), out_specs=spec())
    return repeat(jax.jit(mapped), place(state, mesh), samples)


KINDS = {
    "jit": functools.partial(jit, sample),
    "jit_ghost": functools.partial(jit, sample, clipping_method="ghost"),
    "jit_whitened": functools.partial(jit, sample, clipping_method="bookkeeping", whitened=True),
    "jit_noise": functools.partial(jit, empty_sample, only_noise=True),
    "pmap": functools.partial(pmap, sample),
    "pmap_noise": functools.partial(pmap, empty_sample, only_noise=True),
    "shard_map": functools.partial(shard_map, sample, microbatch_size=None),
}


def repeat(step, state, samples):
    """Blocks after every step: un-blocked loops over several virtual devices can hang (jaxlib 0.10.2)."""
    results = {}
    for number in range(NUM_STEPS):
        state, metrics = jax.block_until_ready(step(state, samples(number)))
        for path, leaf in leaves_by_path({"params": state.params, "metrics": metrics}):
            results[f"{number}/{path}"] = np.asarray(leaf)
    return results


if __name__ == "__main__":
    *kinds, out = sys.argv[1:]
    arrays = {f"{kind}/{path}": leaf for kind in kinds for path, leaf in KINDS[kind]().items()}
    np.savez(out, num_devices=jax.device_count(), **arrays)
