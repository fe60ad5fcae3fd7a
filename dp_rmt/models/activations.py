"""Decides where activations lie when parameters are divided among devices."""

from __future__ import annotations

import math

import jax
from jax.sharding import PartitionSpec

EXAMPLE_AXES = ("data", "fsdp")
"""Axes of a mesh that divide the examples (`dp_rmt.training.partitioning`)."""


def divided_by_example(hidden: jax.Array) -> jax.Array:
    """Places the residual stream so that each device has its own examples with all features; values do not change.

    Without it, XLA may follow the parameters of a mesh with ``fsdp`` and divide the features instead. It would then
    communicate activations where parameters would do. The function does nothing unless the step is compiled for a mesh
    (`jax.sharding.use_abstract_mesh`) whose example axes divide the first axis. It does nothing inside `jax.shard_map`,
    either, where each device has its own examples anyway.

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
