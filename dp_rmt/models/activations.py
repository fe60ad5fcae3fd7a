"""Where activations lie when parameters are divided among devices."""

from __future__ import annotations

import math

import jax
from jax.sharding import PartitionSpec

EXAMPLE_AXES = ("data", "fsdp")
"""Axes of a mesh that divide the examples (`dp_rmt.training.partitioning`)."""


def divided_by_example(hidden: jax.Array) -> jax.Array:
    """The residual stream, each device with its own examples and all of their features; the values are what they were.

    Without it, XLA may follow the parameters of a mesh with ``fsdp`` and divide the features instead, at the price of
    communicating activations where parameters would do. Does nothing unless the step is compiled for a mesh
    (`jax.sharding.use_abstract_mesh`) whose example axes divide the first axis, and inside `jax.shard_map`, where each
    device has its own examples anyway.

    Args:
        hidden: (B, ...).

    Returns:
        The same array.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in EXAMPLE_AXES if name in mesh.axis_names)
    if set(axes) & set(mesh.manual_axes):
        return hidden
    if not axes or mesh.size == 1 or len(hidden) % math.prod(mesh.shape[name] for name in axes):
        return hidden
    return jax.lax.with_sharding_constraint(hidden, PartitionSpec(axes))
