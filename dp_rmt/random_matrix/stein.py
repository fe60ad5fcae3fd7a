"""Stein's unbiased estimate of the squared error of a shrunken matrix, from the noisy matrix alone.

For `Y = G + s N` and any weakly differentiable D(Y), `E |D - G|^2 = E[ |D - Y|^2 + 2 s^2 div D - s^2 m n ]` (Stein
1981). The divergence is all that must be known about D. The estimate is used to choose between Y and D.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dp_rmt.random_matrix import marchenko_pastur
from dp_rmt.random_matrix.marchenko_pastur import at_least_float32


def slope_of(shrinker: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes the derivative `f'(y)` of a shrinker that acts on each singular value alone.

    Args:
      shrinker: a function of `dp_rmt.random_matrix.shrinkage` other than `optshrink`, whose weights depend on the whole
        spectrum.

    Returns:
      A function of the same signature that returns the slope at each value. The slope is dimensionless, and 0 at or
      below the bulk edge.

    >>> from dp_rmt.random_matrix import shrinkage
    >>> print(slope_of(shrinkage.frobenius)([5.0, 3.0], rows=4, cols=4, noise_std=1.0))
    [1.6666666 0.       ]
    """

    def slope(singular_values: ArrayLike, *, rows: int, cols: int, noise_std: ArrayLike) -> jax.Array:
        values = at_least_float32(singular_values)
        shrink = lambda y: shrinker(y, rows=rows, cols=cols, noise_std=noise_std)  # noqa: E731
        slopes: jax.Array = jax.jvp(shrink, (values,), (jnp.ones_like(values),))[1]
        return slopes

    return slope


def divergence(
    values: ArrayLike, shrunken: ArrayLike, slope: ArrayLike, *, rows: int, cols: int, noise_std: ArrayLike
) -> jax.Array:
    """The divergence of `D(Y) = sum_i f_i u_i v_i^T`, a matrix with the singular vectors of Y.

    `div D = sum_i [f'_i + |m - n| f_i / y_i] + 2 sum_(i < j) (y_i f_i - y_j f_j) / (y_i^2 - y_j^2)` (Candes,
    Sing-Long & Trzasko 2013). Where two values are equal, the quotient is replaced by its limit, `(f / y + f') / 2`.

    If only the leading K < min(m, n) values are given, those at or below the bulk edge and all others are replaced by
    the Marchenko-Pastur law, for which the mean of `1 / (y^2 - x^2)` is `1 / (l(y)^2 + s^2 min(m, n))`, l(y) the signal
    singular value. Ritz values in the bulk, which are not singular values, therefore do no harm.

    The slope of a shrinker is infinite at the edge, like `1 / sqrt(y - e)`, and so is the quotient. Both are held to
    `sqrt(m n)`, which is one part in `sqrt(m n)` of the `m n` to which the sum is compared. Where f jumps, as
    `operator`, `hard_threshold` and a gate above the edge do, the contribution of the jump is missing. It is about the
    height of the jump times the density of values there: in simulation up to 1% of `m n` with a hundred values near the
    edge, and nothing with a few (tests/laws/test_never_worse.py).

    Args:
      values: singular values y (..., K): all of them or the leading ones, in any order.
      shrunken: f(y) (..., K) in the units of y, 0 where a component is not kept.
      slope: f'(y) (..., K), dimensionless, 0 where a component is not kept.
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar. It is used only if K < min(m, n).

    Returns:
      The divergence, (...). It is dimensionless: m n for D = Y, 0 for D = 0.

    Raises:
      ValueError: there are more than min(rows, cols) values, or the shapes differ.

    >>> y = jnp.array([3.0, 2.0])
    >>> print(divergence(y, y, jnp.ones(2), rows=2, cols=5, noise_std=1.0))
    10.0
    """
    y, f, df = at_least_float32(values), at_least_float32(shrunken), at_least_float32(slope)
    shorter = min(rows, cols)
    if not y.shape == f.shape == df.shape or y.ndim == 0 or y.shape[-1] > shorter:
        raise ValueError(
            f"values {y.shape}, shrunken {f.shape} and slope {df.shape} must have one shape that ends in at most "
            f"min(rows, cols) = {shorter}, the number of singular values of a {rows} x {cols} matrix."
        )
    largest = math.sqrt(rows * cols)
    df = jnp.clip(jnp.nan_to_num(df), -largest, largest)
    ratio = jnp.where(f != 0, f / jnp.where(y > 0, y, 1.0), 0.0)
    single = df + abs(rows - cols) * ratio
    if y.shape[-1] == shorter:
        return jnp.sum(single, axis=-1) + _pairs(y, f, df, ratio, jnp.ones(y.shape, bool), largest)

    above = y > marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=noise_std)
    signal = marchenko_pastur.signal_singular_value(y, rows=rows, cols=cols, noise_std=noise_std)
    in_tail = shorter - jnp.sum(above, axis=-1, keepdims=True)
    # This is y f / (l^2 + s^2 min(m, n)), written without the squares, which can underflow and overflow.
    root_mean_gap = jnp.where(above, jnp.hypot(signal, math.sqrt(shorter) * noise_std), 1.0)
    tail = jnp.where(above, 2 * in_tail * (y / root_mean_gap) * (f / root_mean_gap), 0.0)
    return jnp.sum(jnp.where(above, single + tail, 0.0), axis=-1) + _pairs(y, f, df, ratio, above, largest)


