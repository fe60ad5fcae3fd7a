"""The bulk of the singular values of noise, and how a singular value of the signal moves when noise is added.

Everything below rests on two lengths, the ends of the interval that the singular values of pure noise fill,

    e = s (sqrt m + sqrt n)        the bulk edge,
    c = s |sqrt m - sqrt n|        the lower end,

and on the detection threshold `t = s (m n)^(1/4)`, which satisfies `e^2 = c^2 + 4 t^2`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy import integrate, optimize


def bulk_edge(*, rows: int, cols: int, noise_std: ArrayLike) -> ArrayLike:
    """The largest singular value of pure noise, in the limit of large matrices.

    `e = s (sqrt m + sqrt n)` (Marchenko & Pastur 1967; Geman 1980).

    Args:
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar.

    Returns:
      A scalar in the units of `noise_std`; a Python float for a Python float.

    Raises:
      ValueError: if `rows` or `cols` is not positive.

    >>> bulk_edge(rows=4, cols=9, noise_std=2.0)
    10.0
    """
    _check_shape(rows, cols)
    return noise_std * (math.sqrt(rows) + math.sqrt(cols))


def lower_edge(*, rows: int, cols: int, noise_std: ArrayLike) -> ArrayLike:
    """The smallest of the `min(m, n)` singular values of pure noise, in the limit of large matrices.

    `c = s |sqrt m - sqrt n|` (Marchenko & Pastur 1967; Silverstein 1985).

    Args:
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar.

    Returns:
      A scalar in the units of `noise_std`; 0 for square matrices.

    Raises:
      ValueError: if `rows` or `cols` is not positive.

    >>> lower_edge(rows=4, cols=9, noise_std=2.0)
    2.0
    """
    _check_shape(rows, cols)
    return noise_std * abs(math.sqrt(rows) - math.sqrt(cols))


def detection_threshold(*, rows: int, cols: int, noise_std: ArrayLike) -> ArrayLike:
    """The signal singular value below which a component leaves no trace above the bulk edge.

    `t = s (m n)^(1/4)` (Baik, Ben Arous & Peche 2005; Benaych-Georges & Nadakuditi 2012).

    Args:
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar.

    Returns:
      A scalar in the units of `noise_std`.

    Raises:
      ValueError: if `rows` or `cols` is not positive.

    >>> detection_threshold(rows=4, cols=4, noise_std=3.0)
    6.0
    """
    _check_shape(rows, cols)
    return noise_std * math.sqrt(math.sqrt(rows) * math.sqrt(cols))


def observed_singular_value(singular_values: ArrayLike, *, rows: int, cols: int, noise_std: ArrayLike) -> jax.Array:
    """Where a signal singular value is seen once noise is added: the forward map y(l).

    `y(l) = sqrt((l + s^2 m / l)(l + s^2 n / l))` above the detection threshold, the bulk edge at or below it
    (Benaych-Georges & Nadakuditi 2012). It is computed as `y = hypot(l + t^2 / l, c)`, which is equal.

    Args:
      singular_values: l >= 0, of any shape, the singular values of the signal.
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar. 0 gives the identity.

    Returns:
      The observed singular values, the shape of `singular_values`, at least float32.

    Raises:
      ValueError: if `rows` or `cols` is not positive.

    >>> print(observed_singular_value(4.0, rows=4, cols=4, noise_std=1.0))
    5.0
    """
    threshold = detection_threshold(rows=rows, cols=cols, noise_std=noise_std)
    signal = jnp.maximum(at_least_float32(singular_values), threshold)
    positive = jnp.where(signal > 0, signal, 1.0)
    lower = lower_edge(rows=rows, cols=cols, noise_std=noise_std)
    return jnp.hypot(signal + threshold * (threshold / positive), lower)


def signal_singular_value(singular_values: ArrayLike, *, rows: int, cols: int, noise_std: ArrayLike) -> jax.Array:
    """The signal singular value behind an observed one: the inverse map l(y), 0 at or below the bulk edge.

    `l(y)^2 = (a + sqrt(a^2 - 4 s^4 m n)) / 2` with `a = y^2 - s^2 (m + n)` (Gavish & Donoho 2017). It is computed as
    `l = (sqrt(y^2 - c^2) + sqrt(y^2 - e^2)) / 2`, which is equal and loses no digits near the edge.

    Args:
      singular_values: y >= 0, of any shape, the singular values of the noisy matrix.
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar. 0 gives the identity.

    Returns:
      The signal singular values, the shape of `singular_values`, at least float32.

    Raises:
      ValueError: if `rows` or `cols` is not positive.

    >>> print(signal_singular_value(5.0, rows=4, cols=4, noise_std=1.0))
    4.0
    """
    observed = at_least_float32(singular_values)
    edge = bulk_edge(rows=rows, cols=cols, noise_std=noise_std)
    above = jnp.maximum(observed, edge)
    lower = lower_edge(rows=rows, cols=cols, noise_std=noise_std)
    signal = (root_of_difference(above, lower) + root_of_difference(above, edge)) / 2
    return jnp.where(observed > edge, signal, 0.0)


def singular_value_density(singular_values: ArrayLike, *, rows: int, cols: int, noise_std: ArrayLike) -> jax.Array:
    """The density of the `r = min(m, n)` singular values of pure noise, in the limit of large matrices.

    `f(y) = sqrt((y^2 - c^2)(e^2 - y^2)) / (pi s^2 r y)` on [c, e], and 0 outside (Marchenko & Pastur 1967). For square
    matrices it is the quarter circle.

    Args:
      singular_values: y >= 0, of any shape.
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s > 0, the standard deviation of one entry; a number or a traced scalar.

    Returns:
      The density, the shape of `singular_values`, in units of 1 / `noise_std`; its integral is 1.

    Raises:
      ValueError: if `rows` or `cols` is not positive.
    """
    y = at_least_float32(singular_values)
    edge = bulk_edge(rows=rows, cols=cols, noise_std=noise_std)
    lower = lower_edge(rows=rows, cols=cols, noise_std=noise_std)
    inside = jnp.clip(y, lower, edge)
    # sqrt(y^2 - c^2) / y, whose limit at y = c = 0 (square matrices) is 1.
    ratio = jnp.where(inside > 0, root_of_difference(inside, lower) / jnp.where(inside > 0, inside, 1.0), 1.0)
    density = ratio * (root_of_difference(edge, inside) / noise_std) / (math.pi * min(rows, cols) * noise_std)
    return jnp.where((y >= lower) & (y <= edge), density, 0.0)


def median_singular_value(*, rows: int, cols: int, noise_std: ArrayLike) -> ArrayLike:
    """The median of the singular values of pure noise, in the limit of large matrices.

    It is the value at which the distribution function of `singular_value_density` is 1/2 (Gavish & Donoho 2014).

    Args:
      rows: m, a static integer.
      cols: n, a static integer.
      noise_std: s, the standard deviation of one entry; a number or a traced scalar.

    Returns:
      A scalar in the units of `noise_std`.

    Raises:
      ValueError: if `rows` or `cols` is not positive.

    >>> round(median_singular_value(rows=100, cols=100, noise_std=0.1), 4)
    0.8079
    """
    _check_shape(rows, cols)
    return noise_std * (math.sqrt(max(rows, cols)) * _unit_median(min(rows, cols) / max(rows, cols)))


def estimate_noise_std(singular_values: ArrayLike, *, rows: int, cols: int) -> jax.Array:
    """Estimates the noise level of a low-rank matrix plus noise from the median of its singular values.

    `s = median(y) / median_singular_value(s = 1)` (Gavish & Donoho 2014). A signal of rank k shifts the rank
    of the median by k / 2 out of r = min(m, n), so k must be small against r.

    Args:
      singular_values: all r of them on the last axis, any leading batch axes.
      rows: m, a static integer.
      cols: n, a static integer.

    Returns:
      The estimate of the standard deviation of one entry, of the shape of the batch axes.

    Raises:
      ValueError: if the last axis does not have length min(rows, cols), or `rows` or `cols` is not positive.
    """
    observed = at_least_float32(singular_values)
    check_full_spectrum(observed, rows, cols)
    return jnp.median(observed, axis=-1) / median_singular_value(rows=rows, cols=cols, noise_std=1.0)


def root_of_difference(larger: ArrayLike, smaller: ArrayLike) -> jax.Array:
    """`sqrt(a^2 - b^2)` for a >= b >= 0. It is computed from the factors, without cancellation and without squares."""
    return jnp.sqrt(jnp.subtract(larger, smaller)) * jnp.sqrt(jnp.add(larger, smaller))


def at_least_float32(array: ArrayLike) -> jax.Array:
    """The array as a float array of at least 32 bits, because bfloat16 has no digits left near the edge."""
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def check_full_spectrum(singular_values: jax.Array, rows: int, cols: int) -> None:
    """Raises ValueError unless the last axis holds all min(rows, cols) singular values."""
    _check_shape(rows, cols)
    if singular_values.ndim == 0 or singular_values.shape[-1] != min(rows, cols):
        raise ValueError(
            f"singular_values has shape {singular_values.shape}, but the whole spectrum of a {rows} x {cols} "
            f"matrix is needed: the last axis must have length min(rows, cols) = {min(rows, cols)}. Pass all "
            "singular values, also those below the bulk edge."
        )


def _check_shape(rows: int, cols: int) -> None:
    if rows < 1 or cols < 1:
        raise ValueError(f"rows={rows}, cols={cols}: a matrix needs at least one row and one column.")


@functools.lru_cache(maxsize=256)
def _unit_median(aspect_ratio: float) -> float:
    """Median for s sqrt(max(m, n)) = 1 and aspect ratio b = min(m, n) / max(m, n).

    In the angle of `y^2 = 1 + b + 2 sqrt(b) cos(angle)` the density `(2 / pi) sin(angle)^2 / y^2` is smooth.
    """

    def squared(angle: float) -> float:
        return 1 + aspect_ratio + 2 * math.sqrt(aspect_ratio) * math.cos(angle)

    def mass_above(angle: float) -> float:
        def angle_density(phi: float) -> float:
            return 2 / math.pi * math.sin(phi) ** 2 / squared(phi)

        return float(integrate.quad(angle_density, 0, angle, epsabs=1e-13, epsrel=1e-13)[0])

    # The density at pi is 0/0 for square matrices; the median is far from there.
    angle = optimize.brentq(lambda angle: mass_above(angle) - 0.5, 0.1, np.pi - 1e-3, xtol=1e-13)
    return math.sqrt(squared(angle))
