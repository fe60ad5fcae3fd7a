"""Finds the singular values above a cut, with their vectors, and certifies that there are no others above it.

Only a few values among hundreds stand above the bulk of a noisy matrix. After one product `G = Y Y^T`, every further
step costs `R^2`, whatever the long side is. A block Krylov space of about a hundred dimensions then holds the leading
eigenvectors of G, and one Cholesky factor proves that nothing was missed (docs/math.md). All of it is batched over
matrices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dp_rmt.random_matrix.marchenko_pastur import at_least_float32
from dp_rmt.random_matrix.singular_values import _short_side_first
from dp_rmt.random_matrix.units import in_units, largest_entry, unit_of

_HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK = 8  # columns of the Krylov space's first block: a small, deep space reaches closer to the edge than a wide one
_MAX_RANK = 32
# If R is at most this many times the Krylov space's dimension, all eigenvectors of G come sooner than the leading ones.
_WORTHWHILE = 4 / 3
_TILE = 96
# p is twice the share of a kept vector's squared length that may lie outside of the true singular space ...
_MISSING_SHARE = 1e-3
# ... if its squared value exceeds cut^2 by this share of cut^2 or more. Nearer to the cut, more of it may lie outside.
_NEAR_CUT = 0.1
# Rounding of G and its Cholesky factor, in units of eps * max(y_1^2, cut^2): below 1/2 once what is kept is lowered.
_ROUNDING = 4.0
# The largest share of cut^2 that this rounding may be. Above it, squaring has cost the digits of values at the cut.
_MAX_ROUNDING = 2e-3


class SubspaceSVD(NamedTuple):
    """The leading singular values and vectors of the shorter side; R = min(rows, cols).

    Attributes:
      basis: (B, R, D), orthonormal columns: left singular vectors if rows <= cols, else right ones. A column whose
        value is 0 can be 0.
      values: (B, D), descending. Values above the cut are exact where `is_complete`; those below it are lower bounds.
      is_complete: (B,), whether all singular values above the cut are here and have converged.
      start: (B, R, K), where the search starts at the next step.
    """

    basis: jax.Array
    values: jax.Array
    is_complete: jax.Array
    start: jax.Array


def initial_start(count: int, rows: int, cols: int, *, dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
    """The start of the first step, where nothing is known yet: zeros (count, R, K)."""
    short_side = min(rows, cols)
    return jnp.zeros((count, short_side, min(_BLOCK, short_side)), dtype)


def subspace_svd(matrices: jax.Array, *, start: jax.Array, cut: ArrayLike, key: jax.Array) -> SubspaceSVD:
    """Finds all singular values above a cut, with their vectors.

    The first block X is `start` plus Gaussian columns, so that no direction is left out. The space `span{X, G X, ...,
    G^q X}` is kept orthonormal. The result is the space's Ritz pairs `(theta_i, u_i)` of `G = Y Y^T` (or `Y^T Y`). A
    Ritz value never exceeds the eigenvalue, so each `theta_i > cut^2` is one singular value above the cut. That there
    are no others, and that the kept pairs have converged, is proved by one Cholesky factor, of

        cut^2 I - G + sum_kept (theta_i - cut^2 + t_i) u_i u_i^T,      t_i = p max(theta_i - cut^2, cut^2 / 10),

    `p = 0.001`. It exists only if G exceeds `cut^2` in at most as many dimensions as there are kept pairs (Weyl), and
    if they are off the true singular space by no more than `sin^2 = max t_i / (theta_i - cut^2) / 2` (docs/math.md).

    The sum is first lowered by a bound of its rounding errors. Rounding can therefore make the proof fail, and does so
    where y_1 is more than about 60 times the cut (float32). It can make the proof succeed wrongly only for values
    within 1e-5 of the cut.

    Args:
      matrices: (B, rows, cols), computed in at least float32.
      start: (B, R, K), R = min(rows, cols): `initial_start`, or what the last step returned. Any values are allowed.
      cut: the singular value above which everything is wanted; positive, a scalar or (B,).
      key: the key of the random columns; take a new one for every step.

    Returns:
      A `SubspaceSVD` with D = 32; or with D = R where the shorter side is so short, up to about 120, that all of G is
      decomposed. A matrix that is not `is_complete`, such as one with entries that are not finite, must be decomposed
      in full.

    Raises:
      ValueError: a shape does not fit.
    """
    matrices = at_least_float32(matrices)
    if matrices.ndim != 3:
        raise ValueError(f"matrices has shape {matrices.shape}; it needs three axes: (B, rows, cols).")
    wide = _short_side_first(matrices)
    count, short_side = wide.shape[:2]
    if start.ndim != 3 or start.shape[:2] != (count, short_side) or not 1 <= start.shape[2] <= short_side:
        raise ValueError(
            f"start {start.shape} does not fit matrices {matrices.shape}: it must be ({count}, {short_side}, K), "
            f"K <= {short_side}. Take it from initial_start or from the last step's result."
        )
    if jnp.ndim(cut) and jnp.shape(cut) != (count,):
        raise ValueError(f"cut {jnp.shape(cut)} must be a scalar or one for each of the {count} matrices.")
    cut = jnp.broadcast_to(jnp.asarray(cut, wide.dtype), (count,))
    # All matrices get the same columns, so that results do not depend on how a batch is divided.
    fresh_KxR = jax.random.normal(key, (start.shape[2], short_side), wide.dtype) * short_side**-0.5

    def batched(wide: jax.Array, start: jax.Array, cut: jax.Array) -> SubspaceSVD:
        return _decompose(wide, start, cut, fresh_KxR)

    def one_by_one(*batches: jax.Array) -> SubspaceSVD:
        def alone(one: tuple[jax.Array, ...]) -> SubspaceSVD:
            first: SubspaceSVD = jax.tree.map(lambda x: x[0], batched(*(x[None] for x in one)))
            return first

        found: SubspaceSVD = jax.lax.map(alone, batches)
        return found

    # On a CPU, a matrix that is finished before the next one is begun stays in the cache, which halves the time.
    found: SubspaceSVD = jax.lax.platform_dependent(
        wide, start.astype(wide.dtype), cut, cpu=one_by_one, default=batched
    )
    return found


def _decompose(wide_BxRxL: jax.Array, start_BxRxK: jax.Array, cut_B: jax.Array, fresh_KxR: jax.Array) -> SubspaceSVD:
    """`subspace_svd` for matrices with the short side first; each is taken in units of its largest entry."""
    largest = largest_entry(wide_BxRxL)
    unit, is_finite = unit_of(largest), jnp.isfinite(largest)
    gram = _gram(wide_BxRxL * (1 / unit)[:, None, None])
    gram = jnp.where(is_finite[:, None, None], gram, 0.0)
    squared_cut_B = jnp.square(in_units(cut_B, unit))
    width, short_side = fresh_KxR.shape
    passes = _num_passes(*wide_BxRxL.shape[1:])
    if _WORTHWHILE * width * (passes + 1) >= short_side:
        squares, vectors = jnp.linalg.eigh(gram)
        squares, rows_BxDxR = squares[:, ::-1], _transpose(vectors)[:, ::-1]
        is_complete = is_finite
    else:
        squares, rows_BxDxR = _ritz_pairs(*_krylov_space(gram, _transpose(start_BxRxK) + fresh_KxR, passes))
        is_complete = is_finite & _holds_all(gram, squares, rows_BxDxR, squared_cut_B)
    has_digits = _rounding(squares, squared_cut_B) <= _MAX_ROUNDING * squared_cut_B
    basis, values = _transpose(rows_BxDxR), unit[:, None] * jnp.sqrt(jnp.maximum(squares, 0.0))
    return SubspaceSVD(basis, values, is_complete & has_digits, basis[..., :width])


def _num_passes(rows: int, cols: int) -> int:
    """The degree q of a Krylov space that tells the largest noise values apart.

    The squares of these values are about `w = (sqrt m + sqrt n)^(4/3) / (m n)^(1/6)` apart (Tracy-Widom), and the bulk
    is `4 sqrt(m n)` wide. A polynomial that is small on the bulk rises within w of its edge at a degree of `sqrt(4
    sqrt(m n) / w)`. With a twentieth more, at most one matrix in a thousand is not certified; with one degree less,
    several times as many. The degree is at least 10, since many components take many dimensions.
    """
    gap_in_bulk = (math.sqrt(rows) + math.sqrt(cols)) ** (4 / 3) / (4 * (rows * cols) ** (2 / 3))
    return max(10, math.ceil(1.05 / math.sqrt(gap_in_bulk)))


def _gram(wide_BxRxL: jax.Array) -> jax.Array:
    """`Y Y^T`, of which only the tiles on and below the diagonal are multiplied out, because it is symmetric."""
    count, short_side, _ = wide_BxRxL.shape
    gram = jnp.zeros((count, short_side, short_side), wide_BxRxL.dtype)
    for first in range(0, short_side, _TILE):
        last = min(first + _TILE, short_side)
        column = _times_transposed(wide_BxRxL[:, first:], wide_BxRxL[:, first:last])
        gram = gram.at[:, first:, first:last].set(column)
        gram = gram.at[:, first:last, last:].set(_transpose(column[:, last - first :]))
    return gram


def _krylov_space(gram: jax.Array, block_BxKxR: jax.Array, passes: int) -> tuple[jax.Array, jax.Array]:
    """Orthonormal rows Q (B, D, R) of `span{X, G X, ..., G^q X}`, and the lower triangle of `Q G Q^T`.

    If G is of lower rank, the space has fewer directions. The missing ones are rows of 0 with a negative value.
    """
    count, width, short_side = block_BxKxR.shape
    dimension = width * (passes + 1)
    space = jnp.zeros((count, dimension, short_side), gram.dtype)
    projected = jnp.zeros((count, dimension, dimension), gram.dtype)

    def add(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        space, projected, newest = carry
        space = jax.lax.dynamic_update_slice_in_dim(space, newest, index * width, axis=1)
        image = _times(newest, gram)
        overlap = _times_transposed(image, space)
        projected = jax.lax.dynamic_update_slice_in_dim(projected, overlap, index * width, axis=1)
        return space, projected, _orthonormal(image - _times(overlap, space), space)

    newest = _orthonormal(block_BxKxR, space)
    space, projected, _ = jax.lax.fori_loop(0, passes + 1, add, (space, projected, newest))
    # Missing rows thus come last among the eigenvectors, and do not mix with those of the eigenvalue 0.
    last = jnp.max(jnp.diagonal(projected, axis1=1, axis2=2), axis=1, initial=jnp.finfo(gram.dtype).tiny)
    is_missing = jnp.all(space == 0, axis=2)
    projected -= jnp.where(is_missing, last[:, None], 0.0)[..., None] * jnp.eye(dimension, dtype=gram.dtype)
    return space, projected


def _orthonormal(block_BxKxR: jax.Array, space_BxDxR: jax.Array) -> jax.Array:
    """Makes orthonormal rows of what the block has beyond the space, given the block less its projection on the space.

    QR turns rows that are nothing but rounding into arbitrary unit vectors, and takes the others' orthogonality with
    them. So the projection is repeated, now of unit vectors. Directions of which it leaves little are dropped, as rows
    of 0, because they would count twice what the space has already.
    """
    block_BxKxR = _transpose(jnp.linalg.qr(_transpose(block_BxKxR))[0])
    block_BxKxR -= _times(_times_transposed(block_BxKxR, space_BxDxR), space_BxDxR)
    squared_lengths, mix = jnp.linalg.eigh(_times_transposed(block_BxKxR, block_BxKxR))
    scale = jnp.where(squared_lengths > 0.25, jax.lax.rsqrt(jnp.maximum(squared_lengths, 0.25)), 0.0)
    return _times(scale[..., None] * _transpose(mix), block_BxKxR)


def _ritz_pairs(space_BxDxR: jax.Array, projected_BxDxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The leading Ritz values (B, D), descending, and their vectors as rows (B, D, R)."""
    mix, squares = jax.lax.linalg.eigh(projected_BxDxD, lower=True, symmetrize_input=False)  # ascending
    leading = _transpose(mix)[:, : -_MAX_RANK - 1 : -1]
    return squares[:, : -_MAX_RANK - 1 : -1], _times(leading, space_BxDxR)


