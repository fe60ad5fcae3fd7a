"""Says which leaves of a parameter tree are matrices, and how to see each as a batch ``(B, rows, cols)``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dp_rmt.trees import leaves_by_path, shape_and_dtype
from dp_rmt.types import Params

SMALLEST_DENOISED_SIDE = 4
"""Thinner matrices pass through. LoRA factors of rank 4 still gain (docs/design/0004). With two columns, a signal that
has both of them loses more at the edge than a signal of rank one gains (tests/denoising/test_matrix_view.py)."""


class MatrixAxes(NamedTuple):
    """The axes of a leaf that form the rows and the columns of a matrix. All other axes are batch axes.

    Rows are the inputs of a layer and columns its outputs, whichever comes first in the leaf. A scanned stack of dense
    kernels ``(layers, in, out)`` has the default axes, a weight of torch ``(out, in)`` has `OUT_IN`, and attention
    kernels ``(in, heads, head_dim)`` have ``MatrixAxes(rows=(0,), cols=(1, 2))``. A denoised matrix is the same either
    way round, but joins (`dp_rmt.denoising.matrix_groups`) and Muon's factor need to know.
    """

    rows: tuple[int, ...] = (-2,)
    cols: tuple[int, ...] = (-1,)


IN_OUT = MatrixAxes()
"""The layout ``(..., in, out)`` of Flax and Haiku."""

OUT_IN = MatrixAxes(rows=(-1,), cols=(-2,))
"""The layout ``(..., out, in)`` of Equinox and torch."""

MatrixRule = Callable[[str, jax.ShapeDtypeStruct], MatrixAxes | None]
"""A function ``(path, shape and dtype of the leaf) -> MatrixAxes``, or None where the leaf is not a matrix. The path is
like ``"encoder/query/kernel"``."""

_LAYOUTS = {"kernel": IN_OUT, "lora_a": IN_OUT, "lora_b": IN_OUT, "w": IN_OUT, "weight": OUT_IN}
# Layers whose weights are not multiplied with an input as a matrix: tables that are looked up, scales, and biases.
_IS_OTHER = re.compile(
    r"embed|norm|bias|(^|[/._])(wte|wpe|ln(_?\w)?|scale|offset|gamma|beta|b\d*)([/._]|$)", re.IGNORECASE
)


def kernels_are_matrices(path: str, leaf: jax.ShapeDtypeStruct) -> MatrixAxes | None:
    """The default rule: weights of layers, known by their names, with both sides at least 4 long.

    Names and layouts: ``kernel`` of Flax linen and nnx, ``w`` of Haiku, and nnx's ``lora_a`` and ``lora_b`` are
    ``(..., in, out)``. ``weight`` of Equinox and torch is ``(..., out, in)``, and with four axes it is the convolution
    ``(out, in, height, width)``. Leading axes are batch axes, but a kernel ``(in, heads, head_dim)`` of Flax's
    attention is one matrix. Embeddings, biases and norm scales have other names, so they pass through.

    >>> import jax.numpy as jnp
    >>> kernels_are_matrices("layers/query/kernel", jnp.zeros((6, 64, 64)))
    MatrixAxes(rows=(-2,), cols=(-1,))
    >>> kernels_are_matrices("layers.0.query.weight", jnp.zeros((32, 64)))
    MatrixAxes(rows=(-1,), cols=(-2,))
    >>> kernels_are_matrices("embeddings/word/embedding", jnp.zeros((512, 64))) is None
    True
    """
    *parents, name = re.split(r"[/.]", path)
    if name not in _LAYOUTS or leaf.ndim < 2 or (name in ("w", "weight") and _IS_OTHER.search(path)):
        return None
    axes = _LAYOUTS[name]
    if name == "kernel":
        axes = _attention_axes(parents[-1] if parents else "", leaf.shape) or axes
    elif name == "weight" and leaf.ndim == 4:
        axes = MatrixAxes(rows=(-3,), cols=(-4,))
    sides = (math.prod(leaf.shape[axis] for axis in group) for group in axes)
    return axes if min(sides) >= SMALLEST_DENOISED_SIDE else None


def every_matrix(path: str, leaf: jax.ShapeDtypeStruct) -> MatrixAxes | None:
    """A rule for plain trees: every leaf whose last two axes are both at least 4 long is taken as ``(..., in, out)``.

    Leaves with the names of embeddings, biases and norm scales are left out.

    >>> import jax.numpy as jnp
    >>> every_matrix("0/w1", jnp.zeros((64, 32)))
    MatrixAxes(rows=(-2,), cols=(-1,))
    """
    is_matrix = leaf.ndim >= 2 and min(leaf.shape[-2:]) >= SMALLEST_DENOISED_SIDE and not _IS_OTHER.search(path)
    return IN_OUT if is_matrix else None


def check_names_some(tree: Params, rule: MatrixRule | None, caller: str) -> None:
    """Raises if a tree has matrices and the rule names none of them, since the method would be off without a word.

    Args:
      tree: parameters, or anything with their shapes. A tree without matrices, such as one of biases alone, is no
        error.
      rule: the matrix rule; None for `kernels_are_matrices`.
      caller: the function that has the option `matrix_rule`.

    Raises:
      ValueError: the rule names none; the message has the paths and shapes of what looks like a matrix.
    """
    if matrix_leaves(tree, rule):
        return
    missed = [f"{path!r} {leaf.shape}" for path, leaf in _shapes_by_path(tree) if _looks_like_a_matrix(path, leaf)]
    if missed:
        more = f" and {len(missed) - 8} more" if len(missed) > 8 else ""
        raise ValueError(
            f"{caller}: the matrix rule names none of the leaves, so that nothing would be done, but these look like "
            f"matrices: {', '.join(missed[:8])}{more}. Give matrix_rule=, a function (path, leaf) -> "
            "MatrixAxes(rows, cols) or None, such as dp_rmt.denoising.matrix_view.every_matrix: the last two axes of "
            "every leaf. The default goes by the names kernel (Flax), weight (Equinox, torch) and w (Haiku)."
        )


def to_matrices(leaf: jax.Array, axes: MatrixAxes) -> jax.Array:
    """Views a leaf as ``(B, rows, cols)``; a leaf without batch axes gets ``B = 1``."""
    batch_axes, row_axes, col_axes = _split_axes(leaf.ndim, axes)
    rows, cols = (math.prod(leaf.shape[axis] for axis in group) for group in (row_axes, col_axes))
    return leaf.transpose(batch_axes + row_axes + col_axes).reshape(-1, rows, cols)


def from_matrices(matrices: jax.Array, axes: MatrixAxes, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `to_matrices` for a leaf of the given shape."""
    order = sum(_split_axes(len(shape), axes), ())
    inverse = tuple(order.index(axis) for axis in range(len(shape)))
    return matrices.reshape(tuple(shape[axis] for axis in order)).transpose(inverse)


