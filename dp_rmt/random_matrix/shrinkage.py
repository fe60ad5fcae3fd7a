"""Singular-value shrinkers, which say by what each observed singular value y of `Y = G + s N` should be replaced.

Each function has the signature `(singular_values, *, rows, cols, noise_std)`, returns the same shape, gives
exactly 0 at or below the bulk edge `e = s (sqrt m + sqrt n)`, and is the identity at `noise_std == 0`. Each
is optimal for its own loss in the limit of large matrices of fixed aspect ratio and rank.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dp_rmt.random_matrix import marchenko_pastur
from dp_rmt.random_matrix.marchenko_pastur import at_least_float32, root_of_difference


def frobenius(singular_values: ArrayLike, *, rows: int, cols: int, noise_std: ArrayLike) -> jax.Array:
    """The shrinker that minimises the Frobenius norm of the error.

    `eta(y) = sqrt(a^2 - 4 s^4 m n) / y` with `a = y^2 - s^2 (m + n)` (Shabalin & Nobel 2013; Gavish &
    Donoho 2017). It is computed as `sqrt(y^2 - e^2) sqrt(y^2 - c^2) / y` with `c = s |sqrt m - sqrt n|`, which is
    equal, and accurate near the edge in float32.

    Args:
      singular_values: y >= 0, of any shape.
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar.

    Returns:
      The shrunken singular values, the shape of `singular_values`, at least float32.

    Raises:
      ValueError: if `rows` or `cols` is not positive.

    >>> print(frobenius(5.0, rows=4, cols=4, noise_std=1.0))
    3.0
    """
    observed = at_least_float32(singular_values)
    edge = marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=noise_std)
    lower = marchenko_pastur.lower_edge(rows=rows, cols=cols, noise_std=noise_std)
    above = jnp.maximum(observed, edge)
    shrunken = root_of_difference(above, edge) * (root_of_difference(above, lower) / _nonzero(above))
    return jnp.where(observed > edge, shrunken, 0.0)


def operator(singular_values: ArrayLike, *, rows: int, cols: int, noise_std: ArrayLike) -> jax.Array:
    """The original singular value: the inverse map, the operator-norm shrinker of Gavish & Donoho.

    `eta(y) = l(y) = (sqrt(y^2 - c^2) + sqrt(y^2 - e^2)) / 2` with `c = s |sqrt m - sqrt n|` (Gavish & Donoho
    2017). It minimises the operator norm of the error for square matrices. For others see `operator_rectangular`.

    Args:
      singular_values: y >= 0, of any shape.
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar.

    Returns:
      The shrunken singular values, the shape of `singular_values`, at least float32.

    Raises:
      ValueError: if `rows` or `cols` is not positive.

    >>> print(operator(5.0, rows=4, cols=4, noise_std=1.0))
    4.0
    """
    return marchenko_pastur.signal_singular_value(singular_values, rows=rows, cols=cols, noise_std=noise_std)


def operator_rectangular(singular_values: ArrayLike, *, rows: int, cols: int, noise_std: ArrayLike) -> jax.Array:
    """The shrinker that minimises the operator norm of the error at any aspect ratio.

    `eta(y) = l sqrt((l^2 + s^2 min(m, n)) / (l^2 + s^2 max(m, n)))` with `l = l(y)` the original singular
    value (Leeb 2022). It equals `operator` for square matrices and is smaller for others.

    Args:
      singular_values: y >= 0, of any shape.
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar.

    Returns:
      The shrunken singular values, the shape of `singular_values`, at least float32.

    Raises:
      ValueError: if `rows` or `cols` is not positive.
    """
    signal = operator(singular_values, rows=rows, cols=cols, noise_std=noise_std)
    shorter = jnp.hypot(signal, noise_std * math.sqrt(min(rows, cols)))
    longer = jnp.hypot(signal, noise_std * math.sqrt(max(rows, cols)))
    return signal * (shorter / _nonzero(longer))


def nuclear(singular_values: ArrayLike, *, rows: int, cols: int, noise_std: ArrayLike) -> jax.Array:
    """The shrinker that minimises the nuclear norm of the error.

    `eta(y) = max(0, l^4 - s^4 m n - s^2 sqrt(m n) l y) / (l^2 y)` with `l = l(y)` the original singular value
    (Gavish & Donoho 2017). It is computed as `max(0, frobenius(y) - t^2 / l)` with t the detection threshold, which is
    equal.

    Args:
      singular_values: y >= 0, of any shape.
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar.

    Returns:
      The shrunken singular values, the shape of `singular_values`, at least float32.

    Raises:
      ValueError: if `rows` or `cols` is not positive.

    >>> print(nuclear(5.0, rows=4, cols=4, noise_std=1.0))
    2.0
    """
    signal = operator(singular_values, rows=rows, cols=cols, noise_std=noise_std)
    threshold = marchenko_pastur.detection_threshold(rows=rows, cols=cols, noise_std=noise_std)
    best_frobenius = frobenius(singular_values, rows=rows, cols=cols, noise_std=noise_std)
    return jnp.maximum(best_frobenius - threshold * (threshold / _nonzero(signal)), 0.0)


def hard_threshold(singular_values: ArrayLike, *, rows: int, cols: int, noise_std: ArrayLike) -> jax.Array:
    """The cut that minimises the Frobenius norm of the error among all cuts; a value is kept as it is or dropped.

    `eta(y) = y if y > tau else 0`, `tau^2 = s^2 (2 (m + n) + 8 m n / (m + n + sqrt(m^2 + 14 m n + n^2)))`
    (Gavish & Donoho 2014), which is `4 / sqrt(3) sqrt(n) s` for square matrices.

    Args:
      singular_values: y >= 0, of any shape.
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar.

    Returns:
      The kept singular values, and 0 for the others, the shape of `singular_values`, at least float32.

    Raises:
      ValueError: if `rows` or `cols` is not positive.

    >>> print(hard_threshold([4.7, 4.6], rows=4, cols=4, noise_std=1.0))
    [4.7 0. ]
    """
    observed = at_least_float32(singular_values)
    total, product = rows + cols, rows * cols
    cut = math.sqrt(2 * total + 8 * product / (total + math.sqrt(total**2 + 12 * product)))
    return jnp.where(observed > noise_std * cut, observed, 0.0)


def optshrink(singular_values: ArrayLike, *, rows: int, cols: int, noise_std: ArrayLike) -> jax.Array:
    """The Frobenius-optimal weights, read from the noise in the spectrum instead of from a noise model.

    `eta(y) = -2 D(y) / D'(y)`, `D(z) = f_1(z) f_2(z)`, where f_1 and f_2 are the means of `z / (z^2 - x^2)`
    over the singular values x of the noise, one for each row and one for each column. The longer side therefore has
    |m - n| zeros more (Nadakuditi 2014; Benaych-Georges & Nadakuditi 2012). The singular values at or below the bulk
    edge are taken as the noise; `noise_std` serves only to place the edge. A matrix without any such value has no noise
    to read, and gets `frobenius`.

    Args:
      singular_values: y >= 0, all min(m, n) of them on the last axis, in any order; any leading batch axes.
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar.

    Returns:
      The shrunken singular values, the shape of `singular_values`, at least float32.

    Raises:
      ValueError: if the last axis does not have length min(rows, cols), or `rows` or `cols` is not positive.
    """
    observed = at_least_float32(singular_values)
    marchenko_pastur.check_full_spectrum(observed, rows, cols)
    is_signal = observed > marchenko_pastur.bulk_edge(rows=rows, cols=cols, noise_std=noise_std)
    has_tail = jnp.any(~is_signal, axis=-1, keepdims=True)

    # Values are in units of the largest one, so that fourth powers neither underflow nor overflow.
    unit = _nonzero(jnp.max(observed, axis=-1, keepdims=True))
    z = jnp.where(is_signal, observed / unit, 2.0)[..., :, None]
    x = jnp.where(is_signal, 0.0, observed / unit)[..., None, :]
    in_tail = ~is_signal[..., None, :]
    inverse_gap = jnp.where(in_tail, 1.0 / ((z - x) * (z + x)), 0.0)
    trace = jnp.sum(z * inverse_gap, axis=-1)
    slope = -jnp.sum((z**2 + x**2) * inverse_gap**2, axis=-1)

    # The longer side sees |m - n| further singular values, all 0. The means' divisors cancel in D / D'.
    z, zeros = z[..., 0], abs(rows - cols)
    trace = jnp.where(has_tail, trace, 1.0)
    log_slope = slope / trace + (slope - zeros / z**2) / (trace + zeros / z)
    weight = unit * (-2.0 / jnp.where(has_tail, log_slope, -1.0))
    weight = jnp.where(has_tail, weight, frobenius(observed, rows=rows, cols=cols, noise_std=noise_std))
    return jnp.where(is_signal, weight, 0.0)


def _nonzero(array: jax.Array) -> jax.Array:
    """The array with 1 in the place of 0, as a denominator whose quotient is 0 or discarded there."""
    return jnp.where(array == 0, 1.0, array)
