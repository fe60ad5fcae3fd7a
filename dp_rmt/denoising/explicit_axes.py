"""Arrays whose sharding is part of their type, as `jax.make_mesh` makes them by default (`AxisType.Explicit`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dp_rmt.types import Params


def with_auto_axes(function: Callable[..., tuple[Params, Any]], tree: Params, *arguments: Any) -> tuple[Params, Any]:
    """Calls ``function(tree, *arguments)`` so that XLA divides the work, whatever kind of mesh the leaves are on.

    To see the matrices of a model as few batches, leaves of different shardings are reshaped and stacked. An explicit
    axis has no rule for that.

    Args:
      function: returns a tree of the same shapes, and anything else.
      tree: the tree to work on; its leaves come out divided as they go in.
      *arguments: further arguments, which are passed on.

    Returns:
      What the function returns. Where the axes are explicit, the second part is whole on every device.
    """
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]
    meshes = [getattr(leaf.sharding, "mesh", None) for leaf in types]
    explicit = [mesh for mesh in meshes if mesh is not None and AxisType.Explicit in mesh.axis_types]
    if not explicit:
        return function(tree, *arguments)
    shardings = [NamedSharding(explicit[0], leaf.sharding.spec) for leaf in types]
    whole = NamedSharding(explicit[0], PartitionSpec())
    out = jax.tree.unflatten(jax.tree.structure(tree), shardings), whole
    result: tuple[Any, Any] = jax.sharding.auto_axes(function, out_sharding=out)(tree, *arguments)
    return result
