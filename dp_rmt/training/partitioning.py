"""Data parallelism under `jax.jit`: the state is replicated, the examples of a batch are divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dp_rmt.training.train_step import TrainStep

DATA_AXIS = "data"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh with the axis ``data`` over the given devices, by default all."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The leading axis, the examples, is divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def jit_train_step(train_step: TrainStep, mesh: Mesh) -> TrainStep:
    """Compiles a step for a mesh; the state is donated.

    Args:
      train_step: from `make_train_step`, without an axis_name.
      mesh: from `data_mesh`; its size must divide every batch (and every microbatch, to be of use).

    Returns:
      The compiled step; it takes NumPy or JAX arrays, and its results are replicated.
    """
    return jax.jit(
        train_step,
        in_shardings=(replicated(mesh), by_example(mesh)),
        out_shardings=replicated(mesh),
        donate_argnums=0,
    )


def place(tree: Any, mesh: Mesh) -> Any:
    """Puts a copy of every array on every device of the mesh."""
    return jax.device_put(tree, replicated(mesh))
