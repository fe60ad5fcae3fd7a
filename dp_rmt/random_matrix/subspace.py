"""The singular values above a cut, and their vectors, without the others, certified to be all there are.

What stands above the bulk of a noisy matrix is a few values among hundreds. One product `G = Y Y^T` makes every further
step cost `R^2` whatever the long side is; a block Krylov space of about a hundred dimensions then holds the leading
eigenvectors of G, and one Cholesky factor proves that nothing was missed (docs/math.md). Batched over matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dp_rmt.random_matrix.marchenko_pastur import at_least_float32
from dp_rmt.random_matrix.singular_values import _short_side_first

_HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK = 8  # columns of the Krylov space's first block; small and deep reaches closer to the edge than wide and shallow
_PASSES = 14
_MAX_RANK = 32
# At up to this many times the Krylov space's dimension, all eigenvectors of G come sooner than the leading ones.
_WORTHWHILE = 1.5
# Share of a kept vector's squared length that may lie outside of the true singular space.
_MISSING_SHARE = 1e-3
# ... which is asked of values near the cut as of one whose square exceeds cut^2 by this share of it.
_NEAR_CUT = 0.1
# Rounding of G and of its Cholesky factor, in units of eps * max(y_1^2, cut^2): measured below 1.
_ROUNDING = 4.0
# Share of cut^2 that this rounding may be: else squaring has cost the digits of what stands at the cut.
_MAX_ROUNDING = 2e-3


class SubspaceSVD(NamedTuple):
    """The leading singular values and vectors of the shorter side, R = min(rows, cols).

    Attributes:
      basis: (B, R, D), orthonormal columns: left singular vectors if rows <= cols, else right ones. A column whose
        value is 0 can be 0.
      values: (B, D), descending. Exact above the cut where `is_complete`; lower bounds below it.
      is_complete: (B,), whether all singular values above the cut are here, converged.
      start: (B, R, K), where to start at the next step.
    """

    basis: jax.Array
    values: jax.Array
    is_complete: jax.Array
    start: jax.Array


def initial_start(count: int, rows: int, cols: int, *, dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
    """The start of a first step, where nothing is known: zeros (count, R, K)."""
    short_side = min(rows, cols)
    return jnp.zeros((count, short_side, min(_BLOCK, short_side)), dtype)


def subspace_svd(matrices: jax.Array, *, start: jax.Array, cut: ArrayLike, key: jax.Array) -> SubspaceSVD:
    """All singular values above a cut, with their vectors.

    The first block is `start` plus Gaussian columns, so that no direction is left out; the space
    `span{X, G X, ..., G^q X}` is kept orthonormal, and its Ritz pairs `(theta_i, u_i)` of `G = Y Y^T` (or `Y^T Y`) are
    the result. A Ritz value never exceeds the eigenvalue, so each `theta_i > cut^2` is one singular value above the
    cut. That there are no others, and that the kept pairs have converged, is proved by one Cholesky factor, of

        cut^2 I - G + sum_kept (theta_i - cut^2 + t_i) u_i u_i^T,      t_i = p max(theta_i - cut^2, cut^2 / 10),

    `p = 0.001`. It exists only if G exceeds `cut^2` in at most as many dimensions as there are kept pairs (Weyl), and
    each u_i is off the true singular space by an angle of `sin^2 <= t_i / (theta_i - cut^2)` (docs/math.md).

    Rounding can make it fail, not succeed: the sum is first lowered by a bound of it. So where y_1 is more than a few
    dozen times the cut (float32) it fails, and it may fail where a value lies within rounding of the cut.

    Args:
      matrices: (B, rows, cols), computed in at least float32.
      start: (B, R, K), `initial_start` or what the last step returned; any values, R = min(rows, cols).
      cut: positive, a scalar or (B,), the singular value above which everything is wanted.
      key: of the random columns; a new one for every step.

    Returns:
      A `SubspaceSVD` with D = min(32, R); a matrix of up to about 200 rows or columns is decomposed as a whole, D = R.
      Where not `is_complete` (also where entries are not finite), decompose that matrix in full.

    Raises:
      ValueError: if a shape does not fit.
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
    squared_cut = jnp.broadcast_to(jnp.square(jnp.asarray(cut, wide.dtype)), (count,))

    gram = _gram(wide)
    is_finite = jnp.all(jnp.isfinite(jnp.diagonal(gram, axis1=1, axis2=2)), axis=1)
    gram = jnp.where(is_finite[:, None, None], gram, 0.0)
    num_directions = start.shape[2]
    if _WORTHWHILE * num_directions * (_PASSES + 1) >= short_side:
        squares, vectors = jnp.linalg.eigh(gram)
        squares, rows_BxDxR = squares[:, ::-1], jnp.swapaxes(vectors, 1, 2)[:, ::-1]
        is_complete = jnp.ones(count, bool)
    else:
        fresh = jax.random.normal(key, (count, num_directions, short_side), wide.dtype) * short_side**-0.5
        krylov = _krylov_space(gram, jnp.swapaxes(start, 1, 2).astype(wide.dtype) + fresh)
        squares, rows_BxDxR = _ritz_pairs(gram, krylov)
        is_complete = _holds_all(gram, squares, rows_BxDxR, squared_cut)
    is_complete &= is_finite & (_rounding(squares, squared_cut) <= _MAX_ROUNDING * squared_cut)
    basis = jnp.swapaxes(rows_BxDxR, 1, 2)
    values = jnp.sqrt(jnp.maximum(squares, 0.0))
    return SubspaceSVD(basis, values, is_complete, basis[..., :num_directions])


