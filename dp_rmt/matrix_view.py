"""Which leaves of a parameter tree are matrices, and how to see each as a batch ``(B, rows, cols)``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from dp_rmt.types import Params

SMALLEST_DENOISED_SIDE = 4
"""Thinner matrices pass through. LoRA factors of rank 4 still gain (docs/design/0004); with two columns, a signal that
has both of them loses more at the edge than a signal of rank one gains (tests/test_matrix_view.py)."""


class MatrixAxes(NamedTuple):
    """The axes of a leaf that form the rows and the columns of a matrix; all other axes are batch axes.

    A scanned stack of dense kernels ``(layers, in, out)`` has the default axes; attention kernels
    ``(in, heads, head_dim)`` have ``MatrixAxes(rows=(0,), cols=(1, 2))``.
    """

    rows: tuple[int, ...] = (-2,)
    cols: tuple[int, ...] = (-1,)


MatrixRule = Callable[[str, jax.Array], MatrixAxes | None]
"""``(path, leaf) -> MatrixAxes``, or None where the leaf is not a matrix; path is like ``"encoder/query/kernel"``."""


def kernels_are_matrices(path: str, leaf: jax.Array) -> MatrixAxes | None:
    """Default rule: leaves named ``kernel`` whose last two axes are both at least 4 long are (stacks of) matrices.

    Embeddings (``embedding``), biases and norm scales have other names and so pass through.

    >>> import jax.numpy as jnp
    >>> kernels_are_matrices("layers/query/kernel", jnp.zeros((6, 64, 64)))
    MatrixAxes(rows=(-2,), cols=(-1,))
    >>> kernels_are_matrices("embeddings/word/embedding", jnp.zeros((512, 64))) is None
    True
    """
    is_kernel = path.rsplit("/", 1)[-1] == "kernel"
    return MatrixAxes() if is_kernel and leaf.ndim >= 2 and min(leaf.shape[-2:]) >= SMALLEST_DENOISED_SIDE else None


def to_matrices(leaf: jax.Array, axes: MatrixAxes) -> jax.Array:
    """View a leaf as ``(B, rows, cols)``; a leaf without batch axes gets ``B = 1``."""
    batch_axes, row_axes, col_axes = _split_axes(leaf.ndim, axes)
    rows, cols = (math.prod(leaf.shape[axis] for axis in group) for group in (row_axes, col_axes))
    return leaf.transpose(batch_axes + row_axes + col_axes).reshape(-1, rows, cols)


def from_matrices(matrices: jax.Array, axes: MatrixAxes, shape: tuple[int, ...]) -> jax.Array:
    """Inverse of `to_matrices` for a leaf of the given shape."""
    order = sum(_split_axes(len(shape), axes), ())
    inverse = tuple(order.index(axis) for axis in range(len(shape)))
    return matrices.reshape(tuple(shape[axis] for axis in order)).transpose(inverse)


def matrix_leaves(tree: Params, rule: MatrixRule = kernels_are_matrices) -> dict[str, MatrixAxes]:
    """The matrix leaves of a tree by path, in tree order.

    Args:
      tree: parameters, or anything with their shapes.
      rule: decides leaf by leaf.

    Returns:
      ``{path: axes}`` for the leaves that the rule accepts.
    """
    found = ((path, rule(path, leaf)) for path, leaf in leaves_by_path(tree))
    return {path: axes for path, axes in found if axes is not None}


def leaves_by_path(tree: Params) -> list[tuple[str, jax.Array]]:
    """All leaves with their paths, such as ``"encoder/layers/query/kernel"``."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _split_axes(ndim: int, axes: MatrixAxes) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    rows = tuple(axis % ndim for axis in axes.rows)
    cols = tuple(axis % ndim for axis in axes.cols)
    if not rows or not cols or len({*rows, *cols}) != len(rows) + len(cols):
        raise ValueError(
            f"matrix axes {axes} of a leaf with {ndim} axes must name at least one row axis and one column axis, "
            "each axis once; mend the matrix rule that returned them"
        )
    return tuple(axis for axis in range(ndim) if axis not in rows + cols), rows, cols
