"""Singular values and the singular basis of the shorter side, batched over matrices of one shape.

Every denoiser here is a spectral multiplier `U diag(w) U^T Y`. It needs nothing but the basis of the shorter side.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dp_rmt.random_matrix.marchenko_pastur import at_least_float32
from dp_rmt.random_matrix.units import largest_entry, unit_of

_HIGHEST = jax.lax.Precision.HIGHEST


class ShortSideSVD(NamedTuple):
    """The singular vectors of the shorter side, and the singular values; R = min(rows, cols).

    Attributes:
      basis: (..., R, R), the left singular vectors as columns if rows <= cols, else the right ones.
      values: (..., R), the singular values, descending.
    """

    basis: jax.Array
    values: jax.Array


def short_side_svd(matrices: jax.Array, *, method: Literal["exact", "gram"] = "exact") -> ShortSideSVD:
    """Computes the singular values and the singular basis of the shorter side of each matrix.

    `"exact"` computes the SVD `Y = U diag(y) V^T`. `"gram"` computes the eigenvectors of `Y Y^T = U diag(y^2) U^T`,
    which is several times faster. Squaring costs digits: in float32 a value is accurate to about `1e-7 y_1^2 / y`. At
    the bulk edge this error is nothing, unless a signal stands orders of magnitude above the edge.

    Each matrix is decomposed in units of its largest entry, a power of two, so that the digits do not depend on its
    scale. LAPACK's SVD never returns for some matrices with an infinite entry, and its eigenvectors of matrices with a
    NaN can look like numbers. Therefore neither is given a matrix with an entry that is not finite.

    Args:
      matrices: (..., rows, cols), computed in at least float32.
      method: `"exact"` or `"gram"`.

    Returns:
      A `ShortSideSVD` of `basis` (..., R, R) and `values` (..., R), R = min(rows, cols). Both are all NaN for a matrix
      with an entry that is not finite.

    Raises:
      ValueError: if `matrices` has fewer than two axes, or `method` is unknown.

    >>> print(short_side_svd(jnp.array([[[3.0, 0.0, 4.0]]])).values)
    [[5.]]
    """
    wide = _short_side_first(at_least_float32(matrices))
    largest = largest_entry(wide)
    unit, is_finite = unit_of(largest), jnp.isfinite(largest)
    wide = jnp.where(is_finite[..., None, None], wide * (1 / unit)[..., None, None], 0.0)
    if method == "exact":
        basis, values, _ = jnp.linalg.svd(wide, full_matrices=False)
    elif method == "gram":
        gram = jnp.einsum("...rl,...sl->...rs", wide, wide, precision=_HIGHEST)
        squares, basis = jnp.linalg.eigh(gram)  # ascending
        basis, values = basis[..., ::-1], jnp.sqrt(jnp.maximum(squares[..., ::-1], 0.0))
    else:
        raise ValueError(f'method={method!r} is unknown: use "exact" (an SVD) or "gram" (eigenvectors of Y Y^T).')
    return ShortSideSVD(
        jnp.where(is_finite[..., None, None], basis, jnp.nan),
        jnp.where(is_finite[..., None], values * unit[..., None], jnp.nan),
    )


def scale_spectrum(
    matrices: jax.Array, basis: jax.Array, weights: jax.Array, *, complement: ArrayLike = 0.0
) -> jax.Array:
    """Multiplies each singular component of each matrix by its weight.

    The result is `c Y + U diag(w - c) U^T Y` if rows <= cols, else `c Y + Y V diag(w - c) V^T`, where c is the weight
    of everything that the basis leaves out. The weight `eta(y) / y` puts the singular value eta(y) in the place of y.

    Args:
      matrices: (..., rows, cols).
      basis: (..., R, K), orthonormal columns: all columns of `short_side_svd` or the leading ones, R = min(rows, cols).
      weights: (..., K), one weight for each column of `basis`.
      complement: c, (...) or a number. Where c and all weights are 1, the matrix comes out bit for bit.

    Returns:
      (..., rows, cols), at least float32.

    Raises:
      ValueError: if `matrices` has fewer than two axes, or `basis` or `weights` does not fit it.
    """
    matrices = at_least_float32(matrices)
    short_side = _short_side_first(matrices).shape[-2]
    if basis.shape[-2] != short_side or weights.shape[-1] != basis.shape[-1] or basis.shape[-1] > short_side:
        raise ValueError(
            f"basis {basis.shape} and weights {weights.shape} do not fit matrices {matrices.shape}: they "
            f"must end in ({short_side}, K) and (K,), {short_side} being the shorter side. Take the "
            "basis from short_side_svd of these matrices."
        )

    def product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
        # A tall matrix is multiplied in the other order of its axes: to transpose it and the result would take longer.
        if matrices.shape[-2] > matrices.shape[-1]:
            equation = equation.replace("rl", "lr").replace("sl", "ls").replace("kl", "lk")
        return jnp.einsum(equation, left, right, precision=_HIGHEST)

    outside = jnp.asarray(complement, matrices.dtype)[..., None, None]
    change = basis * (weights[..., None, :] - outside)
    if 2 * basis.shape[-1] > short_side:  # the R x R multiplier first: one product with the long side instead of two
        changed = product("...rs,...sl->...rl", product("...rk,...sk->...rs", change, basis), matrices)
    else:
        changed = product("...rk,...kl->...rl", change, product("...rk,...rl->...kl", basis, matrices))
    return outside * matrices + changed


def _short_side_first(matrices: jax.Array) -> jax.Array:
    """The matrices themselves, or their transposes where rows > cols."""
    if matrices.ndim < 2:
        raise ValueError(f"matrices has shape {matrices.shape}; it needs at least two: (..., rows, cols).")
    rows, cols = matrices.shape[-2:]
    return matrices if rows <= cols else jnp.swapaxes(matrices, -1, -2)