def _pairs(
    y: jax.Array, f: jax.Array, df: jax.Array, ratio: jax.Array, included: jax.Array, largest: float
) -> jax.Array:
    """`2 sum_(i < j) (y_i f_i - y_j f_j) / (y_i^2 - y_j^2)` over the included components, each quotient bounded."""
    # Pairs are in units of their larger value: squares neither underflow nor overflow, and a divergence has no unit.
    larger = jnp.maximum(y[..., :, None], y[..., None, :])
    unit = jnp.where(larger > 0, larger, 1.0)
    (yi, yj), (fi, fj) = ((x[..., :, None] / unit, x[..., None, :] / unit) for x in (y, f))
    # Closer than this, the difference of the products is rounding; the mean of the two slopes is exact to first order.
    are_close = jnp.abs(yi - yj) <= math.sqrt(jnp.finfo(y.dtype).eps)
    quotient = (yi * fi - yj * fj) / jnp.where(are_close, 1.0, (yi - yj) * (yi + yj))
    limit = (ratio + df) / 4
    quotient = jnp.where(are_close, limit[..., :, None] + limit[..., None, :], quotient)
    quotient = jnp.clip(quotient, -largest, largest)
    is_pair = included[..., :, None] & included[..., None, :] & ~jnp.eye(y.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(is_pair, quotient, 0.0), axis=(-2, -1))


def risk(
    squared_distance: ArrayLike, divergence: ArrayLike, *, rows: int, cols: int, noise_std: ArrayLike
) -> jax.Array:
    """Stein's unbiased estimate of `|D - G|^2`, the squared error of D, from the noisy matrix alone.

    `|D - Y|^2 + 2 s^2 div D - s^2 m n` (Stein 1981).

    Args:
      squared_distance: `|D - Y|^2`, (...).
      divergence: div D, (...), see `divergence`.
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar.

    Returns:
      The estimate, (...), in units of `noise_std**2`. It may be negative; its expectation is not.

    >>> print(risk(0.0, 12.0, rows=3, cols=4, noise_std=0.5))  # D = Y: the noise itself
    3.0
    """
    return at_least_float32(squared_distance) + jnp.square(noise_std) * (2 * jnp.asarray(divergence) - rows * cols)


def blend_weight(
    squared_distance: ArrayLike, divergence: ArrayLike, *, rows: int, cols: int, noise_std: ArrayLike
) -> jax.Array:
    """The a in [0, 1] for which `(1 - a) Y + a D` has the least squared error by Stein's estimate.

    The estimate is the parabola `a^2 |D - Y|^2 - 2 a s^2 (m n - div D) + s^2 m n`. It is least at `a = s^2 (m n - div
    D) / |D - Y|^2`, which is clipped to [0, 1] here. For D = 0 the blend is `max(0, 1 - s^2 m n / |Y|^2) Y`, the
    estimator of James & Stein (1961) with m n in the place of m n - 2.

    Args:
      squared_distance: `|D - Y|^2`, (...), in units of `noise_std**2`.
      divergence: div D, (...), see `divergence`.
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar. With 0 the result is a = 0, the
        matrix itself.

    Returns:
      The weight a, (...); it is 0 where D is Y.

    >>> print(blend_weight(48.0, 0.0, rows=3, cols=4, noise_std=1.0))  # D = 0 and |Y|^2 four times that of the noise
    0.25
    """
    distance = at_least_float32(squared_distance)
    wanted = jnp.square(noise_std) * (rows * cols - jnp.asarray(divergence))
    return jnp.where(distance > 0, jnp.clip(wanted / jnp.where(distance > 0, distance, 1.0), 0.0, 1.0), 0.0)