def _gram(wide: jax.Array) -> jax.Array:
    """`Y Y^T`."""
    return jnp.einsum("brl,bsl->brs", wide, wide, precision=_HIGHEST)


def _times(x_BxDxR: jax.Array, y_BxRxK: jax.Array) -> jax.Array:
    return jnp.matmul(x_BxDxR, y_BxRxK, precision=_HIGHEST)


def _transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)


def _krylov_space(gram: jax.Array, block_BxKxR: jax.Array) -> jax.Array:
    """Orthonormal rows (B, D, R) that span the block and its images under `G, ..., G^q`; missing ones are 0."""
    count, width, short_side = block_BxKxR.shape
    space = jnp.zeros((count, width * (_PASSES + 1), short_side), gram.dtype)
    newest = _orthonormal(block_BxKxR, space)

    def add(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        space, newest = carry
        space = jax.lax.dynamic_update_slice_in_dim(space, newest, index * width, axis=1)
        return space, _orthonormal(_times(newest, gram), space)

    space, newest = jax.lax.fori_loop(0, _PASSES, add, (space, newest))
    return jax.lax.dynamic_update_slice_in_dim(space, newest, _PASSES * width, axis=1)


def _orthonormal(block_BxKxR: jax.Array, space_BxDxR: jax.Array) -> jax.Array:
    """Orthonormal rows for what the block has beyond the space: Gram-Schmidt and QR, twice.

    A row that is nothing but rounding becomes a random direction. If even that lies in the space it becomes 0; kept, it
    would count a direction twice.
    """
    for _ in range(2):
        block_BxKxR -= _times(_times(block_BxKxR, _transpose(space_BxDxR)), space_BxDxR)
        columns, triangle = jnp.linalg.qr(_transpose(block_BxKxR))
        block_BxKxR = _transpose(columns)
    length = jnp.abs(jnp.diagonal(triangle, axis1=1, axis2=2))  # of a unit vector's part outside of all the others
    return jnp.where(length[..., None] > 0.5, block_BxKxR, 0.0)


def _ritz_pairs(gram: jax.Array, space_BxDxR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The leading Ritz values of G, (B, D), descending, and their vectors as rows (B, D, R)."""
    projected = _times(_times(space_BxDxR, gram), _transpose(space_BxDxR))
    squares, mix = jnp.linalg.eigh(projected)
    leading = _transpose(mix)[:, : -_MAX_RANK - 1 : -1]
    return squares[:, : -_MAX_RANK - 1 : -1], _times(leading, space_BxDxR)


def _holds_all(gram: jax.Array, squares: jax.Array, rows_BxDxR: jax.Array, squared_cut: jax.Array) -> jax.Array:
    """The certificate of `subspace_svd`, (B,)."""
    cut = squared_cut[:, None]
    rounding = _rounding(squares, squared_cut)[:, None]
    missing = _MISSING_SHARE * jnp.maximum(squares - cut, _NEAR_CUT * cut) + 2 * rounding
    lowered = jnp.where(squares > cut, squares - cut + missing, 0.0)
    remainder = _times(_transpose(rows_BxDxR * lowered[..., None]), rows_BxDxR) - gram
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    return _is_positive_definite(remainder + (cut - rounding)[..., None] * identity)


def _rounding(squares: jax.Array, squared_cut: jax.Array) -> jax.Array:
    """A bound of the rounding errors in G and in its Cholesky factor, (B,)."""
    return _ROUNDING * jnp.finfo(squares.dtype).eps * jnp.maximum(squares[:, 0], squared_cut)


def _is_positive_definite(symmetric: jax.Array) -> jax.Array:
    """Whether each matrix (B, R, R) has a Cholesky factor, (B,)."""
    return jnp.all(jnp.isfinite(jnp.diagonal(jnp.linalg.cholesky(symmetric), axis1=1, axis2=2)), axis=1)