def _holds_all(gram: jax.Array, squares: jax.Array, rows_BxDxR: jax.Array, squared_cut_B: jax.Array) -> jax.Array:
    """The certificate of `subspace_svd`, (B,)."""
    cut = squared_cut_B[:, None]
    rounding = _rounding(squares, squared_cut_B)[:, None]
    missing = _MISSING_SHARE * jnp.maximum(squares - cut, _NEAR_CUT * cut) + 2 * rounding
    lowered_by = jnp.where(squares > cut, squares - cut + missing, 0.0)
    kept_BxRxD = _transpose(rows_BxDxR * jnp.sqrt(lowered_by)[..., None])
    return _is_positive_definite(gram, cut - rounding, kept_BxRxD)


def _rounding(squares: jax.Array, squared_cut_B: jax.Array) -> jax.Array:
    """A bound (B,) of the rounding errors in G and in the Cholesky factor."""
    return _ROUNDING * jnp.finfo(squares.dtype).eps * jnp.maximum(squares[:, 0], squared_cut_B)


def _is_positive_definite(gram: jax.Array, shift_Bx1: jax.Array, low_rank_BxRxD: jax.Array) -> jax.Array:
    """Tells whether `A = shift I - G + W W^T` has a Cholesky factor `L L^T = A`; bool, (B,).

    Tiles of columns are computed from left to right, `L_j L_jj^T = A_j - sum_(k < j) L_k L_jk^T`. This costs half as
    much as updating all of A after each tile. The columns of W enter as further L_k, with the other sign.
    """
    short_side = gram.shape[1]
    is_definite = jnp.ones(len(gram), bool)
    factor = low_rank_BxRxD  # [W L_1 L_2 ...], the rows that are still to be done
    for first in range(0, short_side, _TILE):
        width = min(_TILE, short_side - first)
        sign = jnp.where(jnp.arange(factor.shape[2]) < low_rank_BxRxD.shape[2], -1.0, 1.0)
        diagonal = shift_Bx1[..., None] * jnp.eye(short_side - first, width, dtype=gram.dtype)
        column = diagonal - gram[:, first:, first : first + width]
        column -= _times_transposed(factor, sign.astype(gram.dtype) * factor[:, :width])
        corner = jax.lax.linalg.cholesky(column[:, :width], symmetrize_input=False)  # NaN if there is no factor
        is_definite &= jnp.isfinite(corner[:, -1, -1])
        identity = jnp.broadcast_to(jnp.eye(width, dtype=gram.dtype), corner.shape)
        inverse = jax.lax.linalg.triangular_solve(corner, identity, left_side=True, lower=True)
        factor = jnp.concatenate([factor[:, width:], _times_transposed(column[:, width:], inverse)], axis=2)
    return is_definite


def _times(x_BxDxR: jax.Array, y_BxRxK: jax.Array) -> jax.Array:
    return jnp.einsum("bij,bjk->bik", x_BxDxR, y_BxRxK, precision=_HIGHEST)


def _times_transposed(x_BxDxR: jax.Array, y_BxKxR: jax.Array) -> jax.Array:
    return jnp.einsum("bij,bkj->bik", x_BxDxR, y_BxKxR, precision=_HIGHEST)


def _transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)