def matrix_leaves(tree: Params, rule: MatrixRule | None = None) -> dict[str, MatrixAxes]:
    """Finds the matrix leaves of a tree by path, in tree order.

    Args:
      tree: parameters, or anything with their shapes.
      rule: decides leaf by leaf, except for leaves of size 0; None for `kernels_are_matrices`.

    Returns:
      ``{path: axes}`` for the leaves that the rule accepts.
    """
    rule = rule or kernels_are_matrices
    found = ((path, rule(path, leaf)) for path, leaf in _shapes_by_path(tree) if leaf.size)
    return {path: axes for path, axes in found if axes is not None}


def _shapes_by_path(tree: Params) -> list[tuple[str, jax.ShapeDtypeStruct]]:
    return [(path, shape_and_dtype(leaf)) for path, leaf in leaves_by_path(tree)]


def _looks_like_a_matrix(path: str, leaf: jax.ShapeDtypeStruct) -> bool:
    long_axes = sum(side >= SMALLEST_DENOISED_SIDE for side in leaf.shape)
    return long_axes >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size > 0 and not _IS_OTHER.search(path)


def _attention_axes(layer: str, shape: tuple[int, ...]) -> MatrixAxes | None:
    """The axes of kernels of Flax's attention. No stack of kernels has as many layers as the product of two sides."""
    if len(shape) >= 3 and layer in ("query", "key", "value") and shape[-3] == shape[-2] * shape[-1]:
        return MatrixAxes(rows=(-3,), cols=(-2, -1))
    if len(shape) >= 3 and layer == "out" and shape[-3] * shape[-2] == shape[-1]:
        return MatrixAxes(rows=(-3, -2), cols=(-1,))
    return None


def _split_axes(ndim: int, axes: MatrixAxes) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    rows = tuple(axis % ndim for axis in axes.rows)
    cols = tuple(axis % ndim for axis in axes.cols)
    if not rows or not cols or len({*rows, *cols}) != len(rows) + len(cols):
        raise ValueError(
            f"matrix axes {axes} of a leaf with {ndim} axes must name at least one row axis and one column axis, "
            "each axis once; mend the matrix rule that returned them"
        )
    return tuple(axis for axis in range(ndim) if axis not in rows + cols), rows, cols
