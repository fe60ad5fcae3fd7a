"""The matrices of a parameter tree as few batches. Equal shapes are stacked; joined leaves stand side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dp_rmt.denoising import matrix_view
from dp_rmt.denoising.joins import JoinRule
from dp_rmt.trees import leaves_by_path, shape_and_dtype, wide_dtype
from dp_rmt.types import Params


class Block(NamedTuple):
    """One leaf in a block matrix: its path, its axes, and the columns that it takes."""

    path: str
    axes: matrix_view.MatrixAxes
    shape: tuple[int, ...]
    cols: int


class BlockMatrix(NamedTuple):
    """A block matrix ``[G_1 G_2 ...]`` of leaves with equal batch and rows, side by side; mostly it is one leaf.

    Attributes:
      name: its name in diagnostics, which is the leaf's path or what the join rule says.
      blocks: the leaves, from left to right.
      number: how many matrices there are, the product of the leaves' batch axes.
      rows: the rows of each matrix.
      dtype: float32 or wider.
    """

    name: str
    blocks: tuple[Block, ...]
    number: int
    rows: int
    dtype: jnp.dtype

    @property
    def cols(self) -> int:
        """Columns of all blocks together."""
        return sum(block.cols for block in self.blocks)


def check_names_some(tree: Params, rule: matrix_view.MatrixRule | None, join: JoinRule | None, caller: str) -> None:
    """Checks like `matrix_view.check_names_some`, and also raises if the join rule names none of the matrices.

    Raises:
      ValueError: with the paths of what is not named.
    """
    matrix_view.check_names_some(tree, rule, caller)
    matrices = list(matrix_view.matrix_leaves(tree, rule))
    if join and matrices and not any(map(join, matrices)):
        raise ValueError(
            f"{caller}: the join rule names none of the {len(matrices)} matrices, so that nothing would be joined: "
            f"{', '.join(map(repr, matrices[:8]))}{', ...' if len(matrices) > 8 else ''}. Leave join out, or give one "
            "that has a name for these paths."
        )


def matrix_groups(
    tree: Params, rule: matrix_view.MatrixRule | None = None, join: JoinRule | None = None
) -> dict[str, list[BlockMatrix]]:
    """Groups the matrices of a tree by equal shape and dtype.

    Args:
      tree: parameters, or anything with their shapes.
      rule: which leaves are matrices; None for `dp_rmt.denoising.matrix_view.kernels_are_matrices`.
      join: which matrices are blocks of one matrix; None for none.

    Returns:
      ``{"768x3072 float32": [...]}``, groups and members in the order of the tree.

    Raises:
      ValueError: leaves to be joined differ in rows, dtype or number of matrices, or a matrix is complex.
    """
    leaves = dict(leaves_by_path(tree))
    joined: dict[str, list[BlockMatrix]] = {}
    for path, axes in matrix_view.matrix_leaves(tree, rule).items():
        name = (join(path) if join else None) or path
        joined.setdefault(name, []).append(_single(name, path, leaves[path], axes))
    groups: dict[str, list[BlockMatrix]] = {}
    for name, singles in joined.items():
        if len({(single.number, single.rows, single.dtype) for single in singles}) > 1:
            raise ValueError(
                f"matrices cannot be joined as {name!r}: "
                + ", ".join(f"{s.blocks[0].path} is {s.number} of {s.rows} x {s.cols} {s.dtype}" for s in singles)
                + "; blocks side by side need the same rows, dtype and number. Mend the join rule."
            )
        matrix = singles[0]._replace(blocks=tuple(single.blocks[0] for single in singles))
        groups.setdefault(f"{matrix.rows}x{matrix.cols} {matrix.dtype}", []).append(matrix)
    return groups


def map_groups(
    function: Callable[[str, list[BlockMatrix], jax.Array], jax.Array],
    tree: Params,
    rule: matrix_view.MatrixRule | None = None,
    join: JoinRule | None = None,
) -> Params:
    """Applies a function to the matrices of a tree, one group after the other.

    The groups run one at a time, because on the CPU LAPACK calls of one program that overlap can hang for ever (jaxlib
    0.10.2, seen on two cores).

    Args:
      function: ``(name of the group, its members, matrices (B, rows, cols)) -> matrices``.
      tree: parameters or updates.
      rule: as for `matrix_groups`.
      join: as for `matrix_groups`.

    Returns:
      The tree with its matrices replaced and its other leaves as they are.
    """
    leaves = dict(leaves_by_path(tree))
    after = jnp.zeros([], jnp.int32)
    for name, group in matrix_groups(tree, rule, join).items():
        matrices = stack(group, leaves)
        result = function(name, group, matrices + after.astype(matrices.dtype))
        after = jnp.minimum(jnp.max((result > 0).astype(jnp.int32)), 0)  # always 0, which XLA does not know
        leaves |= unstack(group, result)
    paths = [path for path, _ in leaves_by_path(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[path] for path in paths])


def stack(group: list[BlockMatrix], leaves: Mapping[str, jax.Array]) -> jax.Array:
    """Stacks all matrices of a group as ``(B, rows, cols)``, member after member."""
    members = []
    for matrix in group:
        blocks = [matrix_view.to_matrices(leaves[block.path], block.axes) for block in matrix.blocks]
        members.append(jnp.concatenate([block.astype(matrix.dtype) for block in blocks], axis=2))
    return jnp.concatenate(members)


def unstack(group: list[BlockMatrix], matrices: jax.Array) -> dict[str, jax.Array]:
    """Undoes `stack`; returns ``{path: leaf}``."""
    leaves = {}
    for matrix, part in zip(group, split(group, matrices), strict=True):
        first = 0
        for block in matrix.blocks:
            columns = part[:, :, first : first + block.cols]
            leaves[block.path] = matrix_view.from_matrices(columns, block.axes, block.shape)
            first += block.cols
    return leaves


def split(group: list[BlockMatrix], stacked: jax.Array) -> list[jax.Array]:
    """The part ``(number, ...)`` of each member of an array ``(B, ...)``."""
    ends, end = [], 0
    for matrix in group[:-1]:
        end += matrix.number
        ends.append(end)
    return jnp.split(stacked, ends)


def _single(name: str, path: str, leaf: jax.Array, axes: matrix_view.MatrixAxes) -> BlockMatrix:
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise ValueError(
            f"matrix {path!r} is {leaf.dtype}: the theory here is that of real matrices, whose noise has one standard "
            "deviation for each entry. Split it into real and imaginary part, or leave it out of the matrix rule."
        )
    shape = shape_and_dtype(leaf)  # without its sharding, for which an explicit mesh has no rule to reshape by
    number, rows, cols = jax.eval_shape(lambda x: matrix_view.to_matrices(x, axes), shape).shape
    return BlockMatrix(name, (Block(path, axes, leaf.shape, cols),), number, rows, wide_dtype(leaf))
