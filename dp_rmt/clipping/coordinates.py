"""Coordinates in which per-example gradients are measured, clipped and noised: ``W = W_0 + F V H``, with V trained.

The gradient with respect to V is ``F^T G H^T``. Clipping it instead of G costs no privacy, as F and H are public
constants: a clipped gradient has norm C at most in whatever coordinates its norm is taken
(scale-then-privatize, arXiv 2507.01129; DP-KFC, arXiv 2605.13418). Parameters stay W: an update u of V moves them by
``F u H``. All maps here are symmetric, so that one function takes gradients to the coordinates and updates back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dp_rmt.trees import leaves_by_path
from dp_rmt.types import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AxisMap:
    """A symmetric map of one side of a matrix, ``F = scale (I - basis basis^T)``: a few directions are damped.

    The directions are the columns of `basis`, which are orthogonal and have norms of at most 1. With as many of them as
    the side is long this is any positive semi-definite matrix whose largest eigenvalue is `scale`; with k of them a
    product takes ``2 k n`` operations and the map ``k n`` numbers.

    Attributes:
      scale: of what is not damped, () for one matrix or (layers,) for a stack.
      basis: (n, k) or (layers, n, k).
    """

    scale: jax.Array
    basis: jax.Array

    def squared_basis(self) -> jax.Array:
        """U' of ``F^2 = scale^2 (I - U' U'^T)``: the columns of U times ``sqrt(2 - |U_i|^2)``."""
        return self.basis * jnp.sqrt(2.0 - jnp.sum(jnp.square(self.basis), axis=-2, keepdims=True))

    def along_last_axis(self, x: jax.Array) -> jax.Array:
        """``x F`` of (..., n), or of (layers, ..., n) if this is the map of a stack; in the dtype of x."""
        stack = self.basis.ndim - 2
        flat = x.reshape(*x.shape[:stack], -1, x.shape[-1])
        basis = self.basis.astype(flat.dtype)
        precision = jax.lax.Precision.HIGHEST
        components = jnp.matmul(flat, basis, precision=precision)
        damped = flat - jnp.matmul(components, jnp.swapaxes(basis, -1, -2), precision=precision)
        scale = self.scale.reshape(*self.scale.shape, 1, 1).astype(flat.dtype)
        return (scale * damped).reshape(x.shape)


class LeafMaps(NamedTuple):
    """The maps of one leaf; None leaves a side as it is."""

    rows: AxisMap | None
    cols: AxisMap | None


@dataclasses.dataclass(frozen=True)
class LeafAxes:
    """Which axes of a leaf are mapped, and by which of the maps.

    Attributes:
      path: of the leaf.
      row_axes: the leaf's axes that are a layer's inputs, as negative numbers, in order.
      col_axes: likewise its outputs.
      rows: name of the map of the inputs; None leaves them as they are.
      cols: name of the map of the outputs; None leaves them as they are.
    """

    path: str
    row_axes: tuple[int, ...]
    col_axes: tuple[int, ...]
    rows: str | None = None
    cols: str | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coordinates:
    """Maps of the leaves of a tree of parameters; leaves that are not named keep their own coordinates.

    Attributes:
      maps: by name. Layers that read the same input share one.
      leaves: what is mapped by which of them.
    """

    maps: Mapping[str, AxisMap]
    leaves: tuple[LeafAxes, ...] = dataclasses.field(metadata={"static": True})

    def by_path(self) -> dict[str, LeafMaps]:
        """The maps of each leaf that has any."""
        return {
            leaf.path: LeafMaps(*(None if name is None else self.maps[name] for name in (leaf.rows, leaf.cols)))
            for leaf in self.leaves
        }

    def __call__(self, tree: Params) -> Params:
        """Takes gradients to the coordinates, and updates from them to the parameters.

        Args:
          tree: gradients or updates, of all parameters.

        Returns:
          A tree of the same shapes.

        Raises:
          ValueError: a leaf of the coordinates is missing in the tree.
        """
        axes, maps, found = {leaf.path: leaf for leaf in self.leaves}, self.by_path(), leaves_by_path(tree)
        if missing := maps.keys() - dict(found).keys():
            raise ValueError(
                f"the coordinates are those of {', '.join(sorted(missing))}, which the parameters do not have: make "
                "them from the parameters that are trained"
            )

        def mapped(path: str, leaf: jax.Array) -> jax.Array:
            for side, axis_map in zip((axes[path].row_axes, axes[path].col_axes), maps[path], strict=True):
                leaf = leaf if axis_map is None else map_axes(leaf, side, axis_map)
            return leaf

        leaves = [mapped(path, leaf) if path in maps else leaf for path, leaf in found]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def map_axes(x: jax.Array, axes: Sequence[int], axis_map: AxisMap) -> jax.Array:
    """Maps some axes of an array, taken together as one side; axes of a stack must come first.

    >>> halved = AxisMap(jnp.asarray(0.5), jnp.zeros((6, 1)))
    >>> map_axes(jnp.ones((2, 4, 3)), (0, 2), halved)[0, 0].tolist()
    [0.5, 0.5, 0.5]
    """
    last = range(-len(axes), 0)
    moved = jnp.moveaxis(x, axes, last)
    side = math.prod(moved.shape[axis] for axis in last)
    mapped = axis_map.along_last_axis(moved.reshape(*moved.shape[: -len(axes)], side))
    return jnp.moveaxis(mapped.reshape(moved.shape), last, axes)


# ---- How maps come to where a layer is computed --------------------------------------------------------------------

# The map of a kernel travels beside it, in the dict of its layer's parameters. Whatever the losses do with a stack of
# parameters (a scan over layers, a remat, a jit), they then do with the maps, too, and Flax hands each layer its own.
_RIDER = "{}_coordinates"


def with_riders(params: Params, riders: Mapping[str, Any]) -> Params:
    """The parameters with something beside some of their leaves.

    Args:
      params: nested dicts.
      riders: pytrees of arrays by path of the leaf; arrays of a stacked leaf are stacked alike.

    Returns:
      Nested dicts; `rider_of` finds what was put in.

    Raises:
      ValueError: the parameters are no nested dicts, or lack a leaf.
    """
    riding: Any = dict(params) if isinstance(params, Mapping) else params
    for path, rider in riders.items():
        *parents, name = path.split("/")
        level: Any = riding
        for parent in parents:
            inner: Any = level.get(parent) if isinstance(level, dict) else None
            inner = dict(inner) if isinstance(inner, Mapping) else None  # only what is on the way is copied
            if inner is not None:
                level[parent] = inner
            level = inner
        if not isinstance(level, dict) or name not in level:
            raise ValueError(f"coordinates of {path}: the parameters are no nested dicts in which there is such a leaf")
        level[_RIDER.format(name)] = rider
    return riding


def rider_of(params: Mapping[str, Any], name: str) -> Any:
    """What rides beside the parameter of this name in its layer; None if nothing does."""
    return params.get(_RIDER.format(name))
