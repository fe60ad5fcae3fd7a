"""Coordinates in which per-example gradients are measured, clipped and noised: ``W = W_0 + F V H``, with V trained.

The gradient with respect to V is ``F^T G H^T``. Clipping it instead of G costs no privacy, as F and H are public
constants: a clipped gradient has norm C at most in whatever coordinates its norm is taken
(scale-then-privatize, arXiv 2507.01129; DP-KFC, arXiv 2605.13418). Parameters stay W: an update u of V moves them by
``F u H``. All maps here are symmetric, so that one function takes gradients to the coordinates and updates back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

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

    def squared_basis(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """U' of ``F^2 = scale^2 (I - U' U'^T)``: the columns of U times ``sqrt(2 - |U_i|^2)``, in a dtype."""
        basis = self.basis.astype(dtype)
        return basis * jnp.sqrt(2.0 - jnp.sum(jnp.square(basis), axis=-2, keepdims=True))

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LeafMaps:
    """The maps of one matrix; None leaves a side as it is.

    Attributes:
      rows: of the inputs.
      cols: of the outputs.
      has_bias: whether the layer's bias is mapped with the matrix, as its last row.
    """

    rows: AxisMap | None
    cols: AxisMap | None
    has_bias: bool = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class LeafAxes:
    """Which axes of a leaf are mapped, and by which of the maps.

    Attributes:
      path: of the matrix.
      bias: path of the bias of its layer, which is then the last row of the matrix: the weight of an input that is 1.
        None leaves the bias as it is.
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
    bias: str | None = None


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
        """The maps of each matrix that has any."""

        def named(name: str | None) -> AxisMap | None:
            return None if name is None else self.maps[name]

        return {leaf.path: LeafMaps(named(leaf.rows), named(leaf.cols), leaf.bias is not None) for leaf in self.leaves}

    def check_leaves(self, tree: Params) -> None:
        """Raises ValueError unless the tree has all leaves of the coordinates."""
        wanted = {path for leaf in self.leaves for path in (leaf.path, leaf.bias) if path is not None}
        if missing := wanted - dict(leaves_by_path(tree)).keys():
            raise ValueError(
                f"the coordinates are those of {', '.join(sorted(missing))}, which the parameters do not have: make "
                "them from the parameters that are trained"
            )

    def __call__(self, tree: Params) -> Params:
        """Takes gradients to the coordinates, and updates from them to the parameters.

        Args:
          tree: gradients or updates, of all parameters.

        Returns:
          A tree of the same shapes.

        Raises:
          ValueError: a leaf of the coordinates is missing in the tree.
        """
        self.check_leaves(tree)
        maps, leaves = self.by_path(), dict(leaves_by_path(tree))
        for axes in self.leaves:
            matrix, bias = leaves[axes.path], None if axes.bias is None else leaves[axes.bias]
            leaves[axes.path], mapped_bias = map_matrix(matrix, bias, axes, maps[axes.path])
            if axes.bias is not None:
                leaves[axes.bias] = mapped_bias
        return jax.tree.unflatten(jax.tree.structure(tree), list(leaves.values()))


def map_matrix(
    matrix: jax.Array, bias: jax.Array | None, axes: LeafAxes, maps: LeafMaps
) -> tuple[jax.Array, jax.Array | None]:
    """``F [W; b] H``, split again into matrix and bias; without a bias ``F W H``."""
    sides = [tuple(axis % matrix.ndim for axis in side) for side in (axes.row_axes, axes.col_axes)]
    stack = [axis for axis in range(matrix.ndim) if axis not in sides[0] + sides[1]]
    order = (*stack, *sides[1], *sides[0])
    moved = jnp.transpose(matrix, order)
    shape, cut = moved.shape, len(stack)
    rows, cols = (math.prod(matrix.shape[axis] for axis in side) for side in sides)
    flat = moved.reshape(*shape[:cut], cols, rows)
    if bias is not None:
        flat = jnp.concatenate([flat, bias.reshape(*shape[:cut], cols, 1).astype(flat.dtype)], axis=-1)
    if maps.rows is not None:
        flat = maps.rows.along_last_axis(flat)
    if maps.cols is not None:
        flat = jnp.swapaxes(maps.cols.along_last_axis(jnp.swapaxes(flat, -1, -2)), -1, -2)
    mapped = jnp.transpose(flat[..., :rows].reshape(shape), [order.index(axis) for axis in range(matrix.ndim)])
    return mapped, None if bias is None else flat[..., rows].reshape(bias.shape).astype(bias.dtype)


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
